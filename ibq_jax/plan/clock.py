"""The time that XLA's compiler for TPUs expects of a compiled program.

The compiler writes the cycles that it expects next to most operations that run. Here they are added up, each as often
as it runs. The sum is an estimate and not a measurement: operations that overlap are counted one after another, and
loops whose length only the data tell count once. Collectives have no such figure; those that nothing hides count with
the time that the links' peak allows. Kernels written by hand have none either and are counted as `unknown`.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

from ibq_jax.plan.chips import Chip
from ibq_jax.plan.hlo import Instruction, Module

CYCLES = re.compile(r'estimated_cycles":"(\d+)"')
PRODUCTS, OTHERS, COPIES = "matrix products", "other operations", "copies"
COPYING = ("copy", "transpose", "reshape", "slice", "concatenate", "pad", "dynamic-slice", "dynamic-update-slice")
KERNEL = 'custom_call_target="tpu_custom_call"'
# A place in the traced program has these next to the names of functions and modules.
WRAPPED = re.compile(r"^\w+\((.*)\)$")
BACKWARD = "transpose("
BETWEEN = ("while", "body", "cond", "closed_call", "shard_map", "branch_0_fun", "branch_1_fun", "checkpoint")


@dataclass(frozen=True)
class Operations:
    """All operations of one kind that come from one place in the traced program: how often they run, and how long."""

    place: str
    kind: str
    times: int
    seconds: float


@dataclass(frozen=True)
class Clock:
    """The time that the compiler expects of one run of a program, by kind of operation and by place."""

    seconds: dict[str, float]
    operations: tuple[Operations, ...]  # the longest first
    unknown: int  # how many kernels run of which nothing is known
    left_out: float = 0.0  # seconds of the operations that were not to be counted

    @property
    def total(self) -> float:
        """Seconds of all operations, one after another."""
        return sum(self.seconds.values())


def read_clock(module: Module, chip: Chip, without: str = "") -> Clock | None:
    """Adds up the compiler's expected cycles; returns None if the text has none, as for CPUs and GPUs.

    Args:
        module: a program compiled for the chip.
        chip: its clock turns cycles into seconds.
        without: operations are left out whose place in the traced program contains this text, if it is not empty.
    """
    groups: dict[tuple[str, str], list] = defaultdict(lambda: [0, 0.0])
    unknown, left_out = 0, 0.0
    for _, instruction, times in module.executed():
        found = CYCLES.search(instruction.attributes)
        if without and without in instruction.op_name:
            left_out += times * int(found[1]) / chip.clock if found else 0.0
            continue
        unknown += times * (found is None and KERNEL in instruction.attributes)
        if found:
            group = groups[place(instruction.op_name) or instruction.opcode, _kind(module, instruction)]
            group[0] += times
            group[1] += times * int(found[1]) / chip.clock
    if not groups:
        return None
    operations = [Operations(where, kind, *numbers) for (where, kind), numbers in groups.items()]
    operations.sort(key=lambda group: -group.seconds)
    seconds: dict[str, float] = dict.fromkeys((PRODUCTS, OTHERS, COPIES), 0.0)
    for group in operations:
        seconds[group.kind] += group.seconds
    return Clock(seconds, tuple(operations), unknown, left_out)


def place(op_name: str) -> str:
    """Returns an operation's place in the model, as the modules' names, with "(backward)" for a gradient's.

    >>> place("jit(step)/transpose(jvp(Model))/Model.decode/up/conv1/conv_general_dilated")
    'Model/up/conv1/conv_general_dilated (backward)'
    """
    parts = [""]
    for part in op_name.split("/"):
        if part.startswith("jit(") or part in BETWEEN:
            continue
        while inner := WRAPPED.match(part):
            part = inner[1]
        part = part.partition(".")[0]  # without the name of a module's method
        if part != parts[-1]:
            parts.append(part)
    return "/".join(parts[1:]) + (" (backward)" if BACKWARD in op_name else "")


def _kind(module: Module, instruction: Instruction) -> str:
    opcodes = _opcodes(module, instruction)
    if opcodes & {"convolution", "dot"}:
        return PRODUCTS
    return COPIES if opcodes <= {*COPYING, "bitcast", "parameter", "constant"} else OTHERS


def _opcodes(module: Module, instruction: Instruction) -> set[str]:
    if instruction.opcode != "fusion":
        return {instruction.opcode}
    fused = module.computations[instruction.called[0]].instructions.values()
    return set().union(*(_opcodes(module, inner) for inner in fused))
