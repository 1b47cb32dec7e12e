"""A map over work items on the workers of an Apache Beam runner; run again, it does only the items that are missing.

FOLDER/00012.json     the function's result for item 12 and a digest of its inputs; has this name only once it is whole
FOLDER/00012.error    one line, if the item cannot be done

Results are files and do not pass through the pipeline, so that they outlive it. Only this module imports Beam, and only
inside its functions.
"""

import contextlib
import functools
import hashlib
import io
import json
import logging
import shlex
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ibq_jax.base.errors import Failed, UsageError, one_line
from ibq_jax.base.parts import remove_partials, replace_text

LOCAL_RUNNER = "DirectRunner"
# One process per core, because threads would wait for each other at Python's global lock.
LOCAL_OPTIONS = (
    "--direct_num_workers=0",
    "--direct_running_mode=multi_processing",
    "--default_sdk_harness_log_level=ERROR",
)
SECONDS_BETWEEN_COUNTS = 5
TRACEBACK_LINES = 8  # a runner's message this long is a worker's traceback, whose last line names the error


@dataclass(frozen=True)
class BeamRunner:
    """The name and options of a Beam runner, checked by `find_beam`."""

    name: str
    options: tuple[str, ...]


def find_beam(name: str, options: str = "") -> BeamRunner:
    """Checks that Beam has a runner and its options, and returns them.

    Args:
        name: the runner, such as "DirectRunner" or "DataflowRunner". "--runner=..." in `options` takes precedence.
        options: as on a Beam command line. The direct runner uses one process per core unless they say otherwise.

    Raises:
        UsageError: apache-beam is not installed, there is no such runner or option, or an option has a wrong value.
    """
    try:
        with _without_warnings():
            from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]
            from apache_beam.runners.runner import create_runner  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            f"--beam needs apache-beam, which is not installed here ({error}): VENV=.venv-beam bash launch/setup.sh "
            "beam, then .venv-beam/bin/python in place of python"
        ) from error
    printed = io.StringIO()
    try:
        given = PipelineOptions(shlex.split(options))
        with _without_warnings(), contextlib.redirect_stderr(printed):
            known = given.get_all_options(drop_default=True)
            unknown = given.get_all_options(drop_default=True, retain_unknown_options=True).keys() - known
    except (SystemExit, ValueError) as error:  # argparse exits after its usage text; shlex raises for an open quote
        reason = (printed.getvalue().strip() or str(error)).splitlines()[-1].partition("error: ")
        raise UsageError(f"--beam-options={options}: {reason[2] or reason[0]}") from error
    if unknown:
        raise UsageError(f"--beam-options={options}: Beam has no option --{min(unknown)}")
    name = known.get("runner") or name
    try:
        create_runner(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise UsageError(f"--beam={name}: {one_line(error)}") from error
    local = name.lower() in ("direct", LOCAL_RUNNER.lower()) and not any(key.startswith("direct_") for key in known)
    return BeamRunner(name, (*(LOCAL_OPTIONS if local else ()), *shlex.split(options)))


def beam_map(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    folder: Path,
    runner: BeamRunner,
    identity: str = "",
    description: str = "",
    still_whole: Callable[[Any], bool] = lambda result: True,
) -> list[Any]:
    """Returns `function(item)` for every item, in order. Results of an earlier call with the same items are reused.

    Args:
        function: returns JSON values. It is pickled, as the items are, and may be called more than once for an item. If
            it raises UsageError, the map stops once all other items are done.
        items: identified by their repr, and by size and modification time of every Path in them.
        folder: where the results go, on a file system that every worker sees under the same path.
        runner: the Beam runner.
        identity: anything else that the results depend on; results of another identity are computed again.
        description: the progress bar's label.
        still_whole: returns whether a result of an earlier call can be reused.

    Raises:
        UsageError: `function` raised one.
        Failed: the runner gave up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_partials(folder)
    for leftover in folder.glob("*.error"):
        leftover.unlink(missing_ok=True)
    digests = [_digest(identity, item) for item in items]
    missing = [
        (number, digests[number], item)
        for number, item in enumerate(items)
        if not _is_whole(_result(folder, number), digests[number], still_whole)
    ]
    for number, *_ in missing:  # results of other inputs, which the progress bar would count as done
        _result(folder, number).unlink(missing_ok=True)
    if missing:
        with _progress(folder, len(items), description):
            _run(functools.partial(_work, function, folder), missing, runner)
    errors = sorted(folder.glob("*.error"))
    if errors:
        others = f" (and {len(errors) - 1} others; what could be done was kept)" if len(errors) > 1 else ""
        raise UsageError(errors[0].read_text() + others)
    return [json.loads(_result(folder, number).read_text())["result"] for number in range(len(items))]


def paths_in(item: Any) -> Iterator[Path]:
    """Yields every Path in `item`, which may nest tuples and lists."""
    if isinstance(item, Path):
        yield item
    elif isinstance(item, tuple | list):
        for part in item:
            yield from paths_in(part)


def _result(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.json"


def _digest(identity: str, item: Any) -> str:
    changed = [(status.st_size, status.st_mtime_ns) for status in map(Path.stat, paths_in(item))]
    return hashlib.sha256(repr((identity, item, changed)).encode("utf-8", "surrogatepass")).hexdigest()


def _is_whole(path: Path, digest: str, still_whole: Callable[[Any], bool]) -> bool:
    try:
        found = json.loads(path.read_text())
        return found["digest"] == digest and still_whole(found["result"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _work(function: Callable[[Any], Any], folder: Path, numbered: tuple[int, str, Any]) -> None:
    """Does one item on a worker and writes its result."""
    number, digest, item = numbered
    path = _result(folder, number)
    if not folder.is_dir():
        raise Failed(
            f"{socket.gethostname()} does not see {folder}: workers need --data-dir and the input under the same paths"
        )
    try:
        text = json.dumps({"digest": digest, "result": function(item)})
    except UsageError as error:
        path, text = path.with_suffix(".error"), str(error)
    except OSError as error:  # such as a file that this worker may not read
        path, text = path.with_suffix(".error"), f"on {socket.gethostname()}: {error}"
    replace_text(path, text)  # Beam may try an item twice, even at the same time


def _run(work: Callable[[Any], None], missing: list, runner: BeamRunner) -> None:
    import apache_beam  # pyright: ignore[reportMissingImports]
    from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]

    try:
        with apache_beam.Pipeline(runner=runner.name, options=PipelineOptions(list(runner.options))) as pipeline:
            spread = pipeline | "items" >> apache_beam.Create(missing) | "spread" >> apache_beam.Reshuffle()
            _ = spread | "work" >> apache_beam.Map(work)
    except Exception as error:  # runners raise anything; Beam has logged what happened where
        lines = str(error).strip().splitlines()
        reason = one_line(error) if len(lines) < TRACEBACK_LINES else one_line(Exception(lines[-1]))
        raise Failed(f"{runner.name} gave up ({reason}); what is whole was kept, the same command continues") from error


@contextlib.contextmanager
def _progress(folder: Path, total: int, description: str) -> Iterator[None]:
    """Shows how many results there are while the block runs, since the runner reports nothing until it ends."""
    done = threading.Event()

    def count() -> int:
        return sum(1 for _ in folder.glob("*.json"))

    def watch() -> None:
        with tqdm(initial=count(), total=total, desc=description, unit=" shards", dynamic_ncols=True) as bar:
            while not done.wait(SECONDS_BETWEEN_COUNTS):
                bar.update(count() - bar.n)
            bar.update(count() - bar.n)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences Beam's warnings about optional packages that are not needed here, and about options."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
