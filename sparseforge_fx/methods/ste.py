"""Masks by magnitude, weights by straight-through gradients, and a decay of what is masked: SR-STE and AST.

m        top-N of |w| of every group, every ``update_every`` steps
SR-STE   g <- g + lambda (1 - m) w, before the optimizer (arXiv 2102.04010, eq. 9)
AST      the decay joins AdamW after the first moment (methods/optimizers.py), and lambda grows linearly over the
         first quarter of the run (arXiv 2407.20584, eqs. 20-23)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sparseforge_fx.methods import schedule
from sparseforge_fx.methods.base import TrainedConfig, TrainedMethod, add_up
from sparseforge_fx.methods.config import Beside
from sparseforge_fx.methods.optimizers import AnnealedDecayAdamW
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import TWO_FOUR, AnyPattern, hard_mask
from sparseforge_fx.ranges import AtLeastZero, Count, Share

#: of AST's runs on GPT-2, which K and lambda belong to
REFERENCE_STEPS = 40_000
#: alpha = 2/3 for small models at T = 2, and AdamW's decay
AST_BESIDE = Beside(task=1 / 3, kl=2 / 3, temperature=2.0, weight_decay=0.1)


@dataclass(frozen=True)
class StraightThroughConfig(TrainedConfig):
    """Constants of SR-STE and AST.

    Attributes:
        update_every: steps between two mask updates.
        decay: lambda at its plateau.
        decay_warmup: share of the run over which lambda grows from 0; 0: it is constant.
        decay_joins: ``gradient`` (SR-STE) or ``update``, after the first moment (AST).
    """

    own_optimizer: ClassVar[bool] = True

    update_every: Count = 10
    decay: AtLeastZero = 2e-4
    decay_warmup: Share = 0.0
    decay_joins: Literal["gradient", "update"] = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choose("decay_joins", ("gradient", "update"))

    def build(self, weights: Sequence[MaskedWeight]) -> StraightThrough:
        return StraightThrough(self, weights)


def sr_ste_preset(steps: int, pattern: AnyPattern = TWO_FOUR, **changes: Any) -> StraightThroughConfig:
    """SR-STE as its authors' code has it (github.com/aojunzz/NM-sparsity, ``devkit/sparse_ops``): masks anew at every
    step, lambda 2e-4 at :data:`REFERENCE_STEPS`.

    Its own runs are of images under SGD; AST compares with it on GPT-2 over 40,000 steps of AdamW, which is the length
    taken here. lambda times the number of steps is kept, so that what is pruned shrinks as much over a short run as far
    as the rate lets it. Loss and weight decay are those of every method: SR-STE distils nothing.
    """
    base = StraightThroughConfig(steps=steps, pattern=pattern, update_every=1, decay=2e-4 * REFERENCE_STEPS / steps)
    return replace(base, **changes)


def ast_preset(steps: int, pattern: AnyPattern = TWO_FOUR, **changes: Any) -> StraightThroughConfig:
    """AST as its authors run it on GPT-2 (github.com/thu-ml/Adaptive-Sparse-Trainer, README and ``main.py``): masks by
    magnitude every K = 10 of 40,000 steps, lambda 1e-4 after a quarter of the run; :data:`AST_BESIDE` says the loss and
    the weight decay.

    K is the same share of the run and at least 1; lambda times the number of steps is kept. What their "boosted" runs
    have beside it is ``slorb_block=16``. Departures: 7B takes KL with a share of 1/3; their released optimizer decays
    kept weights twice as much as pruned ones (methods/optimizers.py), the paper's sign is meant here; embeddings and
    the head train in theirs (``trainable="all"``).
    """
    scale = REFERENCE_STEPS / steps
    base = StraightThroughConfig(
        steps=steps,
        pattern=pattern,
        update_every=max(1, round(10 / scale)),
        decay=1e-4 * scale,
        decay_warmup=0.25,
        decay_joins="update",
    )
    return replace(base, **changes)


class StraightThrough(TrainedMethod):
    """The state of SR-STE and AST. ``initial_flip_rate``: share of the mask that differs from the first one."""

    plain = (*TrainedMethod.plain, "initial_flip_rate")

    def __init__(self, config: StraightThroughConfig, weights: Sequence[MaskedWeight]):
        super().__init__(config, weights)
        self.first: dict[str, Tensor] = {}  # the first masks, a sample of each
        self.initial_flip_rate = 0.0
        if config.start == "dense":
            self._select()

    def start_from(self, dense: dict[str, Tensor]) -> None:
        self._select()

    def decay(self) -> float:
        """lambda at the present step."""
        return self.config.decay * schedule.ramp(self.progress(self.step), 0.0, self.config.decay_warmup)

    def optimizer(self, parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
        if self.config.decay_joins == "update":
            return AnnealedDecayAdamW(parameters, self.weights, self.decay, **options)
        optimizer = super().optimizer(parameters, **options)
        optimizer.register_step_pre_hook(lambda *_: self._decay_gradients())
        return optimizer

    @torch.no_grad()
    def _decay_gradients(self) -> None:
        for w in self.weights:
            if w.weight.grad is not None:
                w.weight.grad.addcmul_(1 - w.mask.to(w.weight.dtype), w.weight, value=self.decay())

    def advance(self, progress: float) -> None:
        if self.step % self.config.update_every == 0:
            self._select()

    @torch.no_grad()
    def _select(self) -> None:
        changed: list[Tensor] = []
        initial: list[Tensor] = []
        total = 0
        for w in self.weights:
            new = hard_mask(w.weight.abs(), self.pattern, w.dim)
            sampled, before = self.sample(new, w.dim), self.sample(w.mask, w.dim).bool()
            first = self.first.setdefault(w.fqn, sampled.clone())
            changed.append((sampled != before).sum())
            initial.append((sampled != first).sum())
            total += sampled.numel()
            w.mask.copy_(new)
        self.flip_rate = add_up(changed) / max(1, total)
        self.initial_flip_rate = add_up(initial) / max(1, total)

    def metrics(self) -> dict[str, float]:
        return {"masked_decay": self.decay(), **super().metrics(), "initial_flip_rate": self.initial_flip_rate}

    def held(self) -> dict[str, dict[str, Tensor]]:
        return {**super().held(), "first": self.first}
