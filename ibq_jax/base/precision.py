"""The precisions of matrix products and convolutions, by name: the one place where they are translated for JAX.

By default JAX multiplies float32 arrays in one bfloat16 pass on TPUs and in TF32 on GPUs. Nothing in this package that
decides a code, a loss or a metric relies on that default: it names one of `PRECISIONS`. The names say how many bits of
float32 operands are multiplied at least; sums are always float32:

    name          bits   TPU                 GPU                  CPU
    float32       24     6 bfloat16 passes   float32              float32
    bfloat16_3x   16     3 bfloat16 passes   3 bfloat16 passes    float32
    tf32          11     3 bfloat16 passes   TF32                 float32
    bfloat16       8     1 bfloat16 pass     TF32                 float32

Networks at "bfloat16" also hold their activations in bfloat16 (`compute_dtype`), on every machine. GPUs have no
convolution of three passes; `check_precision` refuses the name for them. docs/precision.md has the costs.
"""

import jax.numpy as jnp
from jax import lax

from ibq_jax.base.errors import UsageError

PRECISIONS = ("float32", "bfloat16_3x", "tf32", "bfloat16")
FULL = lax.Precision.HIGHEST  # every bit of float32 operands, on every machine
_PRODUCTS = {
    "float32": FULL,
    "bfloat16_3x": lax.DotAlgorithmPreset.BF16_BF16_F32_X3,
    "tf32": lax.Precision.HIGH,
    "bfloat16": lax.Precision.DEFAULT,
}
_CONVOLUTIONS = {**_PRODUCTS, "bfloat16_3x": lax.Precision.HIGH}  # they take no algorithm


def compute_dtype(precision: str) -> jnp.dtype:
    """Returns the type in which networks hold activations, and multiply them."""
    return jnp.dtype(jnp.bfloat16 if precision == "bfloat16" else jnp.float32)


def product_precision(precision: str) -> lax.Precision | lax.DotAlgorithmPreset:
    """Returns JAX's `precision` argument for products of float32 operands."""
    return _PRODUCTS[precision]


def convolution_precision(precision: str) -> lax.Precision:
    """Returns JAX's `precision` argument for convolutions of float32 operands."""
    return _CONVOLUTIONS[precision]


def check_precision(precision: str, field: str, platform: str = "cpu") -> None:
    """Checks a precision that `field` names, and that the platform's convolutions have it.

    Raises UsageError with the precisions that can be chosen.
    """
    missing = {"gpu": ("bfloat16_3x",), "cuda": ("bfloat16_3x",)}.get(platform, ())
    known = [name for name in PRECISIONS if name not in missing]
    if precision not in known:
        where = f" for convolutions on a {platform}" if precision in missing else ""
        raise UsageError(f"{field}={precision} is not a precision{where}; it is one of {', '.join(known)}")
