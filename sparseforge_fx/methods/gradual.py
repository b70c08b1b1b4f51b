"""Magnitude pruning in small doses while the model trains: GMP (arXiv 1710.01878) and IMP (arXiv 1506.02626).

Both end in the N largest |w| of every group of M. On the way, of the weights that this would delete, the share s(t)
with the smallest |w| is gone: s is the cubic ramp of GMP (its eq. 1), or IMP's equal rounds of prune and retrain, each
taking the same share of what is left. What is deleted stays deleted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sparseforge_fx.methods import schedule
from sparseforge_fx.methods.base import TrainedConfig, TrainedMethod, add_up
from sparseforge_fx.methods.part import kth_smallest
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import hard_mask
from sparseforge_fx.ranges import Count, ShareAboveZero


@dataclass(frozen=True)
class GradualConfig(TrainedConfig):
    """Constants of gradual magnitude pruning.

    Attributes:
        ramp: ``cubic`` (GMP) or ``rounds`` (IMP).
        end: share of the run after which the masks are final; the rest heals.
        update_every: GMP's steps between two updates.
        rounds: IMP's rounds.
    """

    ramp: Literal["cubic", "rounds"] = "cubic"
    end: ShareAboveZero = 0.6
    update_every: Count = 1
    rounds: Count = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choose("ramp", ("cubic", "rounds"))

    @property
    def idle(self) -> dict[str, str]:
        other = "rounds" if self.ramp == "cubic" else "update_every"
        return super().idle | {other: f"ramp is {self.ramp!r}"}

    def build(self, weights: Sequence[MaskedWeight]) -> Gradual:
        return Gradual(self, weights)


class Gradual(TrainedMethod):
    """The state of gradual pruning."""

    def share(self, progress: float) -> float:
        """s: how much of what the final pattern deletes is gone by then, in [0, 1]."""
        c = self.config
        if c.ramp == "cubic":
            return schedule.cubic_ramp(progress, c.end)
        done = min(c.rounds, int(progress / c.end * c.rounds) + 1)  # the first round is pruned before it trains
        left = self.pattern.density ** (done / c.rounds)
        return (1 - left) / (1 - self.pattern.density)

    def advance(self, progress: float) -> None:
        if progress >= self.config.end:
            self.fix()
        elif self.config.ramp == "rounds" or self.step % self.config.update_every == 0:
            self._prune(self.share(progress))

    @torch.no_grad()
    def fix(self) -> None:
        if not self.fixed:
            self._prune(1.0)
        self.fixed = True

    def _prune(self, share: float) -> None:
        flips: list[torch.Tensor] = []
        total = 0
        for w in self.weights:
            sizes = w.weight.abs().float() * w.mask  # what is gone has no size, and cannot come back
            doomed = sizes[~hard_mask(sizes, self.pattern, w.dim)]
            count = round(share * (doomed.numel() if w.part is None else w.part.sums(doomed.numel())[0]))
            if count == 0:
                continue
            limit = kth_smallest(doomed, count, w.part)
            keep = hard_mask(sizes, self.pattern, w.dim) | (sizes > limit)
            flips.append((keep != w.mask.bool()).sum())
            total += keep.numel()
            w.mask.copy_(keep)
        self.flip_rate = self.rate(add_up(flips), total)
