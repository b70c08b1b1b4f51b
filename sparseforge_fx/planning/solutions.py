"""The layer-wise solution of a weight in every format that is asked about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparseforge_fx.formats import Format
from sparseforge_fx.methods.obs import prune_obs
from sparseforge_fx.methods.rounding import round_weight
from sparseforge_fx.pattern import TWO_FOUR


@torch.no_grad()
def solutions(weight: Tensor, moments: Tensor, formats: Sequence[Format]) -> Iterator[tuple[Format, Tensor]]:
    """Each format with the weight in it, float32 [out, in]: the mask and survivors of SparseGPT, rounded by
    coordinate descent.

    Args:
        weight: [out, in]
        moments: [in, in], X^T X of its inputs at any positive scale.

    What is exact as it is (dense, float) is given as it is.
    """
    pruned = prune_obs(weight, moments, TWO_FOUR).weight if any(form.is_sparse for form in formats) else None
    for form in formats:
        solved = weight.float() if pruned is None or not form.is_sparse else pruned
        yield form, round_weight(solved, form, moments).weight if form.is_quantized else solved
