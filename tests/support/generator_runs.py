"""Token caches and small generators' runs for the tests of the generator's commands."""

import json
import shutil
from pathlib import Path

from ibq_jax.__main__ import main


def tokenized(tokenizer: Path, out: Path, *flags: str) -> Path:
    splits = "--splits=train[:96],validation[:40]"
    assert main(["tokenize", f"--tokenizer={tokenizer}", f"--out={out}", splits, *flags]) == 0
    return out


def copied(codes: Path, out: Path, **fields) -> Path:
    """Returns a copy of a token cache with some of its manifest's fields replaced, or removed if None."""
    shutil.copytree(codes, out)
    manifest = json.loads((out / "token_cache.json").read_text()) | fields
    present = {name: value for name, value in manifest.items() if value is not None}
    (out / "token_cache.json").write_text(json.dumps(present))
    return out


def logged(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def refused(argv: list[str], capsys) -> str:
    """Returns the one line with which a command ends after wrong use."""
    assert main(argv) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("ibq_jax ")]
    assert len(lines) == 1 and "Traceback" not in error
    return lines[0]
