"""Optimal Brain Surgeon on one weight: choose a mask and let the survivors compensate (SparseGPT, arXiv 2301.00774)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.unseen import rank_unseen, unseen
from sparseforge_fx.pattern import AnyPattern, Pattern, hard_mask


class ObsResult(NamedTuple):
    """Compensated weight [out, in] float32, its boolean mask, and the damping that the factorisation needed."""

    weight: Tensor
    mask: Tensor
    damping: float


def prune_obs(
    weight: Tensor,
    moments: Tensor,
    pattern: AnyPattern,
    *,
    mask: Tensor | None = None,
    damping: float = 0.01,
    block: int = 128,
) -> ObsResult:
    """One left-to-right sweep of SparseGPT (algorithm 1), blocked so that each column is a rank-1 update of its block
    only.

    Args:
        weight: [out, in]; groups of M run along ``in``.
        moments: [in, in], X^T X of the layer's inputs (any positive scale).
        mask: given, it is kept; None: chosen every M columns (unstructured: every block) as the largest
            w^2 / [H^-1]_jj^2.
        damping: share of the mean diagonal added to the diagonal; raised tenfold until the Cholesky factor exists.
        block: columns between two updates of the rest; a multiple of M is made of it.

    Inputs that are never active (a zero on the diagonal) have their weights pruned first, the smallest before the
    larger ones; what is kept of them stays as it was.
    Raises SparseForgeError if the Hessian is not finite.
    """
    if not torch.isfinite(moments).all():
        raise SparseForgeError(
            "the calibration inputs of a layer are not finite; check the model's weights and the data"
        )
    w = weight.detach().to(torch.float32, copy=True)
    factor, damping, dead = _inverse_factor(moments.float(), damping)
    diag = factor.diagonal()
    columns = w.shape[1]
    group = pattern.m if isinstance(pattern, Pattern) else block
    block = max(group, block // group * group)
    keep = torch.zeros_like(w, dtype=torch.bool) if mask is None else mask.bool()
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.zeros(w.shape[0], end - start, device=w.device)
        # a contiguous [columns, out] copy: the sweep walks columns
        part, rows = w[:, start:end].t().contiguous(), factor[start:end, start:end]
        for j in range(end - start):
            if mask is None and j % group == 0:
                scores = part[j : j + group].t() ** 2 / diag[start:end][j : j + group] ** 2
                here = slice(start + j, start + j + group)
                scores = rank_unseen(scores, part[j : j + group].t(), dead[here])
                keep[:, here] = hard_mask(scores, pattern)
            kept = part[j] * keep[:, start + j]
            error = (part[j] - kept) / rows[j, j]
            part[j + 1 :] -= torch.outer(rows[j, j + 1 :], error)
            part[j] = kept
            errors[:, j] = error
        w[:, start:end] = part.t()
        w[:, end:] -= errors @ factor[start:end, end:]
    return ObsResult(w, keep, damping)


def _inverse_factor(moments: Tensor, damping: float) -> tuple[Tensor, float, Tensor]:
    """Upper Cholesky factor of the damped inverse; the damping used; which inputs are dead."""
    diag = moments.diagonal()
    dead = unseen(moments)
    mean = diag.mean() if bool((diag > 0).any()) else torch.ones((), device=moments.device)
    while True:
        damped = moments.clone()
        damped.diagonal().add_(damping * mean)
        damped[dead, dead] = mean
        lower, info = torch.linalg.cholesky_ex(damped)
        if info.item() == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if info.item() == 0:
                return upper, damping, dead
        damping = max(10 * damping, 1e-8)
        if not damping <= 1e6:  # NaN, too
            raise SparseForgeError("a layer's Hessian cannot be factorised at any damping; check the calibration data")
