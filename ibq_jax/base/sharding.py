"""The mesh, the placement of every array on it, and `jax.jit` with that placement.

Where an array lies is decided here. Elsewhere, only `ops/` (inside its shard_maps) and micro-batches name mesh axes.

The mesh has three axes, and a batch is split over all of them:

    data      splits only the batch
    fsdp      also splits the large matrices and their optimizer state
    codebook  also splits the rows of the tokenizer's codebook or of the generator's vocabulary, their optimizer state
              and their average

Parameters carry logical axis names (`flax.linen.with_logical_partitioning`); RULES maps those to mesh axes. That is
where a model computes with them. Between steps a training state is spread further, over all devices (`spread`): each
keeps and updates its part of parameters, moments and averages, and a step gathers the weights that it computes with,
as in ZeRO (arXiv 1910.02054, section 5).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ibq_jax.base.batched_draws import draw_together
from ibq_jax.base.compiler import compiler_options
from ibq_jax.base.errors import UsageError
from ibq_jax.base.processes import barrier, joined

DATA, FSDP, CODEBOOK = "data", "fsdp", "codebook"
AXES = (DATA, FSDP, CODEBOOK)
SMALLEST_SPREAD = 2**14  # elements
VECTOR_WIDTH = 128  # numbers that a TPU computes at once along an array's last dimension

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


def platform(mesh: Mesh | None) -> str:
    """Returns the platform of the mesh's devices, or without a mesh that of JAX's default device: cpu, tpu, gpu."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def make_mesh(sizes: Mapping[str, int], devices: list | None = None) -> Mesh:
    """Returns a mesh of `devices` (default: all devices of the job).

    Inside a TPU slice the mesh follows the chips' wiring; several slices are joined along the axis `data`. Elsewhere
    devices are in the order of the processes, so that the last axes stay inside a host if they fit into one. The axes
    are of type Auto: the partitioner places what no annotation places, which Linen's logical names rely on.

    Args:
        sizes: axis -> size. Axes left out have size 1; one size may be -1, which uses all remaining devices.
        devices: the devices of the mesh.

    Raises:
        UsageError: the sizes do not multiply to the device count, or do not fit the slices.
    """
    devices = jax.devices() if devices is None else devices
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise UsageError(f"mesh axis {unknown[0]!r} does not exist; the axes are {', '.join(AXES)}")
    shape = [sizes.get(axis, 1) for axis in AXES]
    asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UsageError(f"mesh {asked}: sizes are positive, and at most one is -1 (all remaining devices)")
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
            f"mesh {asked}: the devices are {slices} slices, and only the axis {DATA!r} can span slices, because the "
            f"network between them is slow; its size has to be a multiple of {slices}, so that fsdp and codebook fit "
            "into a slice"
        )
    inside, between = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, between, devices), AXES, axis_types=axis_types)


def describe_mesh(mesh: Mesh) -> str:
    """Returns one line about the devices, and about which axes of the mesh stay inside a process."""
    owners = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    count = len(np.unique(owners))
    words = []
    for number, (axis, size) in enumerate(mesh.shape.items()):
        lines = np.moveaxis(owners, number, -1).reshape(-1, size)
        spanned = max(len(np.unique(line)) for line in lines)
        where = "" if count == 1 or size == 1 else f" (over {spanned} processes)" if spanned > 1 else " (in a process)"
        words.append(f"{axis}={size}{where}")
    kind = mesh.devices.flat[0].device_kind
    return f"{count} processes, {mesh.size} devices ({kind}), {mesh.size // count} each; mesh {', '.join(words)}"


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the leading dimension over all mesh axes."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def partition_spec(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Returns the partition spec of an array by the logical names of its dimensions (None: not split).

    A dimension on the axis `fsdp` that the axis does not divide is not split, since that axis only saves memory.

    Raises:
        UsageError: the axis `codebook` does not divide a dimension, a name has no rule, or two dimensions fall on the
            same mesh axis.
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


