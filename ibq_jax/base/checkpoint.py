"""Checkpoints: asynchronous, atomic, kept by policy, restored to any mesh. Only this file imports Orbax.

A step's folder appears under its number only when it is complete, so a kill leaves the earlier steps untouched. A
checkpoint that is damaged afterwards is moved to `broken/` next to the others and reported, and the newest whole one is
used.
"""

import contextlib
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN, PreservationPolicy

from ibq_jax.base.errors import UsageError, one_line
from ibq_jax.base.files import is_remote, resolve
from ibq_jax.base.processes import barrier, first_failure, may_be_peer_failure

WEIGHTS_ONLY = "weights_only"  # metadata field of a checkpoint that holds only part of a state
WRITTEN_AT_ONCE = 2**26  # bytes per array and per file; larger arrays are split, so that no second copy is held
SAVE_SECONDS = 20 * 86_400  # Orbax measures it by the wall clock, which may jump; the watchdog ends real hangs

LeafFilter = Callable[[str], bool]  # whether to read a leaf, given its name such as "params/encoder/conv_in/kernel"


def every_leaf(name: str) -> bool:
    """Selects all leaves of a state."""
    return True


@dataclass
class Restored:
    """A restored checkpoint: its step, the state's pytree, and the JSON metadata saved with it.

    Leaves that the checkpoint does not hold (it may hold weights only), or that were not selected, are None;
    `completed` fills them in.
    """

    step: int
    state: Any
    metadata: Mapping[str, Any]

    @property
    def weights_only(self) -> bool:
        """True if the checkpoint holds only weights, such as one imported from a file."""
        return self.metadata.get(WEIGHTS_ONLY, False)

    def completed(self, fresh: Callable[[], Any]) -> Any:
        """Returns the state, with the leaves that the checkpoint does not hold taken from `fresh()`."""
        if not self.weights_only:
            return self.state
        return jax.tree.map(
            lambda ours, other: other if ours is None else ours, self.state, fresh(), is_leaf=lambda leaf: leaf is None
        )


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: their folder, created when the first one is saved.
        keep_last: how many of the newest checkpoints are kept.
        keep_best: how many of the best ones are kept too.
        best_metric: the metric by which they are the best: the highest, or with "-" before its name the lowest.
        renamed: prefix of a leaf's name today ("discriminator/") -> its prefix in checkpoints of earlier versions.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int = 1,
        keep_best: int = 0,
        best_metric: str = "",
        renamed: Mapping[str, str] = MappingProxyType({}),
    ):
        self.directory, self._renamed = epath.Path(resolve(directory)), renamed
        policies: list[PreservationPolicy] = [LatestN(keep_last)]
        if keep_best:
            best, lowest = best_metric.removeprefix("-"), best_metric.startswith("-")
            policies.append(
                BestN(
                    get_metric_fn=lambda metrics: metrics[best],
                    reverse=lowest,
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(timeout_secs=SAVE_SECONDS),
        )
        handlers = {"state": _writer(), "metadata": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def save(self, step: int, state, metadata: dict, metrics: dict[str, float] | None = None) -> None:
        """Starts to write a checkpoint, and returns as soon as the state is copied off the devices.

        Args:
            step: the step; nothing is written if it has a checkpoint already.
            state: the state's pytree of arrays.
            metadata: saved with it as JSON.
            metrics: results of this step's evaluation, if there was one.

        Raises:
            UsageError: there is no room for it, or the previous checkpoint could not be written.
        """
        if step in self._manager.all_steps():
            return
        self.wait()
        self._check_room(state)
        arrays = ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=WRITTEN_AT_ONCE)
        args = ocp.args.Composite(state=arrays, metadata=ocp.args.JsonSave(metadata))
        with self._writing():
            self._manager.save(step, args=args, metrics=metrics)

    def wait(self) -> None:
        """Waits until everything is on disk. Raises UsageError if it could not be written, as on a full disk."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns Orbax's write errors into UsageError, unless the cause may be a process that died meanwhile."""
        try:
            yield
        except (ValueError, OSError) as error:
            if may_be_peer_failure(error):
                raise
            raise self._unwritable(error) from error

    def _check_room(self, state) -> None:
        """Checks the free space before Orbax starts, whose threads report a full disk in hundreds of lines."""
        if is_remote(self.directory):
            return
        needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(self.directory).free
        if needed > free:
            raise self._unwritable(OSError(f"it needs {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"))

    def _unwritable(self, error: Exception) -> UsageError:
        whole = self._manager.latest_step()
        kept = f"a rerun continues from step {whole}, which is whole" if whole is not None else "none is whole yet"
        return UsageError(
            f"cannot write a checkpoint under {self.directory} ({one_line(error.__cause__ or error)}); {kept}"
        )

    def restore(
        self, abstract_state, say: Callable[[str], None] = print, select: LeafFilter = every_leaf
    ) -> Restored | None:
        """Returns the newest whole checkpoint, or None if there are no checkpoints.

        Newer ones that are damaged are moved to `broken/` and reported.

        Args:
            abstract_state: the shapes and shardings that the state should have.
            say: prints a line.
            select: which leaves to read.

        Raises:
            UsageError: there are checkpoints, but none can be read. Nothing is moved then.
        """
        damaged = []
        for step in reversed(self.steps):
            try:
                restored, reason = self.restore_step(step, abstract_state, select), None
            except Exception as error:  # Orbax wraps TensorStore's error for a damaged file in a bare Exception
                restored, reason = None, one_line(error.__cause__ or error)
            reason = first_failure("restored", reason)  # a damaged file may be one that only one process reads
            if reason is not None:
                damaged.append((step, reason))
                continue
            for broken, reason in damaged:
                moved_to = self._move_to_broken(broken)
                say(f"checkpoint {self.directory / str(broken)} is not whole ({reason}); moved to {moved_to}")
            return restored
        if damaged:
            raise UsageError(f"no checkpoint under {self.directory} can be read; step {damaged[0][0]}: {damaged[0][1]}")
        return None

    def restore_step(self, step: int, abstract_state, select: LeafFilter = every_leaf) -> Restored:
        """Returns one step's checkpoint. Raises UsageError if its structure or shapes are not as `abstract_state`.

        Processes read independently: with Orbax's manager, a failure in one process would make the others hang.
        """
        folder = self.directory / str(step)
        metadata = ocp.JsonCheckpointHandler().restore(folder / "metadata", args=ocp.args.JsonRestore())
        partial = bool(metadata.get(WEIGHTS_ONLY))
        tree = self._saved_tree(step)
        saved = self._check_shapes(step, tree, abstract_state, partial)
        names = {name: self._saved_name(name, saved) for name in _leaves(abstract_state)}
        current_names, leaves = {old: name for name, old in names.items()}, _leaves(abstract_state)

        def requested(path, _):
            name = current_names[_name(path)]
            return leaves[name] if select(name) else ocp.PLACEHOLDER

        # Orbax requires the structure on disk, whose names may be an earlier version's.
        asked = jax.tree_util.tree_map_with_path(requested, tree)
        how = ocp.checkpoint_utils.construct_restore_args(asked)
        state = ocp.PyTreeCheckpointHandler().restore(
            folder / "state", args=ocp.args.PyTreeRestore(asked, restore_args=how)
        )
        leaves = {current_names[name]: leaf for name, leaf in _leaves(state).items() if leaf is not ocp.PLACEHOLDER}
        state = jax.tree_util.tree_map_with_path(lambda path, _: leaves.get(_name(path)), abstract_state)
        return Restored(step, state, metadata)

    def _check_shapes(self, step: int, tree, abstract_state, partial: bool) -> dict[str, tuple[int, ...]]:
        """Checks and returns the shapes in a saved tree; a `partial` checkpoint may lack leaves of the state."""
        saved = _shapes(tree)
        asked = {self._saved_name(name, saved): shape for name, shape in _shapes(abstract_state).items()}
        for name in sorted(saved.keys() if partial else saved.keys() | asked.keys()):
            if saved.get(name) != asked.get(name):
                raise UsageError(
                    f"checkpoint {self.directory / str(step)} is of another model: {name} is "
                    f"{saved.get(name, 'absent')} there and {asked.get(name, 'absent')} here"
                )
        return saved

    def _saved_tree(self, step: int):
        """Returns the structure and the shapes of a step's state as it is on disk."""
        return ocp.PyTreeCheckpointHandler().metadata(self.directory / str(step) / "state").tree

    def _saved_name(self, name: str, saved: Collection[str]) -> str:
        """Returns the name under which a leaf was saved: its name today, or an earlier version's."""
        for today, before in self._renamed.items():
            if name not in saved and name.startswith(today):
                return before + name.removeprefix(today)
        return name

    def _move_to_broken(self, step: int) -> epath.Path:
        broken = self.directory / "broken" / str(step)
        while broken.exists():
            broken = broken.with_name(broken.name + "_again")
        barrier("broken")  # every process has found the same name
        if jax.process_index() == 0:
            broken.parent.mkdir(parents=True, exist_ok=True)
            (self.directory / str(step)).rename(broken)
        barrier("broken")
        self._manager.reload()
        return broken

    @property
    def steps(self) -> list[int]:
        """The saved steps, ascending."""
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        """Waits until everything is on disk and ends Orbax's threads."""
        self.wait()
        self._manager.close()


def _writer() -> ocp.PyTreeCheckpointHandler:
    """Returns what writes a state: of every part that several devices hold, one copy as it is.

    By default Orbax cuts such a part into a slice for each of them, with a program to compile for every shape and
    device. What is large is split over all devices anyway (`ibq_jax.base.sharding.spread`).
    """
    types = ocp.type_handlers
    registry = types.create_type_handler_registry(
        (jax.Array, types.ArrayHandler(use_replica_parallel=False)),
        (np.ndarray, types.NumpyHandler()),
        (np.number, types.ScalarHandler()),
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in _leaves(tree).items()}


def _leaves(tree) -> dict:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
