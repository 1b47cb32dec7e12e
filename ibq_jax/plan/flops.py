"""Counts the operations of a compiled program's matrix products and convolutions.

XLA's own figure counts the body of a loop once, and there is none for GPUs, where products are calls of cuDNN and
cuBLAS or kernels that Triton makes. An addition and a multiplication count as two operations.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from ibq_jax.plan.hlo import Computation, Instruction, Module, required_match
from ibq_jax.plan.products import multiplied_bits

CONVOLUTION = re.compile(r'custom_call_target="__cudnn\$conv(\w+)"')
CUBLAS = re.compile(r'custom_call_target="__cublas\$')
ATTENTION = re.compile(r'custom_call_target="__cudnn\$fmha\w*?(Backward)?"')
ATTENTION_LOGITS = re.compile(r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*(\[[^\]]*\])')
# Matrix products in cuDNN's attention: logits and values; and in its gradient the logits again and four gradients.
ATTENTION_PRODUCTS, ATTENTION_GRADIENT_PRODUCTS = 2, 5
CONTRACTED = re.compile(r'"lhs_contracting_dimensions":(\[[^\]]*\])')
# The calls of a convolution's two gradients. Their window is that of the forward convolution.
BACKWARD_INPUT, BACKWARD_FILTER = "BackwardInput", "BackwardFilter"


def loop_flops(module: Module) -> float:
    """Returns the operations of products in loops, except each body's first run, which XLA counts."""
    return sum((times - 1) * sum(_flops(*p) for p in _products(module, c, i)) for c, i, times in module.executed())


def flops_by_bits(module: Module, platform: str) -> dict[int, float]:
    """Returns the operations of all products by the significant bits of the operands that they multiply."""
    flops = defaultdict(float)
    for computation, instruction, times in module.executed():
        for product in _products(module, computation, instruction):
            flops[multiplied_bits(*product, platform)] += times * _flops(*product)
    return dict(flops)


def is_product(instruction: Instruction) -> bool:
    """Returns whether an instruction is a matrix product or convolution by itself."""
    return instruction.opcode in ("convolution", "dot") or (
        instruction.is_library_call
        and any(call.search(instruction.attributes) for call in (CONVOLUTION, CUBLAS, ATTENTION))
    )


def _products(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """Yields an instruction if it is a product, and the products inside if it is a fusion."""
    if is_product(instruction):
        yield computation, instruction
    elif instruction.opcode == "fusion":
        fused = module.computations[instruction.called[0]]
        yield from (pair for pair in module.inside(fused) if is_product(pair[1]))


def _flops(computation: Computation, product: Instruction) -> float:
    left, right = (computation.instructions[name].arrays[0].shape for name in product.operands[:2])
    result = product.arrays[0].shape
    if product.opcode == "dot":
        contracted = required_match(r"lhs_contracting_dims=\{([\d,]*)\}", product.attributes)[1]
        return 2.0 * math.prod(result) * math.prod(left[int(i)] for i in contracted.split(",") if i)
    if CUBLAS.search(product.attributes):
        contracted = json.loads(required_match(CONTRACTED, product.attributes)[1])
        return 2.0 * math.prod(result) * math.prod(left[int(i)] for i in contracted)
    if attention := ATTENTION.search(product.attributes):
        logits = json.loads(required_match(ATTENTION_LOGITS, product.attributes)[1])
        count = ATTENTION_GRADIENT_PRODUCTS if attention[1] else ATTENTION_PRODUCTS
        return 2.0 * count * math.prod(map(int, logits)) * left[-1]  # masked logits included
    called = CONVOLUTION.search(product.attributes)
    if called and called[1] == BACKWARD_INPUT:  # (gradient of the result, kernel) -> gradient of the input
        left, result = result, left
    elif called and called[1] == BACKWARD_FILTER:  # (input, gradient of the result) -> gradient of the kernel
        right, result = result, right
    return _convolution_flops(product.attributes, left, right, result)


def _convolution_flops(
    attributes: str, left: tuple[int, ...], right: tuple[int, ...], result: tuple[int, ...]
) -> float:
    """Returns a convolution's operations, without window positions that read padding or holes of a dilated input.

    The compiler for TPUs writes the batch dimensions of a product as a window in which all positions but one are holes.
    """
    labels = required_match(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes).groups()
    window = re.search(r"window=\{(.*?)\}", attributes)
    window = {name: text.split("x") for name, text in re.findall(r"(\w+)=(\S+)", window[1])} if window else {}
    axes = len(result) - 2
    pads, strides, holes, spacings = (
        [int(text.split("_")[0]) for text in window.get(name, [default] * axes)]
        for name, default in (("pad", "0"), ("stride", "1"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))
    )
    seen = result[labels[2].index("b")] * result[labels[2].index("f")] * right[labels[1].index("i")]
    for axis in range(axes):
        inputs, size, outputs = (
            shape[label.index(str(axis))] for shape, label in zip((left, right, result), labels, strict=True)
        )

        where = np.arange(outputs)[:, None] * strides[axis] - pads[axis] + np.arange(size) * spacings[axis]
        inside = (where >= 0) & (where <= (inputs - 1) * holes[axis])
        seen *= int(np.count_nonzero(inside & (where % holes[axis] == 0)))
    return 2.0 * seen
