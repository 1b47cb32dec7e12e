"""XLA's options: what a config may change, and one line for what the compiler does not know."""

from types import SimpleNamespace
from typing import Any

import pytest

from ibq_jax.base.compiler import OPTIONS, compiler_options
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import make_mesh


@pytest.mark.parametrize("platform", ["tpu", "gpu", "cpu"])
def test_a_platform_has_its_own_options(platform):
    device = SimpleNamespace(platform=platform)  # one that is not here; nothing else is asked of it
    mesh: Any = SimpleNamespace(devices=SimpleNamespace(flat=[device]))
    options = compiler_options(mesh)
    assert options == OPTIONS.get(platform, {})
    assert all(name.startswith(f"xla_{platform}_") for name in options)


def test_a_config_changes_and_adds_options(monkeypatch):
    mesh = make_mesh({"data": 8})
    monkeypatch.setitem(OPTIONS, "cpu", {"xla_cpu_enable_fast_math": True, "xla_cpu_enable_fast_min_max": False})
    changes = "xla_cpu_enable_fast_math=false, --xla_backend_optimization_level=1,xla_gpu_cuda_data_dir=nowhere"
    options = compiler_options(mesh, changes)
    assert options == {
        "xla_cpu_enable_fast_math": False,
        "xla_cpu_enable_fast_min_max": False,
        "xla_backend_optimization_level": 1,
        "xla_gpu_cuda_data_dir": "nowhere",
    }
    assert OPTIONS["cpu"]["xla_cpu_enable_fast_math"]  # unchanged for others


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            "xla_cpu_no_such_thing=true",
            r"^train.compiler_options='xla_cpu_no_such_thing=true': .*xla_cpu_no_such_thing",
        ),
        ("xla_backend_optimization_level=high", r"^train.compiler_options='xla_backend_optimization_level=high': "),
        ("xla_cpu_enable_fast_math", "train.compiler_options has 'xla_cpu_enable_fast_math', which is not NAME=VALUE"),
        ("a=1,", "train.compiler_options has '', which is not NAME=VALUE"),
    ],
)
def test_what_the_compiler_does_not_know_is_one_line(changes, message):
    with pytest.raises(UsageError, match=message) as error:
        compiler_options(make_mesh({"data": 8}), changes)
    assert "\n" not in str(error.value)