def spread(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Returns a partition spec that also splits an array over the mesh axes that `spec` leaves, if a dimension divides.

    The last dimension but one is tried first, and the last one last, because an accelerator computes along it. Vectors,
    and arrays of less than `SMALLEST_SPREAD` elements, are not worth a message.
    """
    left = tuple(axis for axis in AXES if axis not in spec and mesh.shape[axis] > 1)
    parts = int(np.prod([mesh.shape[axis] for axis in left]))
    if parts == 1 or len(shape) < 2 or np.prod(shape) < SMALLEST_SPREAD:
        return spec
    axes = list(spec)
    for number in (*reversed(range(len(shape) - 1)), len(shape) - 1):
        taken = axes[number]
        size = shape[number] // (mesh.shape[taken] if taken else 1)
        if size % parts == 0 and (number < len(shape) - 1 or size // parts >= VECTOR_WIDTH):
            axes[number] = (taken, *left) if taken else left
            return PartitionSpec(*axes)
    return spec


def abstract_state(create: Callable, mesh: Mesh, *args, spread_out: bool = True):
    """Returns the shapes and shardings of what `create(*args)` would return, without computing it.

    Both are pytrees of the unboxed structure: of jax.ShapeDtypeStruct (each with its sharding) and of NamedSharding.
    Leaves with logical names follow RULES, and are then spread over all devices unless `spread_out` is False; all
    others are replicated.
    """
    boxed = jax.eval_shape(create, *args)
    shardings = _shardings(boxed, mesh, spread_out)
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        shardings,
    )
    return shapes, shardings


def _shardings(boxed, mesh: Mesh, spread_out: bool):
    def place(leaf) -> NamedSharding:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return replicated(mesh)
        spec = partition_spec(leaf.names, leaf.value.shape, mesh)
        return NamedSharding(mesh, spread(spec, leaf.value.shape, mesh) if spread_out else spec)

    return jax.tree.map(place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


@dataclass(frozen=True)
class WeightPlacement:
    """The shardings of parameters: `stored` as a training state keeps them, `computing` where a model reads them."""

    stored: Any
    computing: Any
    mesh: Mesh

    @classmethod
    def of(cls, create_params: Callable, mesh: Mesh) -> "WeightPlacement":
        """Returns the placement of the boxed parameters that `create_params()` would return."""
        boxed = jax.eval_shape(create_params)
        return cls(_shardings(boxed, mesh, spread_out=True), _shardings(boxed, mesh, spread_out=False), mesh)

    def gather(self, params, dtype: jnp.dtype, converted: Callable[[tuple[str, ...]], bool]):
        """Returns stored parameters where the model computes with them, in `dtype` those that `converted` names.

        They are converted before they are sent, so that a conversion takes a part of the time on every device, and
        half as many bytes travel.

        Args:
            params: parameters as a training state keeps them.
            dtype: the type that the model computes in.
            converted: path of a parameter -> whether the model uses it in `dtype` only.
        """

        def convert(path, leaf):
            names = tuple(jax.tree_util.keystr((part,), simple=True) for part in path)
            return leaf.astype(dtype) if converted(names) else leaf

        return jax.lax.with_sharding_constraint(jax.tree_util.tree_map_with_path(convert, params), self.computing)

    @cached_property
    def everywhere(self) -> Callable:
        """Moves stored parameters, unconverted, to where the model computes with them; called outside of steps."""
        return jit_on_mesh(lambda params: params, self.mesh, out_shardings=self.computing)

    def scatter(self, gradient):
        """Returns a gradient with respect to gathered parameters, float32 and split as the parameters are stored.

        It may lack some of the modules at the top of the parameters.
        """
        gradient = jax.lax.with_sharding_constraint(gradient, {name: self.stored[name] for name in gradient})
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient)


def jit_on_mesh(function: Callable, mesh: Mesh, **options) -> Callable:
    """Returns `jax.jit(function, **options)` for arrays on `mesh`, which all processes of the mesh call together.

    If the mesh spans processes, their first calls wait until all of them have compiled the function: a collective on
    CPUs waits only half a minute for a peer, and compile times may differ by more.
    """
    compiled = jax.jit(function, **options)
    if not (joined() and mesh.is_multi_process):
        return compiled
    met = False

    def run(*arguments, **named):
        nonlocal met
        if not met:
            compiled.lower(*arguments, **named).compile()
            barrier("compiled")
            met = True
        return compiled(*arguments, **named)

    return run


def with_sharding(shapes, sharding: NamedSharding):
    """Returns a pytree's shapes and types, as of jax.eval_shape, all with one sharding."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def abstract_everywhere(create: Callable, mesh: Mesh, *args):
    """Returns the shapes of what `create(*args)` would return, unboxed, with a whole copy on every device."""
    return with_sharding(nn.meta.unbox(jax.eval_shape(create, *args)), replicated(mesh))


def create_sharded(create: Callable, mesh: Mesh, *args):
    """Returns `create(*args)` with every array computed directly in its final placement."""
    _, shardings = abstract_state(create, mesh, *args)
    return jit_on_mesh(draw_together(lambda *a: nn.meta.unbox(create(*a))), mesh, out_shardings=shardings)(*args)


def jit_step(
    step: Callable,
    create_state: Callable,
    mesh: Mesh,
    argument_shardings: tuple[NamedSharding, ...],
    compiler_changes: str = "",
):
    """Returns `step(state, *arguments) -> (state, metrics)`, compiled for `mesh`.

    The state has the placement of `create_state(seed)` and is donated; metrics are on every device. XLA's options are
    those of `ibq_jax.base.compiler`, with `compiler_changes`.
    """
    _, shardings = abstract_state(create_state, mesh, 0)
    return jit_on_mesh(
        step,
        mesh,
        in_shardings=(shardings, *argument_shardings),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh, compiler_changes),
    )


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns global arrays [B, ...] on all mesh axes, made of each process's rows [b, ...] (see `process_rows`)."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the indices of the batch rows on this process's devices, in the order that `global_batch` expects.

    On a TPU pod they need not be contiguous: the mesh follows the chips' wiring, not the hosts.
    """
    mine = [number for number, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
    return np.arange(batch_size).reshape(mesh.size, -1)[mine].reshape(-1)


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """Returns a whole global array as a NumPy array in every process; all processes have to call it."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def check_batch(batch_size: int, mesh: Mesh, micro_batches: int, what: str) -> None:
    """Raises UsageError, naming the field `what`, unless a batch divides into micro-batches over all devices."""
    parts = mesh.size * micro_batches
    if batch_size % parts:
        times = f" times {micro_batches} micro-batches" if micro_batches > 1 else ""
        near = max(1, round(batch_size / parts)) * parts
        raise UsageError(
            f"{what}={batch_size} does not divide over {mesh.size} devices{times}; "
            f"use a multiple of {parts}, such as {near}"
        )
