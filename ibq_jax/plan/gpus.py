"""Peaks of NVIDIA's GPUs, and nodes of them that are not present, for compiling ahead of time.

XLA's compiler for GPUs needs a description of the card (`GpuTargetConfigProto` in text form) and no GPU. Without one it
cannot try out alternatives on the card (autotuning), and takes the first that it would try.
"""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
from jax.experimental import topologies

from ibq_jax.base.errors import UsageError

INSTALL = "VENV=.venv-cuda bash launch/setup.sh cuda"
HERE = "here"
TOPOLOGY = re.compile(r"(?:([1-9]\d*)x)?([1-9]\d*)")
FULL_FLOAT32, TF32, THREE_PASSES = 24, 11, 16  # significant bits of float32 operands that a product multiplies


@dataclass(frozen=True)
class Gpu:
    """The peaks of one card, from the page that `source` names, and what the compiler is told of it.

    The latter, from `device_kind` on, is from XLA's own descriptions (`compiler_source`). Rates of links are in one
    direction.
    """

    name: str
    flops: float  # bfloat16 operations per second, of dense matrices
    nvlink_bytes_per_second: float
    network_bytes_per_second: float  # a GPU's part of its node's network, in the vendor's own node
    nvlink_gpus: int  # how many consecutive GPUs NVLink joins; a node has at most so many
    source: str
    device_kind: str  # as the driver names it
    hbm_bytes: float
    hbm_bytes_per_second: float
    compute_capability: int
    cores: int
    float32_per_core: int  # float32 units
    clock_ghz: float
    l2_bytes: int
    shared_bytes_per_core: int
    shared_bytes_per_block: int

    devices_per_chip = 1
    compiler_source = "https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs"

    @property
    def float32_flops(self) -> float:
        """Float32 operations per second outside of the tensor cores."""
        return 2e9 * self.cores * self.float32_per_core * self.clock_ghz

    @property
    def links(self) -> dict[str, float]:
        """Name of a link -> the bytes per second that leave a GPU through it."""
        return {"NVLink": self.nvlink_bytes_per_second, "network": self.network_bytes_per_second}

    def product_seconds(self, flops_by_bits: Mapping[int, float]) -> dict[str, float]:
        """Returns the least seconds that products take, by unit; by the significant bits that they multiply."""
        passes = {THREE_PASSES: 3, TF32: 2}  # TF32 runs at half the speed of bfloat16
        tensor = sum(passes.get(bits, 1) * flops for bits, flops in flops_by_bits.items() if bits < FULL_FLOAT32)
        full = sum(flops for bits, flops in flops_by_bits.items() if bits >= FULL_FLOAT32)
        return {"tensor cores": tensor / self.flops, "float32 units": full / self.float32_flops}

    def description(self) -> str:
        """Returns what the compiler is told: a `GpuTargetConfigProto` as text."""
        features = "ACCELERATED_FEATURES" if self.compute_capability >= 9 else "NONE"
        return f"""
gpu_device_info {{
  name: "{self.device_kind}" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {self.compute_capability} feature_extension: {features} }}
  core_count: {self.cores} fpus_per_core: {self.float32_per_core} clock_rate_ghz: {self.clock_ghz} threads_per_warp: 32
  device_memory_size: {self.hbm_bytes:.0f} memory_bandwidth: {self.hbm_bytes_per_second:.0f}
  l2_cache_size: {self.l2_bytes}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {self.shared_bytes_per_block}
  shared_memory_per_core: {self.shared_bytes_per_core}
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.device_kind}"
"""


