"""Lays out an image's codes as the tokens of a language model: offset, size as text, ends of rows, start and end.

Shapes: codes [h, w]; a sequence of tokens is one-dimensional.

The numbers of `emu35` are those of Emu3.5's own code (src/utils/logits_processor.py and input_utils.py of
baaivision/Emu3.5, which writes no end of row after the last row); those of `apertus15` follow from swiss-ai's
apertus-omni-tokenizer (slots 1 to 5 after 131,072 text tokens, codes after 200 slots, digits of its tokenizer.json) and
from the order in the image-only sequences of swiss-ai's benchmark-image-tokenzier.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ibq_jax.base.errors import UsageError, one_line
from ibq_jax.base.json_files import read_json

SIZE_CHARACTERS = "0123456789*"  # the size is written as "ROWS*COLUMNS"
MAX_TOKEN = 2**31 - 1


@dataclass(frozen=True)
class CodeLayout:
    """The tokens of an image: before, size, after_size, the rows of codes, after.

    Attributes:
        offset: the token of code 0; code c is token offset + c.
        before: tokens at the start.
        size: the token of each of "0123456789*", of which the size "h*w" is written; None writes no size.
        after_size: tokens between the size and the codes.
        end_of_row: the token after each row of codes; None writes none.
        end_last_row: whether it follows the last row too.
        after: tokens at the end.
    """

    offset: int = 0
    before: tuple[int, ...] = ()
    size: Mapping[str, int] | None = None
    after_size: tuple[int, ...] = ()
    end_of_row: int | None = None
    end_last_row: bool = True
    after: tuple[int, ...] = ()

    @property
    def states_shape(self) -> bool:
        """True if h and w can be told from a sequence."""
        return self.size is not None or self.end_of_row is not None

    def vocab_size(self, codebook_size: int) -> int:
        """Returns a number above every token of images with `codebook_size` codes."""
        others = (*self.before, *(self.size or {}).values(), *self.after_size, self.end_of_row or 0, *self.after)
        return max(self.offset + codebook_size, *(token + 1 for token in others))

    def tokens(self, codes: np.ndarray) -> np.ndarray:
        """Returns the sequence int64 of an image's codes."""
        rows = codes.astype(np.int64) + self.offset
        if self.end_of_row is not None:
            rows = np.pad(rows, ((0, 0), (0, 1)), constant_values=self.end_of_row)
        body = rows.reshape(-1)
        if self.end_of_row is not None and not self.end_last_row:
            body = body[:-1]
        return np.concatenate([self._head(codes.shape), body, self.after]).astype(np.int64)

    def _head(self, shape: tuple[int, ...]) -> list[int]:
        written = [] if self.size is None else [self.size[character] for character in f"{shape[0]}*{shape[1]}"]
        return [*self.before, *written, *self.after_size]

    def codes(self, tokens: np.ndarray, shape: tuple[int, int] | None = None) -> np.ndarray:
        """Returns the codes int64 [h, w] of a sequence, the inverse of `tokens`.

        Args:
            tokens: the sequence.
            shape: (h, w), for layouts that do not state it; None takes a square one then.

        Raises:
            ValueError: the sequence is not of this layout.
        """
        tokens = np.asarray(tokens, np.int64)
        h, w = self._stated_shape(tokens) or shape or _square(len(tokens) - len(self._head((1, 1))) - len(self.after))
        start, step = len(self._head((h, w))), w + (self.end_of_row is not None)
        ends = self.end_of_row is not None and not self.end_last_row
        body = tokens[start : start + h * step - ends]
        if len(body) + ends != h * step or not len(body):
            raise ValueError(f"{len(tokens)} tokens do not hold {h}x{w} codes in this layout")
        codes = np.append(body, np.zeros(int(ends), np.int64)).reshape(h, step)[:, :w] - self.offset
        if codes.min() < 0 or not np.array_equal(self.tokens(codes), tokens):
            raise ValueError("tokens of another layout")
        return codes

    def _stated_shape(self, tokens: np.ndarray) -> tuple[int, int] | None:
        start = len(self.before)
        if self.size is not None:
            character_of = {token: character for character, token in self.size.items()}
            text = ""
            for token in tokens[start : start + 16].tolist():
                if token not in character_of:
                    break
                text += character_of[token]
            rows, _, columns = text.partition("*")
            if not rows.isdecimal() or not columns.isdecimal() or not int(rows) * int(columns):
                raise ValueError(f"{text!r} instead of a size")
            return int(rows), int(columns)
        if self.end_of_row is None:
            return None
        body = tokens[start + len(self.after_size) : len(tokens) - len(self.after)]
        ends = np.flatnonzero(body == self.end_of_row)
        if not len(ends):
            raise ValueError("no end of a row")
        return len(ends) + (not self.end_last_row), int(ends[0])

    def fields(self) -> dict[str, Any]:
        """Returns the layout as `read_layout` reads it from JSON."""
        return dataclasses.asdict(self)


