"""Masks without training: magnitude, Wanda (arXiv 2306.11695), SparseGPT (2301.00774), ALPS (2406.07831)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from torch import Tensor

from sparseforge_fx.methods.alps import prune_alps
from sparseforge_fx.methods.grid import Grid
from sparseforge_fx.methods.layerwise import LayerSolution, Solve
from sparseforge_fx.methods.obs import prune_obs
from sparseforge_fx.methods.unseen import rank_unseen, unseen
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import AnyPattern, Pattern, Unstructured, hard_mask
from sparseforge_fx.ranges import Count, Range, checked

#: share of the mean diagonal; OBS gives up beyond
Damping = Annotated[float, Range(0, 1e6, above=True)]


@torch.no_grad()
def magnitude(weights: Sequence[MaskedWeight], pattern: AnyPattern) -> None:
    """Keep the N largest |w| of every group of M: masks are written, weights are not."""
    for w in weights:
        w.mask.copy_(hard_mask(w.weight.abs(), pattern, w.dim))


def wanda(pattern: AnyPattern) -> Solve:
    """Keep the largest |w_ij| ||x_j|| (eq. 1): of every group; unstructured, of every output row. Survivors stay as
    they are."""

    def solve(weight: Tensor, mask: Tensor, moments: Tensor) -> LayerSolution:
        scores = weight.abs().float() * moments.diagonal().sqrt()
        columns = weight.shape[1]
        per_row = int(pattern.density * columns + 1e-6)  # rows together must not exceed the share of the tensor
        kept = Pattern(per_row, columns) if isinstance(pattern, Unstructured) else pattern
        chosen = hard_mask(rank_unseen(scores, weight, unseen(moments)), kept)
        return LayerSolution(weight * chosen, chosen)

    return solve


@checked
def sparsegpt(
    pattern: AnyPattern,
    *,
    damping: Damping = 0.01,
    choose_masks: bool = True,
    bits: Annotated[int, Range(2, 8)] | None = None,
    bits_group: Count = 128,
) -> Solve:
    """Optimal Brain Surgeon (methods/obs.py).

    ``choose_masks=False`` keeps the largest entries of the present mask. ``bits`` puts the survivors on an integer grid
    in the same sweep, one scale per row and ``bits_group`` inputs.
    """
    grid = None if bits is None else Grid(bits, bits_group).check()

    def solve(weight: Tensor, mask: Tensor, moments: Tensor) -> LayerSolution:
        fixed = None if choose_masks else hard_mask(mask, pattern)
        result = prune_obs(weight, moments, pattern, mask=fixed, damping=damping, grid=grid)
        note = f"damping raised to {result.damping:g}" if result.damping > damping else ""
        return LayerSolution(result.weight, result.mask, note)

    return solve


@checked
def alps(pattern: AnyPattern, *, damping: Damping = 0.01, iterations: Count = 30) -> Solve:
    """Masks by ADMM over the whole layer, then least squares on them (methods/alps.py)."""

    def solve(weight: Tensor, mask: Tensor, moments: Tensor) -> LayerSolution:
        return LayerSolution(*prune_alps(weight, moments, pattern, damping=damping, iterations=iterations))

    return solve


#: layer-wise methods by the names that users type
LAYERWISE: dict[str, Callable[..., Solve]] = {"wanda": wanda, "sparsegpt": sparsegpt, "alps": alps}
