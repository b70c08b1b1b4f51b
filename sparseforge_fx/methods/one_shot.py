"""Masks without training: magnitude, Wanda (arXiv 2306.11695), SparseGPT (2301.00774), ALPS (2406.07831)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, get_args

import torch
from torch import Tensor

from sparseforge_fx.methods.alps import prune_alps
from sparseforge_fx.methods.config import MethodConfig
from sparseforge_fx.methods.experts import EXPERT_TOKENS
from sparseforge_fx.methods.layerwise import LayerSolution
from sparseforge_fx.methods.obs import prune_obs
from sparseforge_fx.methods.rounding import Values
from sparseforge_fx.methods.unseen import rank_unseen, unseen
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import AnyPattern, Pattern, Unstructured, check_pattern, hard_mask
from sparseforge_fx.ranges import Count, CountFromZero, Positive, Range

#: share of the mean diagonal; OBS gives up beyond
Damping = Annotated[float, Range(0, 1e6, above=True)]


@dataclass(frozen=True)
class MagnitudeConfig(MethodConfig):
    """Keep the N largest |w| of every group of M; looks at no data."""


@torch.no_grad()
def magnitude(weights: Sequence[MaskedWeight], pattern: AnyPattern) -> None:
    """Keep the N largest |w| of every group of M: masks are written, weights are not."""
    for w in weights:
        w.mask.copy_(hard_mask(w.weight.abs(), pattern, w.dim))


def tell_new(weights: Sequence[MaskedWeight], pattern: AnyPattern) -> dict[str, str]:
    """Notes, by weight, on those that are not N:M yet where others are: a model whose own masks are taken."""
    new = [w.fqn for w in weights if not check_pattern(w.weight, pattern, w.dim)]
    return {} if len(new) == len(weights) else dict.fromkeys(new, f"was not {pattern} yet, and is pruned by magnitude")


@dataclass(frozen=True)
class LayerwiseConfig(MethodConfig, ABC):
    """The constants of a layer-wise method.

    Attributes:
        values: what the survivors are kept in. Unless ``float``, a second walk over the same data puts the weights on
            that grid (methods/rounding.py).
        reorder: let channels change places where the graph allows it, so that groups lose less (methods/reorder.py).
            The model computes the same before the pruning; weights of the dense one no longer stand at their places.
        reconstruct, reconstruct_lr: passes over the calibration data in which every repeated block then learns to hand
            on what the dense one does, and AdamW's rate there (methods/reconstruct.py); 0: none. Rounded values learn
            so once more.
        expert_tokens: an expert of a mixture that saw fewer calibration tokens is pruned by magnitude.
        every_token: calibrate every expert on all tokens, not on those that are routed to it.
    """

    values: Values = field(default="float", kw_only=True)
    reorder: bool = field(default=False, kw_only=True)
    reconstruct: CountFromZero = field(default=0, kw_only=True)
    reconstruct_lr: Positive = field(default=1e-3, kw_only=True)
    expert_tokens: Count = field(default=EXPERT_TOKENS, kw_only=True)
    every_token: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choose("values", get_args(Values))
        self.check_reorder(self.reorder)

    @property
    def idle(self) -> dict[str, str]:
        return super().idle | ({} if self.reconstruct else {"reconstruct_lr": "reconstruct is 0"})

    @abstractmethod
    def solve(self, weight: Tensor, mask: Tensor, moments: Tensor) -> LayerSolution:
        """Weight and mask of one layer (a :data:`~sparseforge_fx.methods.layerwise.Solve`)."""


@dataclass(frozen=True)
class WandaConfig(LayerwiseConfig):
    """Keep the largest |w_ij| ||x_j|| (eq. 1): of every group; unstructured, of every output row. Survivors stay as
    they are."""

    def solve(self, weight: Tensor, mask: Tensor, moments: Tensor) -> LayerSolution:
        scores = weight.abs().float() * moments.diagonal().sqrt()
        columns = weight.shape[1]
        per_row = int(self.pattern.density * columns + 1e-6)  # rows together must not exceed the share of the tensor
        kept = Pattern(per_row, columns) if isinstance(self.pattern, Unstructured) else self.pattern
        chosen = hard_mask(rank_unseen(scores, weight, unseen(moments)), kept)
        return LayerSolution(weight * chosen, chosen)


@dataclass(frozen=True)
class SparseGPTConfig(LayerwiseConfig):
    """Optimal Brain Surgeon (methods/obs.py).

    Attributes:
        damping: share of the mean diagonal of X^T X that is added to its diagonal.
        choose_masks: False keeps the largest entries of the present mask.
    """

    damping: Damping = 0.01
    choose_masks: bool = True

    def solve(self, weight: Tensor, mask: Tensor, moments: Tensor) -> LayerSolution:
        fixed = None if self.choose_masks else hard_mask(mask, self.pattern)
        result = prune_obs(weight, moments, self.pattern, mask=fixed, damping=self.damping)
        note = f"damping raised to {result.damping:g}" if result.damping > self.damping else ""
        return LayerSolution(result.weight, result.mask, note)


@dataclass(frozen=True)
class AlpsConfig(LayerwiseConfig):
    """Masks by ADMM over the whole layer, then least squares on them (methods/alps.py).

    Attributes:
        damping: share of the mean diagonal of X^T X that is added to its diagonal.
        iterations: of ADMM.
    """

    damping: Damping = 0.01
    iterations: Count = 30

    def solve(self, weight: Tensor, mask: Tensor, moments: Tensor) -> LayerSolution:
        found = prune_alps(weight, moments, self.pattern, damping=self.damping, iterations=self.iterations)
        return LayerSolution(*found)


#: layer-wise methods by the names that users type
LAYERWISE: dict[str, type[LayerwiseConfig]] = {"wanda": WandaConfig, "sparsegpt": SparseGPTConfig, "alps": AlpsConfig}
