"""Checkpoints: asynchronous, atomic, kept by policy, restored to any mesh. The only file that imports Orbax.

A step's folder appears under its number only when it is whole, so a kill leaves the earlier steps as they were. One
that is damaged afterwards is moved to `broken/` beside the others, said, and the newest whole one is used.
"""

import contextlib
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import is_remote, resolve
from ibq_jax.base.processes import barrier, first_failure, may_be_a_peers

WEIGHTS_ONLY = "weights_only"  # in the metadata of a checkpoint that holds part of a state
WRITTEN_AT_ONCE = 2**26  # bytes of an array, and of a file: larger arrays are cut, so that no second copy is held
SAVE_SECONDS = 20 * 86_400  # Orbax takes them from the wall clock, which may jump; what hangs is ended by the watchdog

Wanted = Callable[[str], bool]  # whether a leaf is to be read, by its name: "params/encoder/conv_in/kernel"


def everything(name: str) -> bool:
    return True


@dataclass
class Restored:
    """A checkpoint: the state's pytree, and what was saved beside it as JSON. Leaves that were not saved (of weights
    only), or were not asked for, are None; `completed` takes them from elsewhere."""

    step: int
    state: object
    metadata: dict

    @property
    def weights_only(self) -> bool:
        return self.metadata.get(WEIGHTS_ONLY, False)

    def completed(self, fresh: Callable[[], object]) -> object:
        """The state, with what the checkpoint does not hold as `fresh` makes it."""
        if not self.weights_only:
            return self.state
        return jax.tree.map(
            lambda ours, other: other if ours is None else ours, self.state, fresh(), is_leaf=lambda leaf: leaf is None
        )


class Checkpoints:
    """The checkpoints of one run, under `directory`.

    Keeps the newest `keep_last` and the `keep_best` with the highest `best_metric`, or with "-" before its name the
    lowest. `renamed` maps today's beginnings of leaf names ("discriminator/") to those that earlier versions saved.
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
        policies = [LatestN(keep_last)]
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
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def save(self, step: int, state, metadata: dict, metrics: dict[str, float] | None = None) -> None:
        """Starts writing; returns once the state is copied off the devices. `metrics`: this step's evaluation.

        Raises UsageError when there is no room for it, or the one before could not be written.
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
        """Returns when everything is on disk. Raises UsageError when it could not be written (a full disk, say)."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What Orbax could not write is a UsageError; a peer that died meanwhile is not."""
        try:
            yield
        except (ValueError, OSError) as error:
            if may_be_a_peers(error):
                raise
            raise self._unwritable(error) from error

    def _check_room(self, state) -> None:
        """Before Orbax starts: its writing threads tell a full disk in hundreds of lines, some after the end."""
        if is_remote(self.directory):
            return
        needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), shutil.disk_usage(self.directory).free
        if needed > free:
            raise self._unwritable(OSError(f"it takes {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"))

    def _unwritable(self, error: Exception) -> UsageError:
        whole = self._manager.latest_step()
        kept = f"step {whole} is whole and a rerun continues from it" if whole is not None else "none is whole yet"
        return UsageError(f"cannot write a checkpoint under {self.directory} ({_reason(error)}); {kept}")

    def restore(
        self, abstract_state, say: Callable[[str], None] = print, wanted: Wanted = everything
    ) -> Restored | None:
        """The newest whole checkpoint, as `abstract_state` (shapes with shardings) asks; None where there is none.

        Read is what is `wanted`. Newer ones that are damaged are moved aside and said. Raises UsageError when none of
        several could be read; then nothing is moved.
        """
        damaged = []
        for step in reversed(self.steps):
            try:
                restored, reason = self.restore_step(step, abstract_state, wanted), None
            except Exception as error:  # Orbax wraps what TensorStore says of a damaged file in a bare Exception
                restored, reason = None, _reason(error)
            reason = first_failure("restored", reason)  # a file may be damaged that only one process reads
            if reason is not None:
                damaged.append((step, reason))
                continue
            for broken, reason in damaged:
                aside = self._set_aside(broken)
                say(f"checkpoint {self.directory / str(broken)} is not whole ({reason}); moved to {aside}")
            return restored
        if damaged:
            raise UsageError(f"no checkpoint under {self.directory} can be read; step {damaged[0][0]}: {damaged[0][1]}")
        return None

    def restore_step(self, step: int, abstract_state, wanted: Wanted = everything) -> Restored:
        """One step's state and metadata. Raises UsageError when it is of another structure or other shapes.

        Processes read independently of each other, without the manager, in which one that fails makes the others hang.
        """
        folder = self.directory / str(step)
        metadata = ocp.JsonCheckpointHandler().restore(folder / "metadata", args=ocp.args.JsonRestore())
        part = bool(metadata.get(WEIGHTS_ONLY))
        saved = self._check_shapes(step, abstract_state, part)
        names = {name: self._saved_name(name, saved) for name in _leaves(abstract_state)}
        todays, leaves = {old: name for name, old in names.items()}, _leaves(abstract_state)
        asked = jax.tree_util.tree_map_with_path(
            lambda path, _: leaves[todays[_name(path)]] if wanted(todays[_name(path)]) else ocp.PLACEHOLDER,
            self._saved_tree(step),  # Orbax asks for the structure on disk, whose names may be an earlier version's
        )
        how = ocp.checkpoint_utils.construct_restore_args(asked)
        state = ocp.PyTreeCheckpointHandler().restore(
            folder / "state", args=ocp.args.PyTreeRestore(asked, restore_args=how)
        )
        leaves = {todays[name]: leaf for name, leaf in _leaves(state).items() if leaf is not ocp.PLACEHOLDER}
        state = jax.tree_util.tree_map_with_path(lambda path, _: leaves.get(_name(path)), abstract_state)
        return Restored(step, state, metadata)

    def _check_shapes(self, step: int, abstract_state, part: bool) -> dict[str, tuple[int, ...]]:
        """The shapes that were saved; where they are a `part` of the state, what else is asked may be absent."""
        saved = _shapes(self._saved_tree(step))
        asked = {self._saved_name(name, saved): shape for name, shape in _shapes(abstract_state).items()}
        for name in sorted(saved.keys() if part else saved.keys() | asked.keys()):
            if saved.get(name) != asked.get(name):
                raise UsageError(
                    f"checkpoint {self.directory / str(step)} is of another model: {name} is "
                    f"{saved.get(name, 'absent')} there and {asked.get(name, 'absent')} here"
                )
        return saved

    def _saved_tree(self, step: int):
        """Returns the structure and the shapes of a step's state as it lies on disk."""
        return ocp.PyTreeCheckpointHandler().metadata(self.directory / str(step) / "state").tree

    def _saved_name(self, name: str, saved: Collection[str]) -> str:
        """The name under which a leaf was saved: today's, or an earlier version's."""
        for today, before in self._renamed.items():
            if name not in saved and name.startswith(today):
                return before + name.removeprefix(today)
        return name

    def _set_aside(self, step: int) -> epath.Path:
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
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _shapes(tree) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in _leaves(tree).items()}


def _leaves(tree) -> dict:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _reason(error: Exception) -> str:
    text = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