def _square(count: int) -> tuple[int, int]:
    side = round(max(count, 0) ** 0.5)
    if not count or side * side != count:
        raise ValueError(f"{count} codes are no square, and nothing states their rows and columns")
    return side, side


PLAIN = CodeLayout()
LAYOUTS = {
    "codes": PLAIN,
    "emu35": CodeLayout(
        offset=151_854,
        before=(151_849, 151_852),  # begin of text, image start
        size={"*": 9} | {str(digit): 15 + digit for digit in range(10)},
        after_size=(151_851,),  # image token
        end_of_row=151_846,
        end_last_row=False,
        after=(151_853, 151_850),  # image end, end of text
    ),
    "apertus15": CodeLayout(
        offset=131_272,
        before=(1, 131_073),  # <s>, img_start
        size={"*": 1042} | {str(digit): 1048 + digit for digit in range(10)},
        after_size=(131_075,),  # img_token_start
        end_of_row=131_076,
        after=(131_077, 131_074, 2),  # img_end_of_frame, img_end, </s>
    ),
}


def find_layout(name: str, offset: int | None = None) -> CodeLayout:
    """Returns a layout of LAYOUTS or from a JSON file with the fields of `CodeLayout`, with another `offset` if given.

    Raises UsageError for an unknown name, a missing file, or fields that are no layout.
    """
    layout = LAYOUTS.get(name)
    if layout is None:
        if not name.endswith(".json"):
            raise UsageError(f"there is no layout {name!r}; the layouts are {', '.join(LAYOUTS)}, or a file NAME.json")
        try:
            layout = layout_from(read_json(Path(name)))
        except (OSError, ValueError) as error:
            raise UsageError(f"{name}: {one_line(error)}") from error
    return layout if offset is None else dataclasses.replace(layout, offset=offset)


def layout_from(fields: Any) -> CodeLayout:
    """Returns the layout of a JSON object with the fields of `CodeLayout`; missing ones have their default.

    Raises ValueError, naming the field, if it is none.
    """
    known = {field.name: field.default for field in dataclasses.fields(CodeLayout)}
    if not isinstance(fields, dict):
        raise ValueError("a layout is a JSON object")
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(f"a layout has no field {unknown[0]!r}; it has {', '.join(known)}")
    for name, value in fields.items():
        if not _fits(name, value):
            raise ValueError(f"the layout's field {name!r} is wrong")
    lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return CodeLayout(**{**fields, **lists})


def _fits(name: str, value: Any) -> bool:
    if name == "end_last_row":
        return isinstance(value, bool)
    if name == "size":
        return value is None or (
            isinstance(value, dict)
            and set(value) == set(SIZE_CHARACTERS)
            and len(set(value.values())) == 11
            and all(map(_is_token, value.values()))
        )
    if name in ("before", "after_size", "after"):
        return isinstance(value, list) and all(map(_is_token, value))
    return _is_token(value) or (name == "end_of_row" and value is None)


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_TOKEN
