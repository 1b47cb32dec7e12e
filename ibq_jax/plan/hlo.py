"""Reads a compiled XLA module's text: the memory traffic and collectives of one device.

XLA's own cost analysis counts the body of a loop once, however often it runs, and counts bytes that stay in a TPU's
vector memory like those that leave it. For GPUs it has no figures at all. Here a body counts as often as its loop runs,
and only main memory (HBM) counts.
The reader is written by hand because no library parses optimized HLO text; it was checked with the text of jax 0.10.2.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BOOKKEEPING = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "partition-id", "replica-id")
ORDERING = ("after-all", "opt-barrier", "domain", "add-dependency", "while", "call", "conditional")
NO_TRAFFIC = {*BOOKKEEPING, *ORDERING, "async-start"}  # the computations that they call are counted separately
SLICING = ("dynamic-slice", "slice", "gather")

ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^{}]*)\})?")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")
MESH_PART = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")
LIBRARY_CALL = re.compile(r'custom_call_target="(__cudnn\$|__cublas\$)')
OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Array:
    """An array in an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool
    bytes: int  # in memory, including the padding of its tiles


@dataclass
class Instruction:
    """An instruction of a computation. `operands` are names, or the text of a parameter or constant."""

    name: str
    opcode: str
    arrays: list[Array]
    operands: list[str]
    attributes: str

    @property
    def hbm_bytes(self) -> int:
        """Bytes of the result that lie in HBM."""
        return sum(array.bytes for array in self.arrays if array.in_hbm)

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        branches = BRANCHES.search(self.attributes)
        names = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
        return names + CALLED.findall(self.attributes)

    @property
    def lists_operands(self) -> bool:
        """True if its result lists the operands before the results, as the start of most collectives does."""
        kind = self.opcode.removesuffix("-start")
        return kind != self.opcode and kind in COLLECTIVES and kind != "all-reduce" and len(self.arrays) > 1

    @property
    def is_library_call(self) -> bool:
        """True if it calls cuDNN or cuBLAS."""
        return self.opcode == "custom-call" and LIBRARY_CALL.search(self.attributes) is not None

    @property
    def scratch_bytes(self) -> int:
        """Bytes at the end of a library call's result in which it only works: [N] of bytes."""
        last = self.arrays[-1]
        return last.bytes if len(self.arrays) > 1 and last.dtype in ("u8", "s8") and len(last.shape) == 1 else 0

    @property
    def op_name(self) -> str:
        """The operation of the traced program that it comes from."""
        found = OP_NAME.search(self.attributes)
        return found[1] if found else ""


