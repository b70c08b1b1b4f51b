"""Least squares on a fixed mask: the survivors of a pruned layer, all compensating at once.

A sweep of SparseGPT lets each pruned weight be compensated by the columns to its right only. Once the mask is known,
the best survivors are the solution of one least-squares problem per output row; preconditioned conjugate gradients
solve all rows together, as ALPS does (arXiv 2406.07831).
"""

from __future__ import annotations

import torch
from torch import Tensor


def refit(
    dense: Tensor, moments: Tensor, mask: Tensor, start: Tensor, *, damping: float = 0.01, iterations: int = 20
) -> Tensor:
    """W that minimises tr((W - dense) H (W - dense)^T) over the entries where ``mask`` is one.

    Args:
        dense, mask, start: [out, in]; ``start`` is where the iteration begins and is zero off the mask.
        moments: [in, in], X^T X of the layer's inputs at any positive scale, positive semi-definite.
        damping: share of the mean diagonal that is added to the diagonal; it keeps W near ``dense`` where the inputs
            say nothing.
        iterations: each costs one [out, in] x [in, in] product; the error falls in every one.

    Returns float32 [out, in], zero off the mask. Rows that have converged stay where they are.
    """
    mask = mask.to(torch.float32)
    h = moments.float().clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    scale = h.diagonal().clamp(min=torch.finfo(torch.float32).tiny)
    w = start.float() * mask
    residual = ((dense.float() - w) @ h).mul_(mask)
    direction = residual / scale
    energy = (residual * direction).sum(1, keepdim=True)
    for _ in range(iterations):
        product = (direction @ h).mul_(mask)
        curvature = (direction * product).sum(1, keepdim=True)
        step = torch.where(curvature > 0, energy / curvature, 0.0)
        w.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        preconditioned = residual / scale
        new = (residual * preconditioned).sum(1, keepdim=True)
        direction = preconditioned.addcmul_(torch.where(energy > 0, new / energy, 0.0), direction)
        energy = new
    return w
