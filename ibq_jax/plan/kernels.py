"""Counts what a program that was compiled for a GPU launches: kernels by kind, each as often as its loop runs.

An instruction counts as one launch, though a library may need several kernels for a call.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ibq_jax.plan.clock import place
from ibq_jax.plan.flops import ATTENTION, CONVOLUTION, CUBLAS, is_product
from ibq_jax.plan.hlo import COLLECTIVES, NO_TRAFFIC, Instruction, Module

CONVOLUTIONS, ATTENTIONS = "cuDNN convolutions", "cuDNN attention"
CUBLAS_PRODUCTS, TRITON_PRODUCTS = "cuBLAS products", "Triton products"
CALLS, TRITON, TRANSPOSES, COPIES = "other library calls", "other Triton kernels", "transposes", "copies"
CASTS, REDUCTIONS, ELEMENTWISE, COLLECTIVE = "conversions of types", "reductions", "elementwise", "collectives"
KINDS = (
    *(CONVOLUTIONS, ATTENTIONS, CUBLAS_PRODUCTS, TRITON_PRODUCTS, CALLS, TRITON, TRANSPOSES),
    *(COPIES, CASTS, REDUCTIONS, ELEMENTWISE, COLLECTIVE),
)
FUSION_BACKEND = re.compile(r'"fusion_backend_config":\{"kind":"([^"]*)"')
VIEWING = {"bitcast", "parameter", "constant", "tuple", "get-tuple-element", "iota"}
MOVING = {"copy", "reshape", "concatenate", "pad", "slice", "dynamic-slice", "dynamic-update-slice", *VIEWING}


@dataclass(frozen=True)
class Kernels:
    """All kernels of one kind that come from one place in the traced program, and the bytes of HBM that they move."""

    place: str
    kind: str
    launches: int
    bytes: float


def read_kernels(module: Module) -> tuple[Kernels, ...]:
    """Returns the kernels of one run of a program, those that move the most bytes first."""
    groups: dict[tuple[str, str], list] = defaultdict(lambda: [0, 0.0])
    for computation, instruction, times in module.executed():
        if instruction.opcode in NO_TRAFFIC or instruction.opcode.endswith("-done"):
            continue
        group = groups[place(instruction.op_name) or instruction.opcode, _kind(module, instruction)]
        group[0] += times
        group[1] += times * module.traffic(computation, instruction)
    kernels = [Kernels(*key, *numbers) for key, numbers in groups.items()]
    return tuple(sorted(kernels, key=lambda kernel: -kernel.bytes))


def by_kind(kernels: Iterable[Kernels]) -> dict[str, tuple[int, float]]:
    """Returns the launches and the bytes of every kind that occurs, in the order of `KINDS`."""
    totals = {kind: (0, 0.0) for kind in KINDS}
    for kernel in kernels:
        launches, size = totals[kernel.kind]
        totals[kernel.kind] = launches + kernel.launches, size + kernel.bytes
    return {kind: total for kind, total in totals.items() if total[0]}


def _kind(module: Module, instruction: Instruction) -> str:
    opcode = instruction.opcode
    if opcode == "custom-call":
        return _kind_of_call(instruction)
    if opcode.removesuffix("-start") in COLLECTIVES:
        return COLLECTIVE
    if opcode != "fusion":
        return (
            COPIES if opcode in MOVING or opcode == "copy-start" else REDUCTIONS if "reduce" in opcode else ELEMENTWISE
        )
    inside = [inner for _, inner in module.inside(module.computations[instruction.called[0]])]
    for inner in inside:
        if is_product(inner):
            return TRITON_PRODUCTS if inner.opcode == "dot" else _kind_of_call(inner)
    backend = FUSION_BACKEND.search(instruction.attributes)
    if backend and "triton" in backend[1]:
        return TRITON
    # Scalars are positions of slices, and not what a kernel is for.
    opcodes = {inner.opcode for inner in inside if any(array.shape for array in inner.arrays)} - VIEWING
    if "transpose" in opcodes:
        return TRANSPOSES
    if opcodes & {"reduce", "reduce-window"}:
        return REDUCTIONS
    if opcodes <= MOVING:
        return COPIES
    return CASTS if opcodes <= {*MOVING, "convert"} else ELEMENTWISE


def _kind_of_call(instruction: Instruction) -> str:
    if instruction.opcode == "convolution" or CONVOLUTION.search(instruction.attributes):
        return CONVOLUTIONS
    if ATTENTION.search(instruction.attributes):
        return ATTENTIONS
    return CUBLAS_PRODUCTS if CUBLAS.search(instruction.attributes) else CALLS
