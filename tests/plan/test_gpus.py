"""Cards of GPUs, and those of this machine, for which devices stand in."""

from types import SimpleNamespace

import jax
import pytest
from support.compilers import needs_gpu_compiler

from ibq_jax.plan.gpus import GPUS, attached_gpus, gpu_devices


@pytest.mark.parametrize(("name", "float32"), [("a100", 19.5e12), ("h100", 67e12), ("h200", 67e12), ("b200", 74.4e12)])
def test_float32_peaks_follow_from_cores_and_clock(name, float32):
    assert GPUS[name].float32_flops == pytest.approx(float32, rel=0.01)  # the first three are on the vendor's pages


def test_products_take_as_many_passes_as_their_precision():
    gpu = GPUS["h100"]
    seconds = gpu.product_seconds({8: 1e12, 11: 1e12, 16: 1e12, 24: 1e12})
    assert seconds["tensor cores"] == pytest.approx((1 + 2 + 3) * 1e12 / 989e12)
    assert seconds["float32 units"] == pytest.approx(1e12 / 66.9e12, rel=0.001)


@needs_gpu_compiler
@pytest.mark.parametrize(
    ("topology", "nodes", "joined"),
    [("a100:8", 1, 8), ("h100:4", 1, 4), ("h100:2x4", 2, 4), ("b200:8x8", 8, 8), ("gb200:18x4", 18, 72)],
)
def test_a_topology_has_nodes_and_knows_which_gpus_nvlink_joins(topology, nodes, joined):
    gpu, devices = gpu_devices(topology)
    assert gpu.nvlink_gpus == joined and devices[0].device_kind == gpu.device_kind
    assert [device.id for device in devices] == list(range(len(devices)))
    assert [device.process_index for device in devices] == sorted(device.process_index for device in devices)
    assert len({device.process_index for device in devices}) == nodes


@pytest.mark.parametrize(
    ("kind", "cores", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 132, "h100"),
        ("NVIDIA H200", 132, "h200"),
        ("NVIDIA A100-SXM4-80GB", 108, "a100"),
        ("NVIDIA GB200", 152, "gb200"),
        ("NVIDIA A100-SXM4-40GB", 108, None),
        ("NVIDIA H100 PCIe", 114, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 16, None),
        ("NVIDIA GeForce RTX 4090", 128, None),
    ],
)
def test_a_card_of_this_machine_is_known_by_its_name_and_cores(kind, cores, name, monkeypatch):
    devices = [SimpleNamespace(device_kind=kind, core_count=cores)] * 4
    monkeypatch.setattr(jax, "local_devices", lambda backend: devices)
    gpu, found = attached_gpus()
    assert found == devices and (gpu and gpu.name) == name and (gpu is None or gpu.nvlink_gpus == 4)
