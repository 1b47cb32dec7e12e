"""Plans of a training step, read from its compiled program without the devices: memory, time bounds, collectives."""

import math
import re
import time
from collections import defaultdict
from dataclasses import dataclass

import jax
import numpy as np

from ibq_jax.base.sharding import platform
from ibq_jax.ops.exact_search import FOR_FEW
from ibq_jax.plan.chips import Chip
from ibq_jax.plan.clock import Clock, read_clock
from ibq_jax.plan.flops import flops_by_bits, loop_flops
from ibq_jax.plan.gpus import Gpu
from ibq_jax.plan.hlo import Collective, Module
from ibq_jax.plan.kernels import Kernels, read_kernels

SIZE = r"([\d.]+[KMGT]?)"
MEMORY_EXCEEDED = re.compile(rf"Used {SIZE} of {SIZE} hbm|\({SIZE}\) exceeds available HBM \({SIZE}\)")
NO_TILES = "Couldn't find output tile sizes"  # of a product as a Triton kernel; seen with jaxlib 0.10.2
BY_CUBLAS: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}
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
    link_bytes: float  # bytes that leave one device, through ICI or NVLink, if the neighbours form rings
    exposed_link_bytes: float  # those of collectives during which nothing else runs
    network_bytes: float  # bytes that leave one device for another node of GPUs

    def __str__(self) -> str:
        return f"{self.kind} over {self.axes}: {self.count} x, {self.bytes / 1e6:,.1f} MB"


@dataclass(frozen=True)
class Plan:
    """The needs of one run of a program on each of `devices`. Time bounds need a `chip` with known peaks."""

    devices: int
    memory: Memory
    flops_by_bits: dict[int, float]  # operations by the significant bits of the operands that a product multiplies
    hbm_bytes: float
    accessed_bytes: float | None  # XLA's own figure, which counts loops once and includes vector memory
    collectives: tuple[Traffic, ...]
    compile_seconds: float
    chip: Chip | Gpu | None
    # The compiler's own estimate, which leaves out loops over tokens that the search repeats; None where it makes none.
    clock: Clock | None
    kernels: tuple[Kernels, ...]  # empty except for GPUs

    @property
    def flops(self) -> float:
        """Operations of all matrix products and convolutions."""
        return sum(self.flops_by_bits.values())

    @property
    def expected_seconds(self) -> dict[str, float]:
        """The seconds per step that the compiler expects, by kind of operation; empty where it makes no estimate.

        Collectives that no other operation hides are counted at the links' peak, since the compiler estimates none.
        """
        if not isinstance(self.chip, Chip) or self.clock is None:
            return {}
        exposed = sum(traffic.exposed_link_bytes for traffic in self.collectives)
        return self.clock.seconds | {"collectives that nothing hides": exposed / self.chip.ici_bytes_per_second}

    @property
    def bounds(self) -> dict[str, float]:
        """The least seconds per step that each resource of the chip allows; empty without a chip."""
        if self.chip is None:
            return {}
        sent = (
            sum(traffic.link_bytes for traffic in self.collectives),
            sum(traffic.network_bytes for traffic in self.collectives),
        )
        return {
            **self.chip.product_seconds(self.flops_by_bits),
            "HBM": self.hbm_bytes / self.chip.hbm_bytes_per_second,
            **{link: size / speed for (link, speed), size in zip(self.chip.links.items(), sent, strict=False)},
        }


class DoesNotFit(RuntimeError):
    """A program for which the compiler needs more bytes (`needed`) than a chip's memory has (`capacity`)."""

    def __init__(self, needed: float, capacity: float):
        super().__init__(f"needs {needed / 2**30:.1f} GiB on a chip, which has {capacity / 2**30:.1f} GiB")
        self.needed, self.capacity = needed, capacity


