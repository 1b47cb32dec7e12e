"""One word for one thing: words that the glossary (docs/architecture.md) replaced do not come back.

Checked in the package, configs/, launch/, examples/, README and docs: prose, names and messages alike.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REPLACED = {  # pattern -> the word to use
    r"pictures?": "image, reconstruction or sample",
    r"adversar(y|ies)": "discriminator",
    r"judges": "feature nets",
    r"(?-i:NOBODY)": "NO_FEATURE_NETS",
    r"(avg|average)[_ ]entrop(y|ies)": "batch entropy",
    r"lanes?": "per_device_batch",
    r"vocabulary_size|num_codes": "vocab_size or codebook_size",
    r"codes? cache": "token cache",
    r"anew": "again",
    r"likeliest": "most likely",
    r"beside": "next to",
    r"to the bit": "bit for bit",
    r"by heart": "memorized",
    r"is said|are said|says of itself": "is reported",
    r"is no whole number": "is not an integer",
    r"where there (is|are) none": "if absent",
}
WORD = {pattern: re.compile(rf"(?<![A-Za-z])(?:{pattern})(?![A-Za-z])", re.IGNORECASE) for pattern in REPLACED}
RIDDLES = ("What", "Of", "Those", "Such", "Whether", "Rather", "Where")  # first words of fragments
ALLOWED = {  # (file, the part of a line that may stand): why
    ("configs/renamed_fields.py", '"adversary/"'): "a name in earlier checkpoints",
    ("configs/renamed_fields.py", "evaluate.judges"): "an earlier name of a field",
    ("ibq_jax/api.py", "num_codes"): "a property of the public API",
    ("ibq_jax/commands/evaluate.py", "--pictures"): "an earlier name of a flag",
    ("ibq_jax/commands/sample.py", "--lane"): "an earlier name of a flag",
    ("ibq_jax/evaluate/draw_samples.py", '"lane"'): "a key in the settings of earlier sample sets",
    ("ibq_jax/evaluate/sample_set.py", '"pictures"'): "a key in the settings of earlier sample sets",
    ("ibq_jax/ops/index_backprop.py", "avg_entropy"): "a field of the public API",
    ("ibq_jax/report/history.py", '"adversary/'): "names in earlier runs' metrics",
    ("ibq_jax/report/history.py", '"codebook/average_entropy"'): "a name in earlier runs' metrics",
    ("ibq_jax/sweep/results.py", '"pictures"'): "a phase in earlier runs' timelines",
    ("ibq_jax/tokenizer/tokenize.py", '"num_codes"'): "a name in earlier token caches",
}
SUFFIXES = {".py", ".md", ".sh", ".sbatch", ".yaml", ".ipynb"}
FOLDERS = ("ibq_jax", "configs", "launch", "examples", "docs")
FILES = [ROOT / "README.md", *sorted(p for name in FOLDERS for p in (ROOT / name).rglob("*") if p.suffix in SUFFIXES)]
PYTHON = sorted(path for name in ("ibq_jax", "configs", "examples", "tests") for path in (ROOT / name).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines_of(path: Path) -> list[str]:
    if path.suffix != ".ipynb":
        return path.read_text().splitlines()
    return re.findall(r'"((?:[^"\\]|\\.)*)\\n"', path.read_text().partition('"outputs"')[0])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_replaced_words_do_not_come_back(path):
    allowed = [part for file, part in ALLOWED if file == name_of(path)]
    found = []
    for number, line in enumerate(lines_of(path), start=1):
        for part in allowed:
            line = line.replace(part, "")
        found += [f"{number}: {m[0]} -> {REPLACED[p]}" for p, word in WORD.items() for m in word.finditer(line)]
    assert not found, "\n".join([name_of(path), *found])


@pytest.mark.parametrize(("file", "part"), ALLOWED)
def test_every_allowance_is_needed(file, part):
    assert part in (ROOT / file).read_text()
    assert any(word.search(part) for word in WORD.values())


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_a_docstring_says_what_the_thing_does_or_is(path):
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "").split()
            if words and words[0].rstrip(",:") in RIDDLES:
                found.append(f"{getattr(node, 'lineno', 1)}: {' '.join(words[:8])} ...")
    assert not found, "\n".join([name_of(path), *found])


def test_the_patterns_find_what_they_are_for():
    assert WORD[r"pictures?"].search("draw_pictures(") and WORD[r"pictures?"].search("A picture's sides")
    assert WORD[r"lanes?"].search("lane=8") and not WORD[r"lanes?"].search("planes")
    assert WORD[r"beside"].search("Beside it") and not WORD[r"beside"].search("besides")
    assert WORD[r"(?-i:NOBODY)"].search("NOBODY") and not WORD[r"(?-i:NOBODY)"].search("nobody")
