"""Reads off a compiled program how many bits of their operands its matrix products and convolutions multiply.

XLA's compilers choose how a product is computed: a TPU's as a convolution, an attention's as a kernel of their own, a
GPU's as a call of cuDNN or cuBLAS or as a Triton kernel. What is asked for in JAX can be lost on the way, so only the
compiled text tells. It was checked with the text of jax 0.10.2.
"""

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ibq_jax.plan.hlo import Computation, Instruction, Module

BITS = {"f64": 53, "f32": 24, "f16": 11, "bf16": 8}  # significant bits of a type
# Significant bits that are multiplied of float32 operands, by what the instruction says.
PRECISIONS = {
    "tpu": {"default": 8, "high": 16, "highest": 24},
    "gpu": {"default": 11, "high": 11, "highest": 24},
    "cpu": {"default": 24, "high": 24, "highest": 24},
}
ALGORITHMS = {"bf16_bf16_f32": 8, "bf16_bf16_f32_x3": 16, "tf32_tf32_f32": 11}  # others: all bits
OPERAND_PRECISION = re.compile(r'"?operand_precision"?[=:][{\[]([\w",\s]*)[}\]]')
ALGORITHM = re.compile(r"algorithm=dot_(\w+)")
KERNEL = re.compile(r'custom_call_target="tpu_custom_call".*"body":"([^"]*)"', re.DOTALL)
KERNEL_PRODUCT = re.compile(r"tpu\.matmul [^\n]*")
KERNEL_OPERANDS = re.compile(r": vector<[\dx]*x(\w+)>, vector<[\dx]*x(\w+)>")
UNREADABLE = 0


@dataclass(frozen=True)
class Product:
    """A matrix product or convolution of floating-point numbers."""

    kind: str  # "convolution", "dot", "library call" or "kernel"
    dtypes: tuple[str, ...]  # of its two operands
    bits: int  # significant bits of the operands that it multiplies; `UNREADABLE` for a kernel that cannot be read
    op_name: str  # its place in the traced program


def products(module: Module, platform: str) -> Iterator[Product]:
    """Yields every product of a program compiled for the platform: "tpu", "gpu" or "cpu"."""
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode in ("convolution", "dot"):
                yield from _product(instruction.opcode, computation, instruction, platform)
            elif instruction.is_library_call:
                yield from _product("library call", computation, instruction, platform)
            elif kernel := KERNEL.search(instruction.attributes):
                yield from _kernel_products(kernel[1], instruction.op_name)


def _product(kind: str, computation: Computation, instruction: Instruction, platform: str) -> Iterator[Product]:
    dtypes = _operand_types(computation, instruction)
    if all(dtype in BITS for dtype in dtypes):  # others are of integers
        yield Product(kind, dtypes, multiplied_bits(computation, instruction, platform), instruction.op_name)


def multiplied_bits(computation: Computation, instruction: Instruction, platform: str) -> int:
    """Returns how many significant bits of its operands a product multiplies; of integers, those of bfloat16."""
    # A compiler leaves out the conversion of a bfloat16 operand to float32: the other operand's precision counts.
    bits = max(BITS.get(dtype, BITS["bf16"]) for dtype in _operand_types(computation, instruction))
    return _float32_bits(instruction.attributes, platform) if bits == BITS["f32"] else bits


def _operand_types(computation: Computation, instruction: Instruction) -> tuple[str, ...]:
    return tuple(computation.instructions[operand].arrays[0].dtype for operand in instruction.operands[:2])


def _float32_bits(attributes: str, platform: str) -> int:
    if algorithm := ALGORITHM.search(attributes):
        return ALGORITHMS.get(algorithm[1], BITS["f32"])
    found = OPERAND_PRECISION.search(attributes)
    words = [word.strip(' "').lower() for word in found[1].split(",")[:2]] if found else ["default"]
    return min(PRECISIONS[platform][word] for word in words)


def _kernel_products(body: str, op_name: str) -> Iterator[Product]:
    """Yields the products of a Mosaic kernel, whose body is base64 of MLIR's text."""
    text = base64.b64decode(body).decode("utf-8", errors="replace")
    if "func.func" not in text:
        yield Product("kernel", (), UNREADABLE, op_name)
    for line in KERNEL_PRODUCT.findall(text):
        operands = KERNEL_OPERANDS.search(line)
        dtypes = operands.groups() if operands else ()
        bits = min((BITS.get(dtype, UNREADABLE) for dtype in dtypes), default=UNREADABLE)
        full = "contract_precision<fp32>" in line
        yield Product("kernel", dtypes, bits if full else min(bits, BITS["bf16"]), op_name)
