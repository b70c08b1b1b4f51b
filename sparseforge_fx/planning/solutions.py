"""The layer-wise solution of a weight in every format that is asked about."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseforge_fx.formats import Format
from sparseforge_fx.methods.obs import prune_obs
from sparseforge_fx.methods.rounding import round_weight
from sparseforge_fx.pattern import TWO_FOUR


@torch.no_grad()
def solutions(weight: Tensor, moments: Tensor, formats: Sequence[Format]) -> dict[Format, Tensor]:
    """Each format with the weight in it, float32 [out, in]: the mask and survivors of SparseGPT, rounded by
    coordinate descent. Every output is solved by itself: some rows of a weight give the same rows of its solutions.

    Args:
        weight: [out, in]
        moments: [in, in], X^T X of its inputs at any positive scale.

    What is exact as it is (dense, float) is given as it is.
    """
    floats = {"dense": weight.float()}
    if any(form.is_sparse for form in formats):
        floats["2:4"] = prune_obs(weight, moments, TWO_FOUR).weight
    found = {form: floats[form.pattern] for form in formats}
    alone = {form: form._replace(pattern="dense") for form in formats if form.is_quantized}
    for values in dict.fromkeys(alone.values()):
        alike = [form for form in alone if alone[form] == values]  # in one call: a sweep costs by its columns
        rounded = round_weight(torch.cat([floats[form.pattern] for form in alike]), values, moments).weight
        found |= zip(alike, rounded.split(len(weight)), strict=True)
    return found
