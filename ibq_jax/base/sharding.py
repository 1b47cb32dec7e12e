"""The mesh, and where every array lies on it. Sharding is stated here and nowhere else.

Three axes: `data` (examples only), `fsdp` (examples, and the large matrices with their optimizer state) and `codebook`
(examples, and rows, of the tokenizer's codebook or the generator's vocabulary, with their optimizer state and average).
A batch lies on all three.

Parameters carry logical axis names (`flax.linen.with_logical_partitioning`); RULES maps those to mesh axes.
"""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ibq_jax.base import processes
from ibq_jax.base.errors import UsageError

DATA, FSDP, CODEBOOK = "data", "fsdp", "codebook"
AXES = (DATA, FSDP, CODEBOOK)

RULES = {
    "codes": CODEBOOK,
    "code_dim": None,
    "conv_in": None,
    "conv_out": FSDP,
    "vocabulary": CODEBOOK,
    "width": FSDP,
    "layers": None,
    "heads": None,
    "hidden": None,
    "modulation": None,
    "norm": None,
    "classes": None,
}


def make_mesh(sizes: Mapping[str, int], devices: list | None = None) -> Mesh:
    """A mesh of `devices` (all of the job's by default); an axis of size -1 takes what the others leave.

    Inside a TPU slice it follows the chips' wiring; several slices share the axis `data`. Elsewhere devices are in the
    order of the processes, so that the last axes stay inside a host where they fit it. Axes are Auto: the partitioner
    places what no annotation places, which Linen's logical names rely on.
    Raises UsageError when the sizes do not multiply to the device count, or do not fit the slices.
    """
    devices = jax.devices() if devices is None else devices
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise UsageError(f"mesh axis {unknown[0]!r} does not exist; the axes are {', '.join(AXES)}")
    shape = [sizes.get(axis, 1) for axis in AXES]
    asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UsageError(f"mesh {asked}: sizes are positive, and at most one is -1 (whatever is left)")
    fixed = int(np.prod([size for size in shape if size != -1]))
    if len(devices) % fixed or (-1 not in shape and fixed != len(devices)):
        raise UsageError(f"mesh {asked} does not fit {len(devices)} devices; the product must equal the device count")
    shape = tuple(len(devices) // fixed if size == -1 else size for size in shape)
    axis_types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)
    if shape[0] % slices:
        raise UsageError(
            f"mesh {asked}: the devices are {slices} slices, between which only the axis {DATA!r} can lie, since the "
            f"network there is slow; its size has to be a multiple of {slices}, so that fsdp and codebook fit a slice"
        )
    inside, between = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, between, devices), AXES, axis_types=axis_types)


def describe_mesh(mesh: Mesh) -> str:
    """The devices, and which axes of the mesh stay inside a process: one line."""
    processes = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    count = len(np.unique(processes))
    words = []
    for number, (axis, size) in enumerate(mesh.shape.items()):
        lines = np.moveaxis(processes, number, -1).reshape(-1, size)
        spanned = max(len(np.unique(line)) for line in lines)
        where = "" if count == 1 or size == 1 else f" (over {spanned} processes)" if spanned > 1 else " (in a process)"
        words.append(f"{axis}={size}{where}")
    kind = mesh.devices.flat[0].device_kind
    return f"{count} processes, {mesh.size} devices ({kind}), {mesh.size // count} each; mesh {', '.join(words)}"


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """For `jax.jit(..., compiler_options=)` of a training step on the devices of `mesh`.

    With fewer than 8 images a chip, XLA for TPUs cuts images into strips, to have more of them; the copies that this
    takes, of every array between convolutions, cost ten times the memory traffic that they were meant to save.
    """
    if mesh.devices.flat[0].platform != "tpu":
        return {}
    return {"xla_tpu_run_space_to_batch": False, "xla_tpu_run_space_to_batch_on_new_platforms": False}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading dimension over every mesh axis."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def partition_spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The spec of one array of logical axes `names`.

    An `fsdp` dimension that the axis does not divide stays whole (it only saves memory). A `codebook` dimension that
    the axis does not divide, a name without a rule, or two dimensions on one mesh axis raise UsageError.
    """
    spec = []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in RULES:
            raise UsageError(f"logical axis {name!r} has no sharding rule; the rules are for {', '.join(RULES)}")
        axis = None if name is None else RULES[name]
        if axis is not None and size % mesh.shape[axis]:
            if axis == CODEBOOK:
                what = f"codebook of {size} codes" if name == "codes" else f"{name} of {size}"
                raise UsageError(f"{what} does not divide over {mesh.shape[axis]} devices of mesh axis '{axis}'")
            axis = None
        if axis is not None and axis in spec:
            raise UsageError(f"logical axes {names}: two dimensions fall on the mesh axis {axis!r}")
        spec.append(axis)
    return PartitionSpec(*spec)


def abstract_state(create: Callable, mesh: Mesh, *args):
    """Shapes and shardings of what `create(*args)` would return, without computing it.

    Returns (shapes, shardings): two pytrees of the unboxed structure, of jax.ShapeDtypeStruct (each with its sharding)
    and of NamedSharding. Leaves that carry logical names follow RULES; all others are replicated.
    """
    boxed = jax.eval_shape(create, *args)

    def place(leaf) -> NamedSharding:
        if isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, partition_spec(leaf.names, leaf.value.shape, mesh))
        return replicated(mesh)

    shardings = jax.tree.map(place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        shardings,
    )
    return shapes, shardings


def create_sharded(create: Callable, mesh: Mesh, *args):
    """`create(*args)`, every array born where it belongs."""
    _, shardings = abstract_state(create, mesh, *args)
    return processes.jit(lambda *a: nn.meta.unbox(create(*a)), mesh, out_shardings=shardings)(*args)


def jit_step(step: Callable, create_state: Callable, mesh: Mesh, argument_shardings: tuple[NamedSharding, ...]):
    """`step(state, *arguments)` -> (state, metrics), compiled for `mesh`: the state as `create_state` lays it out, and
    donated; metrics on every device."""
    _, shardings = abstract_state(create_state, mesh, 0)
    return processes.jit(
        step,
        mesh,
        in_shardings=(shardings, *argument_shardings),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Each process's rows [b, ...], those of `process_rows`, -> global arrays [B, ...] on all mesh axes."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which of the B rows of a batch lie on this process's devices, in the order that `global_batch` takes them.

    On a TPU pod they need not be neighbours: the mesh follows the chips' wiring, not the hosts.
    """
    mine = [place for place, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
    return np.arange(batch_size).reshape(mesh.size, -1)[mine].reshape(-1)


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """All of a global array, in every process, which all call it."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def check_batch(batch_size: int, mesh: Mesh, accumulate: int, what: str) -> None:
    """Raises UsageError unless `accumulate` micro-batches of `batch_size` divide over all devices."""
    parts = mesh.size * accumulate
    if batch_size % parts:
        times = f" times {accumulate} micro-batches" if accumulate > 1 else ""
        near = max(1, round(batch_size / parts)) * parts
        raise UsageError(
            f"{what}={batch_size} does not divide over {mesh.size} devices{times}; "
            f"use a multiple of {parts}, such as {near}"
        )
