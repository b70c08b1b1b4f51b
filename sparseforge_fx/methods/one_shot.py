"""Masks without training: magnitude. (Wanda and SparseGPT share methods/layerwise.py.)"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparseforge_fx.methods.base import MaskedWeight
from sparseforge_fx.pattern import AnyPattern, hard_mask


@torch.no_grad()
def magnitude(weights: Sequence[MaskedWeight], pattern: AnyPattern) -> None:
    """Keep the N largest |w| of every group of M: masks are written, weights are not."""
    for w in weights:
        w.mask.copy_(hard_mask(w.weight.abs(), pattern, w.dim))
