"""A search for the mesh, the micro-batches and the rematerialisation of the fastest training step that fits.

Every candidate is compiled, which takes minutes; so what cannot fit or is not allowed is left out before, and each
outcome is appended to a file, from which a search that was stopped goes on.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import jax

from ibq_jax.base.errors import UsageError
from ibq_jax.base.json_files import parse_json
from ibq_jax.base.parts import replace_text
from ibq_jax.base.sharding import AXES
from ibq_jax.plan.chips import Chip
from ibq_jax.plan.compiled import DoesNotFit, compile_plan

FITS, TOO_LARGE, REFUSED = "fits", "does not fit", "refused"
MOST_MICRO_BATCHES = 8


@dataclass(frozen=True)
class Candidate:
    """One way to run a step: the mesh's sizes in the order of `AXES`, micro-batches a step, and `model.remat`."""

    mesh: tuple[int, ...]
    micro_batches: int
    remat: str

    @property
    def sizes(self) -> dict[str, int]:
        """The mesh's sizes by axis."""
        return dict(zip(AXES, self.mesh, strict=True))

    def __str__(self) -> str:
        mesh = ", ".join(f"{axis} {size}" for axis, size in self.sizes.items() if size > 1) or "one device"
        return f"{mesh}; micro-batches {self.micro_batches}; remat {self.remat}"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a candidate: `FITS` with figures, or `TOO_LARGE` or `REFUSED` with the `reason`."""

    outcome: str
    reason: str = ""
    seconds: float = 0.0  # expected for a step, with collectives that nothing hides
    peak_bytes: int = 0
    compile_seconds: float = 0.0


@dataclass(frozen=True)
class Program:
    """A jitted step with its abstract arguments on a mesh, as `compile_plan` takes them."""

    step: Callable
    arguments: tuple
    mesh: jax.sharding.Mesh

    @property
    def argument_bytes(self) -> int:
        """The bytes of the arguments on one device."""
        return sum(
            prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(self.arguments)
        )


def meshes(devices: int) -> list[tuple[int, ...]]:
    """Returns the sizes of all meshes of the devices by powers of two; those that split the least arrays come first."""
    powers = [2**n for n in range(devices.bit_length())]
    found = [(devices // (f * c), f, c) for f, c in itertools.product(powers, powers) if devices % (f * c) == 0]
    return sorted(found, key=lambda mesh: (mesh[1] > 1, mesh[1] * mesh[2], mesh[1]))


def search(
    devices: int,
    remats: tuple[str, ...],
    prepare: Callable[[Candidate], Program],
    chip: Chip,
    known: "Results",
) -> Iterator[tuple[Candidate, Outcome]]:
    """Yields each candidate with its outcome, known ones first read from `known`.

    A mesh is tried with every rematerialisation, and with twice as many micro-batches only if none of them fits. Meshes
    that split matrices over `fsdp` are tried only if no other fits.

    Args:
        devices: their number.
        remats: the values of `model.remat`.
        prepare: candidate -> its program; raises UsageError if the config does not allow it.
        chip: the devices' peaks and memory.
        known: outcomes of an earlier search, to which new ones are added.
    """
    some_fit = False
    for mesh in meshes(devices):
        if mesh[AXES.index("fsdp")] > 1 and some_fit:
            return
        micro_batches = 1
        while micro_batches <= MOST_MICRO_BATCHES:
            outcomes = []
            for remat in remats:
                candidate = Candidate(mesh, micro_batches, remat)
                outcome = known.get(candidate)
                if outcome is None:
                    outcome = _try(candidate, prepare, chip)
                    known.add(candidate, outcome)
                outcomes.append(outcome.outcome)
                yield candidate, outcome
            some_fit |= FITS in outcomes
            if FITS in outcomes or TOO_LARGE not in outcomes:
                break
            micro_batches *= 2


def _try(candidate: Candidate, prepare: Callable[[Candidate], Program], chip: Chip) -> Outcome:
    try:
        program = prepare(candidate)
        if program.argument_bytes > chip.hbm_bytes:
            return Outcome(TOO_LARGE, f"its state and batch alone are {program.argument_bytes / 1e9:.1f} GB a device")
        plan = compile_plan(program.step, program.arguments, program.mesh, chip)
    except UsageError as error:
        return Outcome(REFUSED, str(error))
    except DoesNotFit as error:
        return Outcome(TOO_LARGE, str(error))
    seconds, peak = sum(plan.expected_seconds.values()), plan.memory.peak
    reason = "" if peak <= chip.hbm_bytes else f"its peak is {peak / 1e9:.1f} GB"
    return Outcome(TOO_LARGE if reason else FITS, reason, seconds, peak, plan.compile_seconds)


class Results:
    """The outcomes of a search, in a file of JSON lines; lines of other `settings` are left alone.

    Raises UsageError if the file has a line that is not such JSON, unless it is the last, which may be cut off.
    """

    def __init__(self, path: Path, settings: Mapping):
        self._path, self._settings = path, json.dumps(settings, sort_keys=True, default=str)
        self._outcomes: dict[Candidate, Outcome] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                row = parse_json(line)
                candidate = Candidate(tuple(row["mesh"]), row["micro_batches"], row["remat"])
                outcome = Outcome(**{field.name: row[field.name] for field in dataclasses.fields(Outcome)})
            except (ValueError, KeyError, TypeError):
                if number == len(lines):
                    replace_text(path, "".join(f"{line}\n" for line in lines[:-1]))
                    break
                raise UsageError(f"{path}, line {number}: not a result of plan --search; name another file") from None
            if row.get("settings") == self._settings:
                self._outcomes[candidate] = outcome

    def get(self, candidate: Candidate) -> Outcome | None:
        """Returns the outcome of a candidate if it is known."""
        return self._outcomes.get(candidate)

    def add(self, candidate: Candidate, outcome: Outcome) -> None:
        """Appends an outcome to the file."""
        self._outcomes[candidate] = outcome
        row = dataclasses.asdict(candidate) | dataclasses.asdict(outcome) | {"settings": self._settings}
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def best(found: list[tuple[Candidate, Outcome]], count: int) -> list[tuple[Candidate, Outcome]]:
    """Returns the `count` candidates that fit with the shortest expected step, the shortest first."""
    return sorted((pair for pair in found if pair[1].outcome == FITS), key=lambda pair: pair[1].seconds)[:count]
