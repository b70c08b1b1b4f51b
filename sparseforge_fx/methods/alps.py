"""ALPS on one weight (arXiv 2406.07831): the mask by ADMM on the whole layer at once, then least squares on it.

SparseGPT decides a group when its sweep gets there and never comes back. ADMM moves between the weights that explain
the layer's outputs (X) and their projection onto the pattern (D), and pulls the two together by a growing penalty rho:

    X <- (H W + rho D - V)(H + rho I)^-1,   D <- top-N-of-M(X + V / rho),   V <- V + rho (X - D)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.refit import refit
from sparseforge_fx.methods.unseen import rank_unseen, unseen
from sparseforge_fx.pattern import AnyPattern, hard_mask

#: the penalty at the start (on X^T X scaled to a diagonal of ones), and its factor per iteration
RHO, GROWTH = 0.03, 1.12


def prune_alps(
    weight: Tensor,
    moments: Tensor,
    pattern: AnyPattern,
    *,
    damping: float = 0.01,
    iterations: int = 30,
) -> tuple[Tensor, Tensor]:
    """Mask and survivors that keep the layer's outputs.

    Args:
        weight: [out, in]; groups of M run along ``in``.
        moments: [in, in], X^T X of the layer's inputs (any positive scale).
        damping: share of the mean diagonal added to the diagonal.
        iterations: of ADMM; each costs two [out, in] x [in, in] products, beside one eigendecomposition.

    Inputs that are never active have their smallest weights pruned first; what is kept of them stays as it was.
    Returns the weight [out, in] float32 and its boolean mask. Raises SparseForgeError if the Hessian is not finite.
    """
    if not torch.isfinite(moments).all():
        raise SparseForgeError(
            "the calibration inputs of a layer are not finite; check the model's weights and the data"
        )
    dead = unseen(moments)

    def choose(values: Tensor) -> Tensor:
        return hard_mask(rank_unseen(values.abs(), weight, dead), pattern)

    h = moments.float().clone()
    mean = h.diagonal().mean()
    h.diagonal().add_(damping * mean if mean > 0 else 1.0)
    scale = h.diagonal().rsqrt()  # inputs of unit energy: one penalty fits all columns
    target = weight.detach().float() / scale
    values, vectors = torch.linalg.eigh(h * scale[:, None] * scale)
    values = values.clamp(min=0)
    pulled = (target @ vectors) * values  # H W, in the eigenbasis
    kept = target * choose(target)
    dual, rho = torch.zeros_like(kept), RHO
    for _ in range(iterations):
        free = ((pulled + (rho * kept - dual) @ vectors) / (values + rho)) @ vectors.t()
        dual.div_(rho).add_(free)
        kept = dual * choose(dual)
        dual.sub_(kept).mul_(rho)  # V + rho (X - D)
        rho *= GROWTH
    mask = choose(kept)
    fitted = refit(weight, moments, mask, kept * scale, damping=damping)
    return torch.where(dead, weight.float() * mask, fitted), mask
