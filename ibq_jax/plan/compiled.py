"""Plans of a training step, read from its compiled program without the devices: memory, time bounds, collectives."""

import re
import time
from collections import defaultdict
from dataclasses import dataclass

import jax
import numpy as np

from ibq_jax.plan.chips import Chip
from ibq_jax.plan.clock import Clock, read_clock
from ibq_jax.plan.hlo import Collective, Module

SIZE = r"([\d.]+[KMGT]?)"
MEMORY_EXCEEDED = re.compile(rf"Used {SIZE} of {SIZE} hbm|\({SIZE}\) exceeds available HBM \({SIZE}\)")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """The memory that a step needs on one device, in bytes."""

    arguments: int
    temporaries: int
    peak: int

    def spare(self, capacity: float) -> float:
        """Returns the fraction of `capacity` that stays free; negative if the step does not fit."""
        return 1 - self.peak / capacity


@dataclass(frozen=True)
class Traffic:
    """All collectives of one kind over the same mesh axes in one step: how often they run, and bytes on one device."""

    kind: str
    axes: str
    count: int
    bytes: float
    ici_bytes: float  # bytes that leave one device if the neighbours form rings
    exposed_ici_bytes: float  # those of collectives during which nothing else runs

    def __str__(self) -> str:
        return f"{self.kind} over {self.axes}: {self.count} x, {self.bytes / 1e6:,.1f} MB"


@dataclass(frozen=True)
class Plan:
    """The needs of one training step on each of `devices`. Time bounds need a `chip` with known peaks."""

    devices: int
    memory: Memory
    flops: float
    hbm_bytes: float
    accessed_bytes: float  # XLA's own figure, which counts loops once and includes vector memory
    collectives: tuple[Traffic, ...]
    compile_seconds: float
    chip: Chip | None
    clock: Clock | None  # the compiler's own estimate; None where it makes none

    @property
    def expected_seconds(self) -> dict[str, float]:
        """The seconds per step that the compiler expects, by kind of operation; empty where it makes no estimate.

        Collectives that no other operation hides are counted at the links' peak, since the compiler estimates none.
        """
        if self.chip is None or self.clock is None:
            return {}
        exposed = sum(traffic.exposed_ici_bytes for traffic in self.collectives)
        return self.clock.seconds | {"collectives that nothing hides": exposed / self.chip.ici_bytes_per_second}

    @property
    def bounds(self) -> dict[str, float]:
        """The least seconds per step that each resource of the chip allows; empty without a chip."""
        if self.chip is None:
            return {}
        ici = sum(traffic.ici_bytes for traffic in self.collectives)
        return {
            "matrix units": self.flops / self.chip.flops,
            "HBM": self.hbm_bytes / self.chip.hbm_bytes_per_second,
            "interconnect": ici / self.chip.ici_bytes_per_second,
        }


class DoesNotFit(RuntimeError):
    """A program for which the compiler needs more bytes (`needed`) than a chip's memory has (`capacity`)."""

    def __init__(self, needed: float, capacity: float):
        super().__init__(f"needs {needed / 2**30:.1f} GiB on a chip, which has {capacity / 2**30:.1f} GiB")
        self.needed, self.capacity = needed, capacity


def compile_plan(step, arguments: tuple, mesh: jax.sharding.Mesh, chip: Chip | None) -> Plan:
    """Compiles a step for the devices of `mesh`, and reads its plan from the compiled program.

    Args:
        step: a function made by `jax.jit`.
        arguments: its abstract arguments, with shardings on `mesh`.
        mesh: the devices, which need not be present.
        chip: the devices' peaks, if they are known.

    Raises:
        DoesNotFit: the program does not fit into the devices' memory.
    """
    start = time.monotonic()
    try:
        compiled = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        exceeded = MEMORY_EXCEEDED.search(str(error))
        if not exceeded:
            raise
        raise DoesNotFit(*(_parse_size(size) for size in exceeded.groups() if size)) from error
    seconds = time.monotonic() - start
    module, cost, memory = Module(compiled.as_text()), compiled.cost_analysis(), compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    arguments_and_outputs = memory.argument_size_in_bytes + outputs
    return Plan(
        devices=mesh.size,
        memory=Memory(
            arguments=memory.argument_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            peak=arguments_and_outputs + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        ),
        flops=cost["flops"] + module.loop_flops(),
        hbm_bytes=sum(module.hbm_traffic().values()),
        accessed_bytes=cost["bytes accessed"],
        collectives=_by_axes(module.collectives(), mesh),
        compile_seconds=seconds,
        chip=chip,
        clock=read_clock(module, chip) if chip else None,
    )


def _parse_size(text: str) -> float:
    return float(text.rstrip("KMGT")) * UNITS[text[-1] if text[-1] in UNITS else ""]


def _by_axes(collectives: list[Collective], mesh: jax.sharding.Mesh) -> tuple[Traffic, ...]:
    totals: dict[tuple[str, str], list] = defaultdict(lambda: [0, 0.0, 0.0, 0.0])
    for collective in collectives:
        total = totals[collective.kind, _axes(collective, mesh)]
        total[0] += collective.times
        total[1] += collective.times * collective.bytes
        leaving = collective.times * collective.bytes * _ring_share(collective, mesh)
        total[2] += leaving
        total[3] += 0.0 if collective.hidden else leaving
    rows = [Traffic(kind, axes, *numbers) for (kind, axes), numbers in totals.items()]
    return tuple(sorted(rows, key=lambda row: -row.bytes))


def _axes(collective: Collective, mesh: jax.sharding.Mesh) -> str:
    """Returns the mesh axes along which the members of a group differ, as text."""
    sizes = list(mesh.shape.values())
    groups = collective.groups or (tuple(range(mesh.size)),)
    positions = np.stack(np.unravel_index([device for group in groups for device in group], sizes))
    by_group = np.split(positions, np.cumsum([len(group) for group in groups])[:-1], axis=1)
    differ = np.any([np.ptp(members, axis=1) > 0 for members in by_group], axis=0)
    return ", ".join(np.array(mesh.axis_names)[differ]) or "itself"


def _ring_share(collective: Collective, mesh: jax.sharding.Mesh) -> float:
    """Returns how many times over a collective's bytes leave each device if its group forms a ring."""
    if collective.kind == "collective-permute":
        return 1.0
    size = max(map(len, collective.groups), default=mesh.size)
    return (2 if collective.kind == "all-reduce" else 1) * (size - 1) / size