LARGEST_NODE = 8  # GPUs; NVLink that joins more goes through several nodes
OTHER_FORMS = {"pcie", "nvl", "40gb", "mig"}  # words in the names of cards that are slower than those in GPUS
PAGES = "https://www.nvidia.com/en-us/data-center/"
# The pages state bfloat16 with sparsity where they say so, twice the speed of dense matrices, and NVLink in both
# directions together. The network is that of the vendor's own node: a port of 200 or 400 Gb/s for each GPU.
H100 = Gpu(
    name="h100",
    source=PAGES + "h100/",
    flops=989e12,
    nvlink_bytes_per_second=450e9,
    network_bytes_per_second=50e9,
    nvlink_gpus=8,
    device_kind="NVIDIA H100 80GB HBM3",
    hbm_bytes=84942979072,
    hbm_bytes_per_second=3352.32e9,
    compute_capability=9,
    cores=132,
    float32_per_core=128,
    clock_ghz=1.98,
    l2_bytes=52428800,
    shared_bytes_per_core=233472,
    shared_bytes_per_block=232448,
)
H200 = replace(
    H100,
    name="h200",
    source=PAGES + "h200/",
    device_kind="NVIDIA H200 141GB HBM3e",
    hbm_bytes=151397597184,
    hbm_bytes_per_second=4800e9,
)
A100 = replace(
    H100,
    name="a100",
    source=PAGES + "a100/",
    flops=312e12,
    nvlink_bytes_per_second=300e9,
    network_bytes_per_second=25e9,
    device_kind="NVIDIA A100-SXM4-80GB",
    hbm_bytes=85100068864,
    hbm_bytes_per_second=2039.04e9,
    compute_capability=8,
    cores=108,
    float32_per_core=64,
    clock_ghz=1.41,
    l2_bytes=41943040,
    shared_bytes_per_core=167936,
    shared_bytes_per_block=166912,
)
B200 = replace(
    H100,
    name="b200",
    source=PAGES + "hgx/",
    flops=2250e12,
    nvlink_bytes_per_second=900e9,
    device_kind="NVIDIA B200",
    hbm_bytes=191514411008,
    hbm_bytes_per_second=7672.32e9,
    compute_capability=10,
    cores=148,
    clock_ghz=1.965,
    l2_bytes=132644864,
)
GB200 = replace(
    B200,
    name="gb200",
    source=PAGES + "gb200-nvl72/",
    flops=2500e12,
    nvlink_gpus=72,
    device_kind="NVIDIA GB200",
    hbm_bytes=197897748480,
    hbm_bytes_per_second=7928.064e9,
    cores=152,
    clock_ghz=2.062,
    l2_bytes=135528448,
)
GPUS = {gpu.name: gpu for gpu in (A100, H100, H200, B200, GB200)}


def gpu_devices(topology: str) -> tuple[Gpu, list[jax.Device]]:  # pyright: ignore[reportInvalidTypeForm]: JAX's is a variable
    """Returns the card and the devices of a topology such as "h100:8" or "h100:4x8", nodes by GPUs of a node.

    `nvlink_gpus` of the returned card fits the topology: the GPUs of a node, or of as many whole nodes as NVLink joins.

    Raises:
        UsageError: the topology is none, or XLA's compiler for GPUs is not installed.
    """
    family, _, shape = topology.partition(":")
    gpu, found = GPUS[family], TOPOLOGY.fullmatch(shape)
    if not found:
        raise UsageError(
            f"topology {topology!r} is not a number of GPUs, as in {family}:8, or of nodes and GPUs a node, "
            f"as in {family}:4x8"
        )
    nodes, size = int(found[1] or 1), int(found[2])
    if size > gpu.nvlink_gpus:
        raise UsageError(f"topology {topology!r}: a node has at most {gpu.nvlink_gpus} GPUs, as in {family}:4x8")
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise UsageError(f"the GPU compiler is not installed here; {INSTALL} makes an environment with it")
    described = topologies.get_topology_desc("", "cuda", target_config=gpu.description(), topology=f"1x{nodes}x{size}")
    joined = max(1, gpu.nvlink_gpus // size) * size if gpu.nvlink_gpus > LARGEST_NODE else size
    return replace(gpu, nvlink_gpus=joined), list(described.devices)


def attached_gpus() -> tuple[Gpu | None, list[jax.Device]]:  # pyright: ignore[reportInvalidTypeForm]: JAX's is a variable
    """Returns this machine's GPUs, and what card they are; None for one whose peaks are not in `GPUS`.

    Raises UsageError if JAX finds no GPU.
    """
    try:
        devices = jax.local_devices(backend="gpu")
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"JAX finds no GPU here ({reason}); --topology=h100:8 plans for GPUs that are not here, and on a machine "
            f"with GPUs {INSTALL} makes an environment that finds them"
        ) from error
    words = set(re.findall(r"[a-z0-9]+", devices[0].device_kind.lower()))
    cores = getattr(devices[0], "core_count", None)
    known = [gpu for gpu in GPUS.values() if gpu.name in words and not words & OTHER_FORMS and gpu.cores == cores]
    return (replace(known[0], nvlink_gpus=len(devices)) if known else None), devices


def check_nodes(mesh: jax.sharding.Mesh) -> None:
    """Raises UsageError unless the mesh axis `data` alone spans nodes, as a mesh of real GPUs requires.

    JAX takes each node of GPUs for a slice (`base.sharding.make_mesh`), except when the devices are not present.
    """
    nodes = len({device.process_index for device in mesh.devices.flat})
    if mesh.shape["data"] % nodes:
        raise UsageError(
            f"the devices are {nodes} nodes, and only the axis 'data' can span nodes, because the network between them "
            f"is slow; its size, {mesh.shape['data']}, has to be a multiple of {nodes}"
        )
