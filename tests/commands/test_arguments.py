"""The flags of all commands: plain help with defaults and units, dashes, and examples that work."""

import argparse
import importlib
import shlex
from pathlib import Path

import pytest

from ibq_jax.__main__ import COMMANDS
from ibq_jax.base.config import PREFIX
from ibq_jax.base.errors import UsageError
from ibq_jax.commands import arguments

NUMERIC = (int, float, arguments.count, arguments.positive, arguments.share)
UNITS = (  # words, one of which the help of a numeric flag must contain
    *(
        "image",
        "images",
        "samples",
        "crops",
        "pixels",
        "rows",
        "columns",
        "codes",
        "classes",
        "class",
        "tokens",
        "examples",
    ),
    *("steps", "seeds", "seed", "threads", "devices", "processes", "slices", "shards", "parts", "seconds", "bytes"),
    *("share", "fraction", "probability", "scale", "exponent", "temperature", "index", "root mean square", "MiB"),
)


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Returns the parser of every command and of every part of one, by its words."""
    found = {name: importlib.import_module(f"ibq_jax.commands.{name}").parser() for name in COMMANDS}
    for name, parser in list(found.items()):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {f"{name} {part}": inner for part, inner in action.choices.items()}
    return found


PARSERS = parsers()
FLAGS = [
    pytest.param(parser, action, id=f"{name} {action.option_strings[0]}")
    for name, parser in PARSERS.items()
    for action in parser._actions
    if action.option_strings and not isinstance(action, argparse._HelpAction)
]


def help_of(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Returns a flag's help as it is printed, on one line."""
    return parser._get_formatter()._expand_help(action)


def is_numeric(action: argparse.Action) -> bool:
    return action.type in NUMERIC or getattr(action.type, "__qualname__", "").startswith("numbers.")


@pytest.mark.parametrize(("parser", "action"), FLAGS)
def test_the_help_of_a_flag_is_a_sentence(parser, action):
    words = help_of(parser, action)
    assert len(words.split()) >= 3, words
    assert words[0].isupper() and words.endswith("."), words


@pytest.mark.parametrize(("parser", "action"), FLAGS)
def test_flags_have_dashes(parser, action):
    assert all(flag.startswith("--") and "_" not in flag for flag in action.option_strings)


@pytest.mark.parametrize(("parser", "action"), FLAGS)
def test_the_help_of_a_flag_states_its_default(parser, action):
    one_of = [group for group in parser._mutually_exclusive_groups if action in group._group_actions]
    if action.required or any(group.required for group in one_of) or action.nargs == 0:
        return  # without a default, or a switch that is off by default
    _, stated, default = help_of(parser, action).partition("Default: ")
    assert stated, help_of(parser, action)
    if isinstance(action.default, int | float) or (isinstance(action.default, str) and action.default):
        assert f"{action.default:g}" if isinstance(action.default, float) else str(action.default) in default


@pytest.mark.parametrize(("parser", "action"), [flag for flag in FLAGS if is_numeric(flag.values[1])])
def test_the_help_of_a_number_names_its_unit(parser, action):
    words = help_of(parser, action)
    assert any(unit in words.lower() for unit in map(str.lower, UNITS)), words


def examples(parser: argparse.ArgumentParser) -> list[list[str]]:
    """Returns the words of each example at the end of a parser's help."""
    _, heading, text = parser.format_help().partition("\nexamples:\n")
    assert heading, f"the help of {parser.prog} has no examples"
    lines = text.replace("\\\n", " ").rstrip("\n").split("\n")
    assert lines and all(line.startswith("  python -m ibq_jax ") for line in lines), text
    return [shlex.split(line)[3:] for line in lines]


@pytest.mark.parametrize("name", PARSERS)
def test_help_ends_with_examples_that_parse(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = PARSERS[name]
    for example in examples(parser):
        for argument in example:  # files to write must be in folders that exist
            path = Path(argument.partition("=")[2])
            if not path.is_absolute() and "://" not in argument:
                path.parent.mkdir(parents=True, exist_ok=True)
        words = name.split()
        assert example[: len(words)] == words, example
        _, rest = parser.parse_known_args(example[len(words) :])
        assert all(argument.startswith(PREFIX) for argument in rest), rest


def test_underscores_are_read_as_dashes_except_in_config_fields():
    parser = arguments.Parser("test")
    parser.add_argument("--data-dir")
    flags, rest = parser.parse_known_args(["--data_dir=a_b", f"{PREFIX}data.image_size=1"])
    assert flags.data_dir == "a_b" and rest == [f"{PREFIX}data.image_size=1"]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (arguments.count, "-1", "'-1' is not an integer of at least 0"),
        (arguments.positive, "0", "'0' is not an integer of at least 1"),
        (arguments.share, "1", "'1' is not a fraction of at least 0 and below 1"),
        (arguments.share, "half", "'half' is not a fraction"),
        (arguments.numbers(int), "1,2.5", "'1,2.5' is not integers separated by commas"),
        (arguments.output_file, "no_such_folder/file", "the folder no_such_folder does not exist"),
        (arguments.output_file, ".", ". is a folder, not a file"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(kind, text, message):
    parser = arguments.Parser("test")
    parser.add_argument("--flag", type=kind)
    with pytest.raises(UsageError) as error:
        parser.parse_args([f"--flag={text}"])
    assert message in str(error.value)
