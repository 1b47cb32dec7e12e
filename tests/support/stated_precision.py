"""Lists the products of a function with the precisions that they state, which is all that a CPU shows of them.

By default JAX multiplies float32 in one bfloat16 pass on TPUs and in TF32 on GPUs; CPUs compute in float32 whatever is
stated. So no number that is computed here shows a product that states nothing; the traced program does.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

ROOT = Path(__file__).parents[2]
PRIMITIVES = ("dot_general", "ragged_dot_general", "conv_general_dilated")
FLOAT32 = ((lax.Precision.HIGHEST,) * 2, lax.DotAlgorithmPreset.F32_F32_F32)


class Product(NamedTuple):
    """A matrix product or convolution of a traced program."""

    primitive: str  # one of PRIMITIVES
    operands: tuple[str, str]  # their types
    precision: Any  # as the primitive holds it: None, a pair of lax.Precision, or a lax.DotAlgorithmPreset
    source: str  # the lines of this repository that led to it, the outermost first: "FILE:LINE > FILE:LINE"


def products(function: Callable, *args) -> list[Product]:
    """Returns every product of `function(*args)`, also in functions that it calls, loops, branches and shard_map.

    The function is traced only; `args` are arrays or jax.ShapeDtypeStructs. Gradients are seen if the function computes
    them, those written by hand too.
    """
    return list(_products(jax.make_jaxpr(function)(*args).jaxpr, ()))


def below_float32(found: list[Product]) -> list[Product]:
    """Returns the products with a float32 operand that do not state that all its bits are multiplied."""
    return [product for product in found if "float32" in product.operands and product.precision not in FLOAT32]


def _products(jaxpr: Jaxpr, lines: tuple[str, ...]) -> Iterator[Product]:
    for equation in jaxpr.eqns:
        own = _line(equation)
        path = lines if not own or own in lines else (*lines, own)
        if equation.primitive.name in PRIMITIVES:
            types = tuple(variable.aval.dtype.name for variable in equation.invars[:2])
            yield Product(equation.primitive.name, types, equation.params["precision"], " > ".join(path))
        for inner in jax.tree.leaves(equation.params):
            if isinstance(inner, ClosedJaxpr):
                yield from _products(inner.jaxpr, path)
            elif isinstance(inner, Jaxpr):
                yield from _products(inner, path)


def _line(equation: JaxprEqn) -> str:
    """Returns the innermost line of this repository on the way to an equation; empty if there is none."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback else ():
        path = Path(frame.file_name)
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.line_num}"
    return ""
