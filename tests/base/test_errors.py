"""Foreign text in our messages: printable, on one line, and not too long."""

import pytest

from ibq_jax.base.errors import LONGEST_SHOWN, one_line, shorten


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("two\n  lines", "two lines"),
        ("\x1b[31mred\x00", "\\x1b[31mred\\x00"),
        ("caf\u00e9 \udcff", "caf\u00e9 \\udcff"),
        (("a", 1), "('a', 1)"),
        ("x" * LONGEST_SHOWN, "x" * LONGEST_SHOWN),
        ("x" * (LONGEST_SHOWN + 1), "x" * (LONGEST_SHOWN - 3) + "..."),
    ],
)
def test_foreign_text_is_shown_on_one_printable_line(value, shown):
    assert shorten(value) == shown


def test_the_length_may_be_given():
    assert shorten("abcdefgh", 6) == "abc..."


def test_an_error_without_words_is_named_by_its_class():
    assert one_line(KeyError()) == "KeyError" and one_line(OSError("a\nb")) == "a b"
