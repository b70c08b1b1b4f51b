"""Are two models different, measured on the same windows or documents? What both find hard cancels out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

FLIPS = 10_000  # signs that are drawn: the smallest p is one in so many


def ratio_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Standard error of ``sum(sums) / sum(counts)``, windows being what was drawn; None of fewer than two."""
    if len(sums) < 2:
        return None
    values, weights = np.asarray(sums, float), np.asarray(counts, float)
    residuals = values - values.sum() / weights.sum() * weights
    return float(math.sqrt((residuals**2).sum() * len(values) / (len(values) - 1)) / weights.sum())


def windows(dense: Sequence[float], sparse: Sequence[float], counts: Sequence[int]) -> dict[str, float] | None:
    """Nats per token by which the sparse model is above the dense one, over the same windows.

    Args:
        dense, sparse: the summed loss of each window.
        counts: tokens scored in it.

    Returns ``difference``, its standard error ``stderr``, ``pairs``, and ``p``: how often a difference of that size
    comes about if in every window it is a toss-up which model has which loss (permutation test, two-sided, seed 0).
    None of fewer than two windows.
    """
    gaps = np.asarray(sparse, float) - np.asarray(dense, float)
    error = ratio_error(list(gaps), counts)
    if error is None:
        return None
    signs = np.random.default_rng(0).integers(0, 2, (FLIPS, len(gaps))) * 2 - 1
    as_large = int((np.abs(signs @ gaps) >= abs(gaps.sum()) * (1 - 1e-12)).sum())
    total = float(np.sum(counts))
    p = (1 + as_large) / (1 + FLIPS)
    return {"difference": float(gaps.sum()) / total, "stderr": error, "pairs": len(gaps), "p": p}


def documents(dense: Sequence[float], sparse: Sequence[float]) -> dict[str, float]:
    """Accuracy by which the sparse model is above the dense one, over the same documents (1: right, 0: wrong).

    ``p`` is McNemar's, exact: of the documents that only one of them gets right, how often so uneven a split comes
    about by chance (https://doi.org/10.1007/BF02295996).
    """
    won = sum(s > d for d, s in zip(dense, sparse, strict=True))
    lost = sum(s < d for d, s in zip(dense, sparse, strict=True))
    differ = won + lost
    tail = sum(math.comb(differ, k) for k in range(min(won, lost) + 1))
    p = min(1.0, 2 * tail / 2**differ) if differ else 1.0
    return {"difference": (won - lost) / max(1, len(dense)), "won": won, "lost": lost, "pairs": len(dense), "p": p}
