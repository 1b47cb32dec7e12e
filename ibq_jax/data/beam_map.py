"""A map over work items on the workers of an Apache Beam runner, of which a restart does only what is missing.

FOLDER/00012.json     what the function gave for item 12, under this name only once whole; and a digest of what it is of
FOLDER/00012.error    one line, where the item cannot be done

Results lie in files, not in the pipeline, so that they outlive it. Beam is imported here alone, and only if asked for.
"""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import shlex
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ibq_jax.base.errors import Failed, UsageError, one_line
from ibq_jax.base.files import PARTIAL

LOCAL_RUNNER = "DirectRunner"
# A process a core: in threads, whatever holds Python's lock would wait for one another.
LOCAL_OPTIONS = (
    "--direct_num_workers=0",
    "--direct_running_mode=multi_processing",
    "--default_sdk_harness_log_level=ERROR",
)
SECONDS_BETWEEN_COUNTS = 5
TRACEBACK_LINES = 8  # a runner's message as long as that is a worker's traceback, whose last line tells


@dataclass(frozen=True)
class BeamRunner:
    """Where pipelines run: the name of a Beam runner and its options, as find_beam checked them."""

    name: str
    options: tuple[str, ...]


def find_beam(name: str, options: str = "") -> BeamRunner:
    """The runner `name`, e.g. "DirectRunner" or "DataflowRunner", with `options` as Beam's own command lines have them.

    "--runner=..." among the options goes before `name`. The direct runner gets a process a core unless they say else.

    Raises:
        UsageError: apache-beam is not installed, there is no such runner or option, or a value is none of the option's.
    """
    try:
        with _without_warnings():
            from apache_beam.options.pipeline_options import PipelineOptions
            from apache_beam.runners.runner import create_runner
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
    except (SystemExit, ValueError) as error:  # argparse's, after its usage; and an open quotation mark
        reason = (printed.getvalue().strip() or str(error)).splitlines()[-1].partition("error: ")
        raise UsageError(f"--beam_options={options}: {reason[2] or reason[0]}") from error
    if unknown:
        raise UsageError(f"--beam_options={options}: Beam has no option --{min(unknown)}")
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
    """`function(item)` of every item, in order. What `folder` holds of an earlier call with the same items is kept.

    Args:
        function: gives JSON values; is pickled, as the items are, and may be called more than once for an item. A
            UsageError of it stops the map, but only once all other items are done.
        items: told apart by their repr; of a Path the size and the time of its last change count too.
        folder: of the results, on a file system that every worker has under the same path.
        runner: where it runs.
        identity: what else the results depend on. Results of another identity, or of other items, are made anew.
        description: of the progress bar.
        still_whole: whether a result of an earlier call can be kept.

    Raises:
        UsageError: `function` raised one.
        Failed: the runner gave up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in (*folder.glob("*.error"), *folder.glob(f"*{PARTIAL}")):
        leftover.unlink(missing_ok=True)
    digests = [_digest(identity, item) for item in items]
    missing = [
        (number, digests[number], item)
        for number, item in enumerate(items)
        if not _is_whole(_result(folder, number), digests[number], still_whole)
    ]
    for number, *_ in missing:  # of other settings; what is there counts as done
        _result(folder, number).unlink(missing_ok=True)
    if missing:
        with _progress(folder, len(items), description):
            _run(functools.partial(_work, function, folder), missing, runner)
    errors = sorted(folder.glob("*.error"))
    if errors:
        others = f" (and {len(errors) - 1} others; what could be done was kept)" if len(errors) > 1 else ""
        raise UsageError(errors[0].read_text() + others)
    return [json.loads(_result(folder, number).read_text())["result"] for number in range(len(items))]


def partial_name(path: Path) -> Path:
    """A name to write `path` under until it is whole: one that nobody else uses, for Beam may try an item twice."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")


def paths_in(item: Any) -> Iterator[Path]:
    """The Paths in tuples and lists, however nested."""
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
    """What a worker does for an item."""
    number, digest, item = numbered
    path = _result(folder, number)
    if not folder.is_dir():
        raise Failed(
            f"{socket.gethostname()} does not see {folder}: workers need --data_dir and the input as shown here"
        )
    try:
        text = json.dumps({"digest": digest, "result": function(item)})
    except UsageError as error:
        path, text = path.with_suffix(".error"), str(error)
    except OSError as error:  # such as a file that this worker may not read
        path, text = path.with_suffix(".error"), f"on {socket.gethostname()}: {error}"
    partial = partial_name(path)
    partial.write_text(text)
    os.replace(partial, path)


def _run(work: Callable[[Any], None], missing: list, runner: BeamRunner) -> None:
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions

    try:
        with apache_beam.Pipeline(runner=runner.name, options=PipelineOptions(list(runner.options))) as pipeline:
            spread = pipeline | "items" >> apache_beam.Create(missing) | "spread" >> apache_beam.Reshuffle()
            _ = spread | "work" >> apache_beam.Map(work)
    except Exception as error:  # whatever a runner may raise; Beam has logged what happened where
        lines = str(error).strip().splitlines()
        reason = one_line(error) if len(lines) < TRACEBACK_LINES else one_line(Exception(lines[-1]))
        raise Failed(f"{runner.name} gave up ({reason}); what is whole was kept, the same command goes on") from error


@contextlib.contextmanager
def _progress(folder: Path, total: int, description: str) -> Iterator[None]:
    """Shows how many results there are while the block runs; the runner itself tells nothing in between."""
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
    """Beam warns on import of a package it would like for a format that is not used here, and of options twice."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