@dataclass
class Computation:
    """A named list of instructions, such as the body of a loop or of a fusion."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name of an instruction -> the instructions that use its result."""
        users = defaultdict(list)
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users

    @cached_property
    def parameters(self) -> list[Instruction]:
        """The parameter instructions, in the order of their numbers."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda i: int(i.operands[0]))


@dataclass(frozen=True)
class Collective:
    """A collective operation: how many `times` it runs, and the bytes of its result on one device each time."""

    kind: str
    groups: tuple[tuple[int, ...], ...]
    bytes: int
    times: int
    op_name: str
    hidden: bool  # it is started, and other operations run until its result is needed


class Module:
    """One device's program, parsed from a compiled module's text (`jax.stages.Compiled.as_text()`)."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        self._parse(text)

    def _parse(self, text: str) -> None:
        current = None
        for line in text.splitlines():
            if current is None:
                header = COMPUTATION.match(line)
                if header and " -> " in line:
                    current = self.computations[header[2]] = Computation(header[2])
                    self.entry = header[2] if header[1] else self.entry
            elif line.startswith("}"):
                current = None
            elif found := INSTRUCTION.match(line):
                instruction = _instruction(found[2], line[found.end() :])
                current.instructions[instruction.name] = instruction
                current.root = instruction.name if found[1] else current.root

    def executed(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Yields every instruction outside fusions, with its computation and how often it runs."""
        stack = [(self.entry, 1)]
        while stack:
            name, times = stack.pop()
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                yield computation, instruction, times
                if instruction.opcode == "while":
                    body = required_match(r"body=%?([\w.\-]+)", instruction.attributes)[1]
                    stack.append((body, times * self.trip_count(instruction)))
                elif instruction.opcode in ("call", "conditional", "async-start"):
                    stack += [(called, times) for called in instruction.called]

    def trip_count(self, loop: Instruction) -> int:
        """Returns how often a `while` runs: as XLA states, or the bound in its condition, since loops count from 0."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[required_match(r"condition=%?([\w.\-]+)", loop.attributes)[1]]
        bounds = [i.operands[0] for _, i in self.inside(condition) if i.opcode == "constant"]
        return max((int(bound) for bound in bounds if bound.isdigit()), default=1)

    def inside(self, computation: Computation) -> Iterator[tuple[Computation, Instruction]]:
        """Yields a computation's instructions, and those of the fusions in it, each with its own computation."""
        for instruction in computation.instructions.values():
            yield computation, instruction
            if instruction.opcode == "fusion":
                yield from self.inside(self.computations[instruction.called[0]])

    def hbm_traffic(self) -> dict[str, float]:
        """Returns the bytes that one device reads and writes in HBM, by operation of the traced program."""
        traffic = defaultdict(float)
        for computation, instruction, times in self.executed():
            traffic[instruction.op_name or instruction.opcode] += times * self.traffic(computation, instruction)
        return dict(traffic)

    def traffic(self, computation: Computation, instruction: Instruction) -> float:
        """Returns the bytes that one run of an instruction reads and writes in HBM."""
        if instruction.opcode in NO_TRAFFIC or instruction.opcode.endswith("-done"):
            return 0.0
        operands = [computation.instructions[name] for name in dict.fromkeys(instruction.operands)]
        if instruction.opcode in ("copy-start", "slice-start"):  # the result lists source and destination
            moved = min(array.bytes for array in instruction.arrays[:2])
            return moved * sum(array.in_hbm for array in instruction.arrays[:2])
        if instruction.opcode == "fusion":
            fused = self.computations[instruction.called[0]]
            read = sum(
                min(operand.hbm_bytes, self._read(fused, parameter))
                for operand, parameter in zip(
                    (computation.instructions[name] for name in instruction.operands), fused.parameters, strict=True
                )
            )
            return read + min(instruction.hbm_bytes, self._written(fused, fused.root))
        if instruction.opcode in SLICING:
            return 2 * instruction.hbm_bytes
        if instruction.opcode == "dynamic-update-slice":
            return 2 * operands[1].hbm_bytes
        read, written = sum(operand.hbm_bytes for operand in operands), instruction.hbm_bytes
        if instruction.lists_operands:
            written = max(0, written - read)
        elif instruction.is_library_call:
            written -= instruction.scratch_bytes
        return read + written

    def _read(self, computation: Computation, source: Instruction) -> float:
        """Returns the bytes of a fusion's parameter that are read; if only slices of it are used, only those."""
        total = 0.0
        for user in computation.users[source.name]:
            if user.opcode in SLICING and user.operands[0] == source.name:
                total += _size(user)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
                continue  # updated in place
            elif user.opcode == "bitcast":
                total += self._read(computation, user)
            elif user.opcode == "fusion":
                nested = self.computations[user.called[0]]
                total += self._read(nested, nested.parameters[user.operands.index(source.name)])
            else:
                return math.inf
        return total

    def _written(self, computation: Computation, name: str) -> float:
        """Returns the bytes of a fusion's result that are written; if a slice is updated in place, only that slice."""
        result = computation.instructions[name]
        if result.opcode == "dynamic-update-slice":
            return _size(computation.instructions[result.operands[1]])
        if result.opcode == "bitcast":
            return self._written(computation, result.operands[0])
        if result.opcode == "tuple":
            return sum(self._written(computation, operand) for operand in result.operands)
        if result.opcode == "fusion":
            nested = self.computations[result.called[0]]
            return self._written(nested, nested.root)
        return _size(result)

    def collectives(self) -> list[Collective]:
        """Returns all collective operations of the program."""
        found = []
        for computation, instruction, times in self.executed():
            inside = [instruction]
            hidden = instruction.opcode.endswith("-start") and '"is_sync":true' not in instruction.attributes
            if instruction.opcode == "fusion":
                computation = self.computations[instruction.called[0]]
                inside, hidden = list(computation.instructions.values()), True
                if not any('target="AsyncCollectiveStart"' in inner.attributes for inner in inside):
                    continue
            found += _collectives(computation, inside, times, hidden)
        return found


def _collectives(fused: Computation, inside: list[Instruction], times: int, hidden: bool) -> Iterator[Collective]:
    for instruction in inside:
        if (kind := instruction.opcode.removesuffix("-start")) in COLLECTIVES:
            operands = sum(_size(fused.instructions[name]) for name in instruction.operands)
            results = sum(array.bytes for array in instruction.arrays if array.shape)
            size = max(operands, results - operands if instruction.lists_operands else results)
            yield Collective(kind, _groups(instruction), size, times, instruction.op_name, hidden)


def required_match(pattern: str | re.Pattern, text: str) -> re.Match:
    """Returns the first match of `pattern`. Raises ValueError if there is none."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the text of the program has no {pattern} where one is expected: {text}")
    return match


def _size(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.arrays)


def _instruction(name: str, text: str) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode = OPCODE.match(text, end)
    if opcode is None:
        raise ValueError(f"{name} is followed by no operation: {text}")
    closing = _closing(text, opcode.end() - 1)
    inside = text[opcode.end() : closing]
    operands = [inside] if opcode[1] in ("parameter", "constant") else re.findall(r"%([\w.\-]+)", inside)
    return Instruction(name, opcode[1], _arrays(text[:end]), operands, text[closing + 1 :])


def _closing(text: str, start: int) -> int:
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    raise ValueError(f"unbalanced: {text[:200]}")


def _arrays(text: str) -> list[Array]:
    found = []
    for dtype, dims, layout in ARRAY.findall(text):
        shape = tuple(int(size) for size in dims.split(",") if size)
        space = re.search(r"S\((\d+)\)", layout)
        size = math.prod(_padded(shape, layout)) * BYTES.get(dtype, _width(dtype))
        found.append(Array(dtype, shape, space is None or space[1] == "0", math.ceil(size)))
    return found


def _width(dtype: str) -> float:
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 0


def _padded(shape: tuple[int, ...], layout: str) -> list[int]:
    """Returns a shape with its minor-most dimensions rounded up to the layout's first tile, such as T(8,128)."""
    order, _, tiling = layout.partition(":")
    tile = re.match(r"T\(([\d,]+)\)", tiling)
    sizes = list(shape)
    if not tile or not sizes or not order:
        return sizes
    minor_first = [int(i) for i in order.split(",")]
    for dimension, multiple in zip(minor_first, reversed([int(size) for size in tile[1].split(",")]), strict=False):
        sizes[dimension] = -(-sizes[dimension] // multiple) * multiple
    return sizes


def _groups(instruction: Instruction) -> tuple[tuple[int, ...], ...]:
    """Returns the groups of devices that take part together, as positions in the program's device order."""
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", instruction.attributes)
    if pairs:
        return tuple(tuple(map(int, pair.split(","))) for pair in re.findall(r"\{([\d,]+)\}", pairs[1]))
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", instruction.attributes)
    if listed:
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    iota = re.search(rf"replica_groups=\[\d+,(\d+)\]<={IOTA}", instruction.attributes)
    if iota:
        return _rows(_transposed(_integers(iota[2]), _integers(iota[3])), int(iota[1]))
    mesh = re.search(
        rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({IOTA}\))? \{{([^}}]*)\}}", instruction.attributes
    )
    if mesh:
        return _groups_of_mesh(dict(MESH_AXIS.findall(mesh[1])), mesh[2], mesh[3], mesh[4])
    if "replica_groups={}" not in instruction.attributes:
        raise ValueError(f"replica groups of an unknown form: {instruction.attributes}")
    return ()


