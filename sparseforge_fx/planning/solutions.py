"""The layer-wise solution of a weight in every format that is asked about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparseforge_fx.formats import BITS, Format
from sparseforge_fx.methods.grid import Grid
from sparseforge_fx.methods.obs import prune_obs
from sparseforge_fx.pattern import TWO_FOUR


@torch.no_grad()
def solutions(weight: Tensor, moments: Tensor, formats: Sequence[Format]) -> Iterator[tuple[Format, Tensor]]:
    """Each format with the weight in it, float32 [out, in]: the mask of SparseGPT, the survivors rounded in its sweep.

    Args:
        weight: [out, in]
        moments: [in, in], X^T X of its inputs at any positive scale.

    What is exact as it is (dense, float) is given as it is.
    """
    masks = {"dense": torch.ones_like(weight, dtype=torch.bool)}
    for form in formats:
        if form.is_sparse and form.pattern not in masks:
            swept = prune_obs(weight, moments, TWO_FOUR)
            masks[form.pattern], pruned = swept.mask, swept.weight
        if form.is_quantized:
            grid = Grid(BITS[form.values], form.group or weight.shape[1])
            yield form, prune_obs(weight, moments, TWO_FOUR, mask=masks[form.pattern], grid=grid).weight
        else:
            yield form, pruned if form.is_sparse else weight.float()
