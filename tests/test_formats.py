"""What a weight is kept in: text and back, bits, and what does not fit."""

from itertools import product

import pytest

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import GROUPS, PATTERNS, Format, parse_format

ALL = [
    Format(pattern, values, group)
    for pattern, (values, group) in product(
        PATTERNS, [("float", None), ("int8", None), *(("int4", group) for group in GROUPS)]
    )
]


@pytest.mark.parametrize("format", ALL, ids=str)
def test_text_and_back(format):
    assert parse_format(str(format)) == format
    assert parse_format(format) is format


def test_what_is_left_out():
    assert parse_format("int8") == Format("dense", "int8")
    assert parse_format(" 2:4  int4 ") == Format("2:4", "int4", 32)
    assert parse_format("2:4") == Format("2:4")


@pytest.mark.parametrize("text", ["", " ", "3:4", "int3", "2:4 int4/64", "int8/32", "2:4 float16", "2:4,int8", 8, None])
def test_what_is_no_format(text):
    with pytest.raises(SparseForgeError):
        parse_format(text)


def test_bits():
    """By hand: survivors, one bit a place, scales; the table of the field (16, 9, 8, 5, 4.5, 3.5)."""
    bits = {str(f): f.bits(4096, 16) for f in ALL}
    row = 32 / 4096
    assert bits == {
        "dense": 16, "dense int8": 8 + row, "dense int4/32": 4.5, "dense int4/128": 4.125, "dense int4/16": 4.5 + row,
        "2:4": 9, "2:4 int8": 5 + row, "2:4 int4/32": 3.5, "2:4 int4/128": 3.125, "2:4 int4/16": 3.5 + row,
    }  # fmt: skip


def test_why_not():
    assert Format("2:4").why_not(6) and not Format().why_not(6)
    assert Format("dense", "int4", 32).why_not(48) and not Format("dense", "int4", 32).why_not(64)