def _groups_of_mesh(
    sizes: dict[str, str], shape: str | None, order: str | None, along: str
) -> tuple[tuple[int, ...], ...]:
    """Returns the groups of devices that differ only along some axes of a mesh, or along a factor of one.

    Args:
        sizes: the mesh's axes -> their sizes.
        shape: with `order`, the layout of the device ids (see `_transposed`); None: 0, 1, 2, ...
        order: the transposition of that layout.
        along: the axes; 'axis':(4)2 is the factor 2 of an axis of which 4 is the factor before it.
    """
    factors, taken = [], []  # the sizes of all axes and factors, major first; the positions among them of `along`
    parts = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in MESH_PART.findall(along)}
    for name, size in sizes.items():
        before, part = parts.get(name, (1, 1))
        if name in parts:
            taken.append(len(factors) + 1)
        factors += [before, part, int(size) // (before * part)]
    ids = _transposed(_integers(shape), _integers(order)) if shape else list(range(math.prod(factors)))
    others = [i for i in range(len(factors)) if i not in taken]
    positions = _transposed(factors, others + taken)
    return _rows([ids[i] for i in positions], math.prod(factors[i] for i in taken))


def _integers(text: str | None) -> list[int]:
    return [int(n) for n in text.split(",")] if text else []


def _rows(ids: list[int], size: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(ids[i : i + size]) for i in range(0, len(ids), size))


def _transposed(shape: list[int], order: list[int]) -> list[int]:
    """Returns 0, 1, 2, ... laid out as `shape`, transposed to `order` (empty: not transposed), read row by row."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    ids = [0]
    for axis in order or range(len(shape)):
        ids = [i + strides[axis] * j for i in ids for j in range(shape[axis])]
    return ids
