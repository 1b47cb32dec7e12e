"""XLA's options for training steps, by platform, and how a config changes them.

XLA's own defaults (jax 0.10.2) are right for the rest: on GPUs the latency-hiding scheduler runs without being asked
for, and of the bytes that a generator's step of 64 H100 sends, all but 3% are sent while something else runs.
docs/plans.md has what other options do to the compiled programs.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ibq_jax.base.errors import UsageError

Options = dict[str, bool | int | float | str]

OPTIONS: dict[str, Options] = {
    "tpu": {
        # With fewer than 8 images per chip, XLA cuts images into strips to get a larger batch. This copies every array
        # between convolutions, which costs ten times the memory traffic that it was meant to save.
        "xla_tpu_run_space_to_batch": False,
        "xla_tpu_run_space_to_batch_on_new_platforms": False,
    },
    "gpu": {
        # Two turns of a loop write to two buffers in turn, so that what a turn hands on is not copied: 3% fewer
        # launches in the generator's step and in the quantizer with 262,144 codes, in the same memory.
        "xla_gpu_enable_while_loop_double_buffering": True,
    },
}


def compiler_options(mesh: Mesh, changes: str = "") -> Options:
    """Returns the `compiler_options` of `jax.jit` for a training step on the devices of `mesh`.

    Args:
        mesh: the devices.
        changes: "NAME=VALUE,..." in place of, or besides, this module's.

    Raises:
        UsageError: a change is not of this form, or the platform's compiler has no such option or value.
    """
    options = dict(OPTIONS.get(mesh.devices.flat[0].platform, {}))
    if not changes:
        return options
    for change in changes.split(","):
        name, equals, value = (part.strip() for part in change.partition("="))
        if not (name and equals and value):
            raise UsageError(f"train.compiler_options has {change!r}, which is not NAME=VALUE")
        options[name.removeprefix("--")] = _parsed(value)
    try:
        shape = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
        jax.jit(lambda x: x + 1, compiler_options=options).lower(shape).compile()
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(f"train.compiler_options={changes!r}: {str(error).splitlines()[0]}") from error
    return options


def _parsed(value: str) -> bool | int | float | str:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
