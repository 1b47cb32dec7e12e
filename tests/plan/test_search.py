"""The search for the fastest step that fits, on programs of which the outcome is known."""

import dataclasses
import json
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.compilers import needs_libtpu

from ibq_jax.__main__ import main
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import make_mesh
from ibq_jax.plan import search as module
from ibq_jax.plan.chips import CHIPS
from ibq_jax.plan.compiled import DoesNotFit
from ibq_jax.plan.search import FITS, REFUSED, TOO_LARGE, Candidate, Outcome, Program, Results, best, meshes, search

REMATS = ("none", "blocks")
CHIP = CHIPS["v5e"]


def prepare(candidate: Candidate) -> Program:
    """A product whose operand is split over `data`."""
    if candidate.sizes["codebook"] > 4:
        raise UsageError("the codebook does not divide")
    mesh = make_mesh(candidate.sizes, jax.devices()[: prod(candidate.mesh)])
    x = jax.ShapeDtypeStruct((1024, 64), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    return Program(jax.jit(lambda x: x @ x.T), (x,), mesh)


@pytest.fixture
def compiled(monkeypatch) -> list:
    """Replaces the compiler: a program fits if its arguments have at most 64 KiB. The list gets each one's mesh."""
    programs = []

    def compile_plan(step, arguments, mesh, chip):
        size = Program(step, arguments, mesh).argument_bytes
        programs.append(dict(mesh.shape))
        if size > 2**16:
            raise DoesNotFit(size, 2**16)
        plan = real(step, arguments, mesh, chip)
        return dataclasses.replace(plan, clock=None)

    real = module.compile_plan
    monkeypatch.setattr(module, "compile_plan", compile_plan)
    return programs


def test_meshes_are_all_factorisations_and_begin_with_those_that_split_least():
    assert meshes(4) == [(4, 1, 1), (2, 1, 2), (1, 1, 4), (2, 2, 1), (1, 2, 2), (1, 4, 1)]
    assert meshes(1) == [(1, 1, 1)]
    assert len(meshes(64)) == 28


def test_what_does_not_fit_is_tried_with_more_micro_batches_and_what_is_refused_is_not(compiled, tmp_path):
    known = Results(tmp_path / "found.jsonl", {})
    found = dict(search(8, REMATS, prepare, CHIP, known))
    assert found[Candidate((8, 1, 1), 1, "none")].outcome == FITS  # 1024 * 64 * 4 / 8 bytes
    assert found[Candidate((2, 1, 4), 8, "blocks")].outcome == TOO_LARGE
    assert found[Candidate((1, 1, 8), 1, "none")] == Outcome(REFUSED, "the codebook does not divide")
    assert Candidate((8, 1, 1), 2, "none") not in found and Candidate((1, 1, 8), 2, "none") not in found
    assert all(candidate.sizes["fsdp"] == 1 for candidate in found)  # others fit
    assert all(pair[1].outcome == FITS for pair in best(list(found.items()), 3))


def test_a_state_larger_than_the_memory_is_not_compiled(compiled, tmp_path):
    tiny = dataclasses.replace(CHIP, hbm_bytes=1000)
    found = list(search(2, ("none",), prepare, tiny, Results(tmp_path / "found.jsonl", {})))
    assert not compiled and {outcome.outcome for _, outcome in found} == {TOO_LARGE}
    assert "its state and batch alone are" in found[0][1].reason
    assert any(candidate.sizes["fsdp"] == 2 for candidate, _ in found)  # nothing else fits


def test_a_search_goes_on_where_it_was_stopped(compiled, tmp_path):
    path = tmp_path / "found.jsonl"
    whole = list(search(4, REMATS, prepare, CHIP, Results(path, {"preset": "a"})))
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][:20])  # stopped while it wrote
    compiled.clear()
    again = list(search(4, REMATS, prepare, CHIP, Results(path, {"preset": "a"})))
    assert [candidate for candidate, _ in again] == [candidate for candidate, _ in whole]
    assert len(compiled) == len(lines) - 2
    assert all(json.loads(line) for line in path.read_text().splitlines())
    assert Results(path, {"preset": "another"}).get(whole[0][0]) is None


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello\nworld\n")
    with pytest.raises(UsageError, match=r"notes.txt, line 1: not a result of plan --search"):
        Results(path, {})
    assert path.read_text() == "hello\nworld\n"


def test_a_search_needs_chips_and_no_mesh(capsys):
    config = f"{Path(__file__).parents[2]}/configs/tokenizer.py:openmoji32"
    assert main(["plan", f"--config={config}", "--cpu-devices=8", "--search"]) == 2
    assert "--search needs --topology of TPUs" in capsys.readouterr().err


@needs_libtpu
@pytest.mark.long
def test_a_generators_search_ends_with_the_fastest(capsys, tmp_path):
    config = f"{Path(__file__).parents[2]}/configs/autoregressive.py:openmoji32"
    fields = ("num_layers=2", "num_heads=2", "num_kv_heads=2", "embed_dim=128", "vocab_size=256")
    argv = ["plan", f"--config={config}", "--topology=v5e:1x1", f"--search={tmp_path}/found.jsonl"]
    argv += ["--config.data.batch_size=8", *(f"--config.model.{field}" for field in fields)]
    assert main(argv) == 0
    first = capsys.readouterr().out
    assert "one device; micro-batches 1; remat none: " in first and "ms expected" in first
    table = [line for line in first.splitlines() if line.startswith("| ")][1:]
    times = [float(line.split("|")[4].removesuffix("ms ")) for line in table]
    assert len(times) >= 3 and times == sorted(times)
    assert main(argv) == 0
    assert capsys.readouterr().out == first  # from the file
