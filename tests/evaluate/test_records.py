"""Records of one tokenizer under several protocols: one table, one file each, one list."""

import json

import pytest
from support.small_runs import SMALL

from ibq_jax.__main__ import main
from ibq_jax.base.config import load_config, save_config
from ibq_jax.commands import evaluate
from ibq_jax.evaluate.protocols import PROTOCOLS, find_protocol
from ibq_jax.evaluate.records import make_record


@pytest.fixture
def run(tmp_path):
    """A tokenizer's run without weights."""
    config = load_config("tokenizer:openmoji32", [f"--config.{field}" for field in SMALL])
    save_config(config, tmp_path / "config.json")
    return tmp_path


def test_all_protocols_make_one_table(run, monkeypatch, capsys):
    psnr = dict(zip(PROTOCOLS, (20.0, 21.5, 22.25, 9.125, float("inf")), strict=True))

    def measured(path, protocols, *, num_images, **_):
        return [
            make_record(
                stage="tokenizer",
                run=path,
                step=12,
                weights="ema",
                split="openmoji/validation",
                protocol=find_protocol(name),
                caveats=["not comparable: 16 pixels"] if name == "adm" else [],
                metrics={"images": num_images, "psnr": psnr[name], "usage": 0.5},
            )
            for name in protocols
        ]

    monkeypatch.setattr(evaluate, "evaluate_under_protocols", measured)
    assert main(["evaluate", f"--run={run}", "--protocol=all", "--num-images=7", f"--json={run / 'all.json'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "openmoji/validation: 7 images, step 12, ema weights"
    assert [line.split() for line in lines[1:7]] == [
        ["protocol", "PSNR", "usage"],
        ["seed_voken", "20.00", "dB", "50.0%", "of", "the", "codebook"],
        ["adm", "21.50", "dB", "50.0%", "of", "the", "codebook"],
        ["clean", "22.25", "dB", "50.0%", "of", "the", "codebook"],
        ["bicubic", "9.12", "dB", "50.0%", "of", "the", "codebook"],
        ["llamagen", "inf", "50.0%", "of", "the", "codebook"],
    ]
    assert len({len(line) for line in lines[1:7]}) == 1
    assert lines[lines.index("  not comparable: 16 pixels") - 1].startswith("adm: antialiased resize")
    records = json.loads((run / "all.json").read_text())
    assert [record["protocol"]["name"] for record in records] == [*PROTOCOLS]
    for record in records:
        [file] = (run / "evaluations").glob(f"*-{record['protocol']['name']}-*.json")
        assert json.loads(file.read_text()) == record


def test_only_a_tokenizer_is_measured_under_all_protocols(tmp_path, capsys):
    (tmp_path / "samples.npz").write_bytes(b"")
    samples = f"--samples={tmp_path / 'samples.npz'}"
    assert main(["evaluate", samples, f"--reference={tmp_path / 'samples.npz'}", "--protocol=all"]) == 2
    assert "--protocol=all is for tokenizers, not for samples: name one of seed_voken" in capsys.readouterr().err
