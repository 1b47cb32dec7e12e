"""Sequences of tokens: against text that is put together as Emu3.5's pipeline does it, and back to codes."""

import json
import re

import numpy as np
import pytest

from ibq_jax.base.errors import UsageError
from ibq_jax.data.code_layouts import LAYOUTS, CodeLayout, find_layout

CODES = np.random.default_rng(0).integers(0, 131_072, (12, 9))
SHAPES = [(1, 1), (1, 7), (7, 1), (12, 9), (64, 40)]


def emu35_text(codes: np.ndarray) -> str:
    """Returns the text of an image as Emu3.5 writes it: no end of row after the last row."""
    rows = ["".join(f"<|visual token {code:06d}|>" for code in row) for row in codes.tolist()]
    h, w = codes.shape
    start, end = "<|extra_203|><|image start|>", "<|image end|><|extra_204|>"
    return f"{start}{h}*{w}<|image token|>{'<|extra_200|>'.join(rows)}{end}"


def emu35_ids(text: str) -> list[int]:
    """Returns the ids of such a text: characters in the order of ASCII, and 205 extras after three special tokens."""
    special = {"image token": 151_851, "image start": 151_852, "image end": 151_853}
    ids = []
    for name, character in re.findall(r"<\|([^|]*)\|>|(.)", text):
        kind, _, number = name.rpartition("_" if name.startswith("extra") else " ")
        if character:
            ids.append(ord(character) - ord("!"))
        elif kind == "extra":
            ids.append(151_643 + 3 + int(number))
        else:
            ids.append(151_854 + int(number) if kind == "visual token" else special[name])
    return ids


@pytest.mark.parametrize("shape", SHAPES)
def test_emu35s_tokens_are_those_of_its_text(shape):
    codes = np.resize(CODES, shape)
    assert LAYOUTS["emu35"].tokens(codes).tolist() == emu35_ids(emu35_text(codes))


def test_apertus_tokens_end_every_row_and_the_frame():
    tokens = LAYOUTS["apertus15"].tokens(np.array([[0, 1], [2, 131_071], [5, 6]]))
    base, digits = 131_072, [1048 + 3, 1042, 1048 + 2]  # "3*2"
    start, token_start, end_of_row, end_of_frame, end = (base + slot for slot in (1, 3, 4, 5, 2))
    rows = [
        base + 200,
        base + 201,
        end_of_row,
        base + 202,
        2 * base + 199,
        end_of_row,
        base + 205,
        base + 206,
        end_of_row,
    ]
    assert tokens.tolist() == [1, start, *digits, token_start, *rows, end_of_frame, end, 2]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*LAYOUTS, "rows", "size"])
def test_codes_come_back(name, shape):
    others = {
        "rows": CodeLayout(offset=7, before=(1,), end_of_row=2, end_last_row=True),
        "size": CodeLayout(offset=20, size=dict(zip("0123456789*", range(11), strict=True)), after=(12,)),
    }
    layout = LAYOUTS.get(name) or others[name]
    codes = np.resize(CODES, shape)
    tokens = layout.tokens(codes)
    known = None if layout.states_shape else shape
    np.testing.assert_array_equal(layout.codes(tokens, known), codes)
    assert tokens.max() < layout.vocab_size(131_072)
    for wrong in (tokens[:-1], tokens[1:], np.append(tokens, 5), np.where(tokens == tokens[-1], 3, tokens)):
        if known is None:
            with pytest.raises(ValueError, match=r"."):
                layout.codes(wrong)


def test_squares_need_no_shape():
    np.testing.assert_array_equal(LAYOUTS["codes"].codes(np.arange(9)), np.arange(9).reshape(3, 3))
    with pytest.raises(ValueError, match="8 codes are no square, and nothing states their rows and columns"):
        LAYOUTS["codes"].codes(np.arange(8))


def test_a_layout_in_a_file_is_that_layout(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(LAYOUTS["emu35"].fields()))
    assert find_layout(str(path)) == LAYOUTS["emu35"]
    assert find_layout("emu35", offset=5) == find_layout(str(path), offset=5) != LAYOUTS["emu35"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ofset": 3}, "a layout has no field 'ofset'; it has offset, before"),
        ({"before": [1, "a"]}, "field 'before' is wrong"),
        ({"size": {"0": 1}}, "field 'size' is wrong"),
        ({"offset": -1}, "field 'offset' is wrong"),
        ([], "a layout is a JSON object"),
    ],
)
def test_what_is_no_layout_is_one_line(fields, words, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(fields))
    with pytest.raises(UsageError, match=words):
        find_layout(str(tmp_path / "mine.json"))
    with pytest.raises(UsageError, match="there is no layout 'emu'; the layouts are codes, emu35, apertus15"):
        find_layout("emu")
