"""What a weight is kept in: which of its places survive, and in what its values are written."""

from __future__ import annotations

import re
from typing import NamedTuple

from sparseforge_fx.errors import SparseForgeError

PATTERNS = ("dense", "2:4")
#: bits of a value; those of ``float`` are the model's own
BITS = {"int8": 8, "int4": 4}
#: the least and the largest code. Of int4 there is one more below, which is a sixteenth of all: a scale below zero puts
#: it on the side that has the largest weight (as llama.cpp's Q4_0 does)
CODES = {"int8": (-127, 127), "int4": (-8, 7)}
VALUES = ("float", *BITS)
GROUPS = (32, 128, 16)  # inputs that share a scale of int4; the first is the usual one
#: inputs that share a scale of 8 bits, which is times one of the row's: the bytes of 32 with a scale of 16 bits
FINE = 16
#: what the sixteen codes of int4 in groups of :data:`FINE` stand for, by pattern, in the order of the codes: dense near
#: what has the least squared error for normally distributed weights, 2:4 for those that training left of these, few of
#: which are small. Zero stays zero. (As llama.cpp's IQ4_NL and bitsandbytes' NF4, each with its own; within +-63, so
#: that two products with unsigned bytes fit into 16 bits.)
LEVELS = {
    "dense": (-63, -49, -38, -29, -22, -16, -10, -5, 0, 5, 10, 16, 23, 30, 40, 53),
    "2:4": (-63, -53, -41, -33, -26, -19, -13, -7, 0, 9, 15, 21, 27, 35, 43, 55),
}


class Format(NamedTuple):
    """A pattern and a kind of values.

    Attributes:
        pattern: ``dense`` or ``2:4``.
        values: ``float`` (the model's own dtype), ``int8``, or ``int4``; zero is on the grid of both.
        group: inputs, the pruned ones counted, that share a scale: of float16, in groups of 16 of int8 times one of the
            row's; None: one float32 scale per output.
    """

    pattern: str = "dense"
    values: str = "float"
    group: int | None = None

    def __str__(self) -> str:
        """``dense``, ``2:4``, ``dense int8``, ``2:4 int4/32``; what :func:`parse_format` takes."""
        values = "" if self.values == "float" else f" {self.values}" + (f"/{self.group}" if self.group else "")
        return self.pattern + values

    @property
    def is_sparse(self) -> bool:
        return self.pattern != "dense"

    @property
    def is_quantized(self) -> bool:
        return self.values != "float"

    @property
    def levels(self) -> tuple[int, ...] | None:
        """What the codes stand for, the least first; None: for themselves."""
        return LEVELS[self.pattern] if self.group == FINE else None

    def bits(self, in_features: int, float_bits: int) -> float:
        """Bits of one weight of the dense matrix: its share of values, bitmask and scales.

        Args:
            in_features: inputs of the weight, a row of which shares the scale of int8.
            float_bits: of a value of the model's dtype.
        """
        survivors = 0.5 if self.is_sparse else 1.0
        bitmask = 1.0 if self.is_sparse else 0.0
        if not self.is_quantized:
            return survivors * float_bits + bitmask
        row = 0 if self.group and self.group != FINE else 32 / in_features
        group = 0 if self.group is None else (8 if self.group == FINE else 16) / self.group
        return survivors * BITS[self.values] + bitmask + group + row

    def why_not(self, in_features: int) -> str | None:
        """Why a weight of so many inputs cannot be kept so; None where it can."""
        if self.is_sparse and in_features % 4:
            return f"{in_features} inputs are no multiple of 4"
        if self.group is not None and in_features % self.group:
            return f"{in_features} inputs are no multiple of the group of {self.group}"
        return None


DENSE, SPARSE = Format(), Format("2:4")
#: all but the dense one in the model's own dtype
PACKED = (
    SPARSE,
    *(
        Format(pattern, values, group)
        for values, group in (("int8", None), *(("int4", group) for group in GROUPS))
        for pattern in PATTERNS
    ),
)


def parse_format(text: str | Format) -> Format:
    """``2:4 int4/32`` -> Format; int4 without a group has 32 inputs to a scale.

    Raises SparseForgeError for anything else than a pattern and a kind of values that there are.
    """
    if isinstance(text, Format):
        return text
    match = (
        re.fullmatch(r"\s*(dense|2:4)?\s*(?:(int8|int4)(?:/(\d{1,6}))?)?\s*", text) if isinstance(text, str) else None
    )
    if match is None or not any(match.groups()):
        raise SparseForgeError(
            f"{text!r} is no format: write a pattern (dense, 2:4), values (int8, int4, int4/16), or both: '2:4 int8'"
        )
    pattern, values, group = match[1] or "dense", match[2] or "float", int(match[3]) if match[3] else None
    if values == "int4":
        group = group or GROUPS[0]
        if group not in GROUPS:
            known = ", ".join(map(str, sorted(GROUPS)))
            raise SparseForgeError(f"int4 in groups of {group}: there are kernels for {known}")
    elif group:
        raise SparseForgeError(f"{text!r}: int8 has one scale per output: leave out the /{group}")
    return Format(pattern, values, group)
