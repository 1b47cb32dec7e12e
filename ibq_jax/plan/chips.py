"""Peaks of TPU chips, and topologies of chips that are not present, for compiling ahead of time."""

import difflib
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from ibq_jax.base.errors import UsageError
from ibq_jax.plan.gpus import GPUS


@dataclass(frozen=True)
class Chip:
    """The peaks of one device, which is a TPU chip or a half of one. `source` is the page that states them.

    `flops_per_cycle` is what the matrix units do in a cycle; with the compiler's cycles of a large product it gives the
    clock at which that product takes as long as the peak says.
    """

    name: str
    flops: float  # bfloat16 operations per second
    flops_per_cycle: int
    hbm_bytes: float
    hbm_bytes_per_second: float
    ici_bytes_per_second: float  # to all neighbours together, in one direction
    source: str
    dimensions: int  # of the torus
    options: tuple[tuple[str, str], ...] = ()  # settings with which libtpu shows a chip as one device
    libtpu_name: str = ""  # where it is not `name`
    devices_per_chip: int = 1

    @property
    def clock(self) -> float:
        """Cycles per second."""
        return self.flops / self.flops_per_cycle

    @property
    def links(self) -> dict[str, float]:
        """Name of a link -> the bytes per second that leave a device through it."""
        return {"interconnect": self.ici_bytes_per_second}

    def product_seconds(self, flops_by_bits: Mapping[int, float]) -> dict[str, float]:
        """Returns the least seconds that products take, at the matrix units' peak in bfloat16."""
        return {"matrix units": sum(flops_by_bits.values()) / self.flops}


DOCUMENTATION = "https://docs.cloud.google.com/tpu/docs/"
MEGACORE = (("chip_config_name", "megacore"),)
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 2**18, 32 * 2**30, 1228e9, 300e9, DOCUMENTATION + "v4", 3, options=MEGACORE),
        Chip("v5e", 197e12, 2**17, 16 * 2**30, 819e9, 200e9, DOCUMENTATION + "v5e", 2),
        Chip("v5p", 459e12, 2**18, 95 * 2**30, 2765e9, 600e9, DOCUMENTATION + "v5p", 3),
        Chip("v6e", 918e12, 2**19, 32 * 2**30, 1640e9, 448e9, DOCUMENTATION + "v6e", 2),
        # The page states a chip's figures, 2307e12, 192 GiB, 7380e9 and 600e9; a device has half of each.
        Chip("v7x", 1153.5e12, 2**19, 96 * 2**30, 3690e9, 300e9, DOCUMENTATION + "tpu7x", 3, (), "tpu7x", 2),
    )
}
SHAPES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
}
# libtpu reads these when it loads: take no lock against other processes, do not query a cloud's metadata server.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
INSTALL = "VENV=.venv-tpu bash launch/setup.sh tpu"


def topology_devices(name: str, slices: int = 1) -> tuple[Chip, list[jax.Device]]:  # pyright: ignore[reportInvalidTypeForm]: JAX's is a variable
    """Returns the chip and the devices of a topology such as "v5e:16x16"; no TPU needs to be present.

    Args:
        name: the chip and the shape of a slice.
        slices: the number of such slices.

    Raises:
        UsageError: libtpu does not know the name (the message lists similar ones), or is not installed.
    """
    family, _, shape = name.partition(":")
    if family not in CHIPS:
        raise UsageError(
            f"topology {name!r}: there is no chip {family!r}; the chips are {', '.join(CHIPS)}, as in v5e:4x4, "
            f"and the GPUs {', '.join(GPUS)}, as in h100:8"
        )
    chip = CHIPS[family]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)" + f"{{{chip.dimensions - 1}}}", shape):
        raise UsageError(f"topology {name!r} is not a shape of {chip.dimensions} dimensions; {_near(chip, shape)}")
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(f"the TPU compiler (libtpu) is not installed here; {INSTALL} makes an environment with it")
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = dict(chip.options)
    if math.prod(map(int, shape.split("x"))) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    if slices > 1:
        options["num_slices"] = slices
    try:
        topology = topologies.get_topology_desc(f"{chip.libtpu_name or family}:{shape}", "tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"libtpu does not know the topology {name!r} ({reason}); {_near(chip, shape)}") from error
    return chip, list(topology.devices)


def _near(chip: Chip, shape: str) -> str:
    shapes = SHAPES[chip.dimensions]
    near = difflib.get_close_matches(shape, shapes, n=3, cutoff=0.1) or shapes
    return "similar ones: " + ", ".join(f"{chip.name}:{name}" for name in near)
