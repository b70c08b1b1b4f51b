"""What is told of another library's error: one line, and never nothing."""

import pytest

from sparseforge_fx.errors import one_line


@pytest.mark.parametrize(
    ("text", "first", "all_of_it"),
    [
        ("wrong", "wrong", "wrong"),
        ("\n  wrong\n  because", "wrong", "wrong because"),
        ("", "ValueError", "ValueError"),
        (" \n\n ", "ValueError", "ValueError"),
    ],
)
def test_one_line(text, first, all_of_it):
    assert one_line(ValueError(text)) == first
    assert one_line(ValueError(text), lines=None) == all_of_it


def test_a_long_line_is_cut():
    error = ValueError("x" * 500)
    assert one_line(error) == "x" * 197 + "..."
    assert one_line(error, limit=10) == "xxxxxxx..."
    assert one_line(error, limit=None) == "x" * 500
