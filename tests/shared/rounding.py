"""By how much the same matrix products may differ.

Bits are equal where nothing is summed, or where one operator meets the same operands in the same memory. The products
of two graphs are not such a case: which loop a library takes for them depends on the processor, on strides and on how
memory is aligned, and another order of a sum is another rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

TERMS = 64  # of a sum; the tests' models are no wider


def rounding(dtype: torch.dtype, depth: int, terms: int = TERMS) -> float:
    """The error, relative to the largest output, of ``depth`` products one after the other: each a sum of ``terms``,
    kept in float32 or better (Higham, Accuracy and Stability, 4.2), and rounded once to a narrower dtype."""
    eps = torch.finfo(dtype).eps
    sums = min(eps, torch.finfo(torch.float32).eps)
    return depth * (terms * sums + (eps if eps > sums else 0.0))


def same_products(got: Tensor, want: Tensor, depth: int = 4, terms: int = TERMS) -> bool:
    """Equal shape and dtype, and values but for the rounding of ``depth`` products."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if not want.numel() or torch.equal(got, want):
        return True
    worst, largest = (got.double() - want.double()).abs().max(), want.double().abs().max()
    return bool(worst <= rounding(want.dtype, depth, terms) * largest)  # False for NaN
