"""CAST (arXiv 2509.25996): the forward pass stays dense, and AdamS shrinks what will be pruned until it hardly matters.

Which weights are candidates (not among the N largest |w| of their group) is the optimizer's business only. Learnable
scales, one per output row and half of its inputs, make up for the energy that goes with the candidates; they take the
place of the graph's masks, start at one, and are folded into the weights at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseforge_fx.methods.base import TrainedConfig, TrainedMethod, add_up
from sparseforge_fx.methods.optimizers import AdamS
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import hard_mask
from sparseforge_fx.ranges import AtLeastZero, Count


@dataclass(frozen=True)
class CastConfig(TrainedConfig):
    """Constants of CAST.

    Attributes:
        update_every: steps between two choices of the candidates.
        l1: lambda of AdamS; the authors take 4e-7 for LLaMA-2-7B. Adam's normalisation makes the end of the run all but
            independent of it.
        blocks: scales per output row.
    """

    own_optimizer: ClassVar[bool] = True
    prunes_on_the_way: ClassVar[bool] = False

    update_every: Count = 10
    l1: AtLeastZero = 4e-7
    blocks: Count = 2

    def build(self, weights: Sequence[MaskedWeight]) -> Cast:
        return Cast(self, weights)


class Cast(TrainedMethod):
    """The state of CAST: candidates, and scales that learn from the weights' gradients as those go by."""

    def __init__(self, config: CastConfig, weights: Sequence[MaskedWeight]):
        super().__init__(config, weights)
        self.kept: dict[str, Tensor] = {}
        self.scales: dict[str, nn.Parameter] = {}
        for w in weights:
            *rows, columns = w.weight.movedim(w.dim, -1).shape
            blocks = config.blocks if columns % (config.blocks * getattr(config.pattern, "m", 1)) == 0 else 1
            self.scales[w.fqn] = nn.Parameter(torch.ones(*rows, blocks, device=w.weight.device))
            self.hooks.append(w.weight.register_hook(lambda g, w=w, live=w.weight: self._learn(w, live, g)))
        self._choose()

    def parameters(self) -> list[nn.Parameter]:
        return list(self.scales.values())

    def optimizer(self, parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
        candidates = [replace(w, mask=self.kept[w.fqn]) for w in self.weights]
        return AdamS(parameters, candidates, lambda: self.progress(self.step), self.config.l1, **options)

    @torch.no_grad()
    def _learn(self, w: MaskedWeight, live: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the scaled weight -> that of the scales, and that of the weight."""
        scale = self.scales[w.fqn]
        g = gradient.movedim(w.dim, -1).float()
        product = (g * live.detach().movedim(w.dim, -1)).view(*scale.shape, -1).sum(-1)
        product = product.to(scale.dtype)
        scale.grad = product if scale.grad is None else scale.grad + product
        return (g * self._spread(w)).to(gradient.dtype).movedim(-1, w.dim)

    def _spread(self, w: MaskedWeight) -> Tensor:
        """Scales, one per weight, with the reduction dimension last."""
        scale = self.scales[w.fqn].detach()
        return scale.repeat_interleave(w.weight.shape[w.dim] // scale.shape[-1], -1)

    def advance(self, progress: float) -> None:
        if progress >= 1:
            self.fix()
            return
        if self.step % self.config.update_every == 0:
            self._choose()
        for w in self.weights:
            w.mask.copy_(self._spread(w).movedim(-1, w.dim))

    def _choose(self) -> None:
        changed: list[Tensor] = []
        total = 0
        for w in self.weights:
            new = hard_mask(w.weight.detach().abs(), self.pattern, w.dim)
            old = self.kept.setdefault(w.fqn, new)
            changed.append((new != old).sum())
            total += new.numel()
            old.copy_(new)
        self.flip_rate = add_up(changed) / max(1, total)

    @torch.no_grad()
    def fix(self) -> None:
        if self.fixed:
            return
        self._choose()
        for w in self.weights:
            w.weight.mul_(self._spread(w).movedim(-1, w.dim))
            w.mask.copy_(self.kept[w.fqn])
        for scale in self.scales.values():
            scale.fill_(1)
        self.fixed = True

    def metrics(self) -> dict[str, float]:
        """``candidates``: mean |w| of what will be pruned over that of the rest, 0 where pruning costs nothing."""
        small = large = 0.0
        for w in self.weights:
            size, kept = w.weight.detach().abs(), self.kept[w.fqn]
            small, large = small + float(size[~kept].sum()), large + float(size[kept].sum())
        share = sum(float(k.float().mean()) for k in self.kept.values()) / max(1, len(self.kept))
        return {"candidates": small / max(1e-30, large), "flip_rate": self.flip_rate, "density": share}

    def held(self) -> dict[str, dict[str, Tensor]]:
        return {**super().held(), "kept": self.kept, "scales": dict(self.scales)}
