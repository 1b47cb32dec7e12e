"""Commands that README, docs/ and launch/quickstart.sh show are ones that the parsers read."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from ibq_jax.__main__ import COMMANDS
from ibq_jax.base.config import PREFIX

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "launch/quickstart.sh"]
STARTS = re.compile(rf"(?:ibq|ibq-jax|-m ibq_jax|launch/\S+\.(?:sh|sbatch).*?) ((?:{'|'.join(COMMANDS)}) .*)")
OPTIONAL = re.compile(r"\[--.*?\]")


def shown(path: Path) -> list[list[str]]:
    """Returns the words of each complete command in the code of a page; those that elide flags ("...") are left out."""
    text = path.read_text().replace("\\\n", " ")
    code = re.findall(r"```bash\n(.*?)```", text, re.DOTALL) + re.findall(r"(?m)^(?:    .*\n)+", text)
    if path.suffix != ".md":
        code = [line.removesuffix("; done") for line in text.splitlines() if not line.startswith("echo")]
    lines = "\n".join(code).splitlines()
    found = [match[1] for line in lines if (match := STARTS.search(OPTIONAL.sub("", line).strip()))]
    commands = [shlex.split(command, comments=True) for command in found]
    return [words for words in commands if "..." not in words]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_shown_commands_parse(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, *words in shown(path):
        for word in words:  # files to write must be in folders that exist
            if "://" not in word and not (folder := Path(word.partition("=")[2]).parent).is_absolute():
                folder.mkdir(parents=True, exist_ok=True)
        parser = importlib.import_module(f"ibq_jax.commands.{name}").parser()
        _, rest = parser.parse_known_args(words)
        assert all(word.startswith(PREFIX) for word in rest), f"{name}: {rest}"


def test_commands_are_found():
    assert len(shown(ROOT / "README.md")) >= 20
    assert {words[0] for page in PAGES for words in shown(page)} == {*COMMANDS}
