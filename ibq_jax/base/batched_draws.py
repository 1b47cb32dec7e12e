"""Draws the random numbers of a function together, because XLA compiles every draw by itself.

An initial state is made of some hundred draws, each with a key of its own. Compiling Threefry for each of them takes
several times as long as for one draw with an array of keys, which has the same bits.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

LARGEST = 2**22  # numbers of a draw; larger ones are few, and stacked they would take memory
JITS = ("jit", "pjit")  # the names of a nested jit in a jaxpr
FOLD_IN, BITS = "random_fold_in", "random_bits"  # makes a key of a key and a number; draws bits


@dataclass(eq=False)
class _Operation:
    """An equation of a jaxpr, where the values that it reads come from, and its results once they are known."""

    equation: core.JaxprEqn
    jaxpr: core.Jaxpr  # which has the equation
    inputs: Sequence["_Source"]
    results: list = field(default_factory=list)  # empty: not evaluated yet

    @property
    def ready(self) -> bool:
        return all(operation is None or operation.results for operation, _ in self.inputs)


_Source = tuple[_Operation | None, Any]  # an operation and which of its results, or None and a value that is known


def _value(source: _Source):
    operation, known = source
    return operation.results[known] if operation else known


def draw_together(function: Callable) -> Callable:
    """Returns a function with the same values, to be jitted, which makes its draws of equal size by one operation each.

    Nested jits are dissolved, and any placements that they ask for are left out. Draws inside of loops, with keys of
    other kinds than Threefry's, or of more than LARGEST numbers are made as they were.
    """

    def together(*arguments):
        traced, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
        operations = []
        sources = _sources(traced, [(None, leaf) for leaf in jax.tree.leaves(arguments)], operations)
        _evaluate(_needed(sources, operations))
        return jax.tree.unflatten(jax.tree.structure(shapes), map(_value, sources))

    return together


def _sources(traced: core.ClosedJaxpr, arguments: Sequence[_Source], operations: list[_Operation]) -> list[_Source]:
    """Returns where a jaxpr's results come from, and appends its operations, each after those that it depends on."""
    known: dict[core.Var, _Source] = {
        variable: (None, value) for variable, value in zip(traced.jaxpr.constvars, traced.consts, strict=True)
    }
    known |= zip(traced.jaxpr.invars, arguments, strict=True)

    def found(variable) -> _Source:
        return (None, variable.val) if isinstance(variable, core.Literal) else known[variable]

    for equation in traced.jaxpr.eqns:
        inputs = [found(variable) for variable in equation.invars]
        if equation.primitive.name in JITS:
            known |= zip(equation.outvars, _sources(equation.params["jaxpr"], inputs, operations), strict=True)
        else:
            operation = _Operation(equation, traced.jaxpr, inputs)
            operations.append(operation)
            known |= {variable: (operation, index) for index, variable in enumerate(equation.outvars)}
    return [found(variable) for variable in traced.jaxpr.outvars]


def _needed(sources: Sequence[_Source], operations: Sequence[_Operation]) -> list[_Operation]:
    """Returns the operations, in their order, that some values depend on."""
    needed = {operation for operation, _ in sources}
    for operation in reversed(operations):
        if operation in needed:
            needed |= {source for source, _ in operation.inputs}
    return [operation for operation in operations if operation in needed]


def _evaluate(operations: Sequence[_Operation]) -> None:
    """Evaluates operations, each of which comes after those that it reads."""
    waiting = list(operations)
    while waiting:
        draws = defaultdict(list)
        for operation in waiting:
            if operation.ready and (kind := _kind(operation)):
                draws[kind].append(operation)
            elif operation.ready:
                operation.results = _applied(operation)
        folds = {kind: drawn for kind, drawn in draws.items() if kind[0] == FOLD_IN}
        for kind, drawn in (folds or draws).items():  # bits wait until all keys are there
            _draw(kind, drawn)
        waiting = [operation for operation in waiting if not operation.results]


def _kind(operation: _Operation) -> tuple | None:
    """Returns what operations have in common that are evaluated together, None for one that is evaluated alone."""
    equation, values = operation.equation, list(map(_value, operation.inputs))
    name = equation.primitive.name
    if name not in (FOLD_IN, BITS) or str(values[0].dtype) != "key<fry>" or any(map(jnp.shape, values)):
        return None
    if name == FOLD_IN:
        return (FOLD_IN,)
    size = math.prod(equation.params["shape"])
    return (BITS, size, f"uint{equation.params['bit_width']}") if size <= LARGEST else None


def _draw(kind: tuple, operations: Sequence[_Operation]) -> None:
    """Evaluates operations of one kind by one operation."""
    keys, *numbers = map(jnp.stack, zip(*(map(_value, operation.inputs) for operation in operations), strict=True))
    if kind[0] == FOLD_IN:
        drawn = list(jax.vmap(jax.random.fold_in)(keys, *numbers))
    else:
        _, size, dtype = kind
        bits = jax.vmap(lambda key: jax.random.bits(key, (size,), dtype))(keys)
        shapes = [operation.equation.params["shape"] for operation in operations]
        drawn = [row.reshape(shape) for row, shape in zip(bits, shapes, strict=True)]
    for operation, value in zip(operations, drawn, strict=True):
        operation.results = [value]


def _applied(operation: _Operation) -> list:
    """Returns the results of an operation, as those of a jaxpr that has its equation alone."""
    equation, variables, values = operation.equation, [], []
    for variable, source in zip(equation.invars, operation.inputs, strict=True):
        if not isinstance(variable, core.Literal):
            variables.append(variable)
            values.append(_value(source))
    alone = operation.jaxpr.replace(constvars=[], invars=variables, outvars=equation.outvars, eqns=[equation])
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, []))(*values)
