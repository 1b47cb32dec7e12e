"""GPUs that are not present, for compiling ahead of time.

XLA's compiler for GPUs needs a description of the card (`GpuTargetConfigProto` in text form) and no GPU. Without one it
cannot try out alternatives on the card (autotuning), and takes the first that it would try.
"""

import importlib.util

import jax
from jax.experimental import topologies

from ibq_jax.base.errors import UsageError

INSTALL = "VENV=.venv-cuda bash launch/setup.sh tests cuda"
# NVIDIA H100 80 GB HBM3 (SXM), as in XLA's backends/gpu/target_config/specs and NVIDIA's H100 data sheet.
H100 = """
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3" device_vendor: "NVIDIA Corporation" cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
  device_memory_size: 84942979072 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def gpu_devices(count: int) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]: JAX's is a variable
    """Returns `count` H100 of one host, to compile for. Raises UsageError if XLA's GPU compiler is not installed."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise UsageError(f"the GPU compiler is not installed here; {INSTALL} makes an environment with it")
    topology = topologies.get_topology_desc("", "cuda", target_config=H100, topology=f"1x1x{count}")
    return list(topology.devices)