def compile_plan(step, arguments: tuple, mesh: jax.sharding.Mesh, chip: Chip | Gpu | None) -> Plan:
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
        compiled = _compile(step.lower(*arguments))
    except jax.errors.JaxRuntimeError as error:
        exceeded = MEMORY_EXCEEDED.search(str(error))
        if not exceeded:
            raise
        raise DoesNotFit(*(_parse_size(size) for size in exceeded.groups() if size)) from error
    return read_plan(compiled, mesh, chip, time.monotonic() - start)


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a lowered program; where XLA gives up on its first choice of tiles for a product, with cuBLAS for all.

    On a card that is present it would try other tiles, and cuBLAS.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if NO_TILES not in str(error):
            raise
    return lowered.compile(compiler_options=BY_CUBLAS)


def read_plan(compiled, mesh: jax.sharding.Mesh, chip: Chip | Gpu | None, compile_seconds: float) -> Plan:
    """Reads the plan of a program from `compiled`, a jax.stages.Compiled for the devices of `mesh`."""
    module, cost, memory = Module(compiled.as_text()), compiled.cost_analysis(), compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    arguments_and_outputs = memory.argument_size_in_bytes + outputs
    on_gpus = platform(mesh) == "gpu"
    # XLA counts the operations of fused convolutions, too, but not on GPUs, and no loop more than once.
    flops = flops_by_bits(module, "gpu") if on_gpus else {8: cost["flops"] + loop_flops(module)}
    return Plan(
        devices=mesh.size,
        memory=Memory(
            arguments=memory.argument_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            peak=arguments_and_outputs + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        ),
        flops_by_bits=flops,
        hbm_bytes=sum(module.hbm_traffic().values()),
        accessed_bytes=None if on_gpus else cost["bytes accessed"],
        collectives=_by_axes(module.collectives(), mesh, chip.nvlink_gpus if isinstance(chip, Gpu) else math.inf),
        compile_seconds=compile_seconds,
        chip=chip,
        clock=read_clock(module, chip, without=FOR_FEW) if isinstance(chip, Chip) else None,
        kernels=read_kernels(module) if on_gpus else (),
    )


def _parse_size(text: str) -> float:
    return float(text.rstrip("KMGT")) * UNITS[text[-1] if text[-1] in UNITS else ""]


def _by_axes(collectives: list[Collective], mesh: jax.sharding.Mesh, joined: float) -> tuple[Traffic, ...]:
    """Adds up collectives of the same kind and axes; links join so many consecutive devices (`joined`)."""
    totals: dict[tuple[str, str], list] = defaultdict(lambda: [0, 0.0, 0.0, 0.0, 0.0])
    for collective in collectives:
        total = totals[collective.kind, _axes(collective, mesh)]
        moved = collective.times * collective.bytes
        by_links, by_network = _leaving(collective, mesh, joined)
        for column, number in enumerate(
            (
                collective.times,
                moved,
                moved * by_links,
                0 if collective.hidden else moved * by_links,
                moved * by_network,
            )
        ):
            total[column] += number
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


def _leaving(collective: Collective, mesh: jax.sharding.Mesh, joined: float) -> tuple[float, float]:
    """Returns how many times over a collective's bytes leave each device, through links and through the network.

    Its group forms rings. If links join only parts of the group, there are as many rings as devices in a part: each
    ring leaves a part at another of its devices, and goes through links inside.
    """
    ids = [device.id for device in mesh.devices.flat]
    parts = [[(ids[member] - min(ids)) // joined for member in group] for group in collective.groups]
    parts = parts or [[(number - min(ids)) // joined for number in ids]]
    if collective.kind == "collective-permute":
        crossing = [len(set(pair)) > 1 for pair in parts]
        return float(not all(crossing)), float(any(crossing))
    size = max(map(len, parts))
    inside = max(len(part) / len(set(part)) for part in parts)
    if collective.kind == "all-to-all":
        return (inside - 1) / size, (size - inside) / size
    share = (2 if collective.kind == "all-reduce" else 1) * (size - 1) / size
    if inside == size:
        return share, 0.0
    return share * (inside - 1) / inside, share / inside
