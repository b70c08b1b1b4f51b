"""SparseForge (arXiv 2605.06402): soft masks driven by curvature, heated, then quenched to exact N:M.

score   obd: s = h w^2 (cost of deletion) | ratio: s = |w| / sqrt(h + eps) | magnitude: s = |w|
gate    site: G = sigmoid((z - quantile(z, sparsity)) / T), z the scores standardised per weight (the paper's), by
        half their 16-84 % range: a normal score's standard deviation, which h w^2, with its long tail, does not have
        pattern: G = sum_k softmax(-cost_k / T) pattern_k over the legal patterns of a group, cost_k the share of the
        group's score that pattern k deletes; every group keeps mass N, so soft meets hard by itself as T -> 0
pull    G <- G - eta (m - top-N(G)): score structural hardening
mask    m <- clip((1 - a) m + a G, 0, 1) every K steps; in the graph e = lambda m + (1 - lambda) hard(m)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods import schedule
from sparseforge_fx.methods.base import TrainedConfig, TrainedMethod
from sparseforge_fx.methods.curvature import ESTIMATORS, Curvature, Estimator
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import (
    TWO_FOUR,
    AnyPattern,
    Pattern,
    all_patterns,
    from_groups,
    hard_mask,
    to_groups,
)
from sparseforge_fx.ranges import AtLeastZero, Count, Positive, Share, ShareAboveZero

#: the authors' run on LLaMA-2-7B, to which their per-update constants belong
REFERENCE_STEPS, REFERENCE_UPDATES = 20_000, 20_000 // 30
SCORES, GATES = ("obd", "ratio", "magnitude"), ("site", "pattern")
#: share of its mean that every curvature gets in ``obd``'s scores: where h is zero (no gradient, no token) magnitude
#: decides, not the position; too small to change what is known (a hundredth was no better: docs/measurements.md)
FLOOR = 1e-7
#: probes of hutchinson before the first mask update; the others' first estimate is good enough
WARM_PROBES = {"hutchinson": 4}
SAMPLE = 1 << 15  # scores that a weight's quantiles are taken from; their error in rank is below 0.3 %


@dataclass(frozen=True)
class SparseForgeConfig(TrainedConfig):
    """Constants of the annealing; times are shares of the run, rates are per mask update.

    Attributes:
        start: ``dense``: masks of one, moved by scores. ``sparsegpt``, ``alps``: the masks of that layer-wise
            solution; a quench then leads from the dense weights to it: pruned weights fade with lambda while the
            survivors take their compensation over.
        softness_start: lambda at the first step.
        heat_end, quench_end: lambda is 1 before the first, falls linearly, and is 0 after the second; then masks are
            fixed.
        sparsity_warmup: end of the linear warm-up of the target sparsity.
        mask_rate: a; score_noise_floor: eps of ``ratio``.
        structure: final eta * lambda_mid of the structural hardening, reached at ``quench_end`` (0 switches it off).
        probe_every, update_every: steps between curvature probes / mask updates. Hutchinson's first estimates say
            little: it begins with ``WARM_PROBES`` probes at consecutive steps, and the masks move after these.
        curvature_vectors: random vectors of a hutchinson probe; each costs as much as the first.
        masked_decay: extra decay of weights per step, proportional to 1 - m.
    """

    curvature: Estimator = "gauss_newton"
    curvature_beta: Share = 0.98
    curvature_vectors: Count = 1
    probe_every: Count = 1
    score: Literal["obd", "ratio", "magnitude"] = "obd"
    score_noise_floor: Positive = 1e-12
    gate: Literal["site", "pattern"] = "site"
    heat_end: Share = 0.1
    quench_end: Share = 0.85
    sparsity_warmup: Share = 0.1
    temperature_start: Positive = 1.0
    temperature_floor: Positive = 0.05
    temperature_half_life: Positive = 0.04
    softness_start: Share = 1.0
    structure: AtLeastZero = 0.5
    update_every: Count = 1
    mask_rate: ShareAboveZero = 0.1
    masked_decay: Share = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choose("curvature", ESTIMATORS)
        self.choose("score", SCORES)
        self.choose("gate", GATES)
        if self.gate == "pattern" and not (isinstance(self.pattern, Pattern) and self.pattern.m <= 8):
            raise SparseForgeError(
                f"gate 'pattern' weighs every legal mask of a group, too many or none for {self.pattern}: "
                "take gate 'site', or N:M with M up to 8"
            )
        if self.start != "dense" and self.quench_end > 0 and not self.softness_start <= 0.95:
            raise SparseForgeError(
                f"softness_start {self.softness_start} leaves masks of 1 and pruned ones alike; take at most 0.95"
            )
        if self.heat_end > self.quench_end:
            raise SparseForgeError(f"need heat_end <= quench_end, got {self.heat_end} and {self.quench_end}")

    @property
    def starts_fixed(self) -> bool:
        return self.start != "dense" and self.quench_end == 0

    def build(self, weights: Sequence[MaskedWeight]) -> SparseForge:
        return SparseForge(self, weights)


def paper_preset(steps: int, pattern: AnyPattern = TWO_FOUR, **changes: Any) -> SparseForgeConfig:
    """The authors' constants (arXiv 2605.06402), scaled to a run of ``steps``.

    K = 30 of 20,000 steps; with fewer steps K shrinks (to 5 from 150 steps on, to 1 below 60) and the per-update
    rates (a = 0.1, gamma = 0.975, beta = 0.985) are rescaled so that the run travels the same way in fewer updates.
    lambda falls from 10 % to 85 % of the run.
    """
    every = max(
        1, round(30 * steps / REFERENCE_STEPS), min(5, steps // 30)
    )  # below 5, mask updates would cost over a tenth of a step
    updates = max(1, steps // every)
    keep = schedule.rescale_decay(0.9, updates, REFERENCE_UPDATES)
    # gamma^k = 1/2 after log(0.5)/log(0.975) = 27.4 updates of 667
    base = SparseForgeConfig(
        steps=steps,
        pattern=pattern,
        update_every=every,
        probe_every=every,
        mask_rate=1 - keep,
        curvature_beta=schedule.rescale_decay(0.985, updates, REFERENCE_UPDATES),
        temperature_half_life=27.4 / REFERENCE_UPDATES,
    )
    return replace(base, **changes)


def tuned_preset(steps: int, pattern: AnyPattern = TWO_FOUR, **changes: Any) -> SparseForgeConfig:
    """Ours: masks and survivors of the layer-wise ALPS solution from the first step on, so that all of the run heals.

    In runs of 30 and 60 steps nothing that delayed the hard masks did better; ``quench_end=0.4, softness_start=0.6``
    lets the pruned weights fade from the dense model instead.
    """
    base = SparseForgeConfig(steps=steps, pattern=pattern, start="alps", heat_end=0.0, quench_end=0.0)
    return replace(base, **changes)


class SparseForge(TrainedMethod):
    """The state of the annealing over a set of masked weights; see the module's text."""

    plain = (*TrainedMethod.plain, "faded_to")

    def __init__(self, config: SparseForgeConfig, weights: Sequence[MaskedWeight]):
        super().__init__(config, weights)
        scored = config.start == "dense" and config.score != "magnitude"
        self.curvature: Curvature = Curvature(
            config.curvature_beta, config.curvature if scored else None, config.curvature_vectors
        )
        #: steps that probe before masks move; where the quench ends earlier, one
        warm = WARM_PROBES.get(self.curvature.estimator or "", 1)
        self.warm = warm if config.heat_end * config.steps >= warm else 1
        self.soft: dict[str, Tensor] = {}  # m, where the graph's mask is no longer m itself (during the quench)
        self.faded_to = 1.0
        self.compensation: dict[str, Tensor] = {}  # what the survivors have still to take over, per unit of lambda
        if config.start == "dense" and config.quench_end == 0:
            raise SparseForgeError(
                "quench_end 0 leaves no time to choose masks: start from alps or sparsegpt, or give the quench steps"
            )

    # -- the loop's side ---------------------------------------------------------------------------------------------
    def wants_curvature(self, step: int) -> bool:
        c = self.config
        wanted = self.curvature.estimator is not None and self.progress(step) < c.quench_end
        return wanted and (step % c.probe_every == 0 or step < self.warm)

    def advance(self, progress: float) -> None:
        """Mask update every K steps, then the effective masks of the next step; hard and final once the quench is
        over."""
        if progress >= self.config.quench_end:
            self.fix()
            return
        lam = self.softness(progress)
        if self.config.start != "dense":
            self._fade(lam)
            return
        if self.step % self.config.update_every == 0 and self.step >= self.warm:
            self._update(progress)
        for w in self.weights:
            if self.config.masked_decay:
                w.weight.mul_(1 - self.config.masked_decay * (1 - w.mask.float()))
            if lam < 1:
                soft = self.soft.setdefault(w.fqn, w.mask.clone())
                w.mask.copy_(torch.lerp(hard_mask(soft, self.pattern, w.dim).to(soft.dtype), soft, lam))

    def softness(self, progress: float) -> float:
        """lambda: how much of the soft mask is in the effective one."""
        return self.config.softness_start * schedule.softness(progress, self.config.heat_end, self.config.quench_end)

    @torch.no_grad()
    def start_from(self, dense: dict[str, Tensor]) -> None:
        """Weights and masks hold a layer-wise solution: go back to lambda = ``softness_start`` on the way to it from
        ``dense``."""
        lam = self.softness(0.0) if self.config.quench_end > 0 else 0.0
        if lam == 0:
            self.fix()
            return
        for w in self.weights:
            kept = w.mask.bool()
            self.compensation[w.fqn] = torch.where(kept, w.weight - dense[w.fqn], 0.0)
            w.weight.copy_(dense[w.fqn])
        self._fade(lam)

    def _fade(self, lam: float) -> None:
        """Survivors (mask 1) take their compensation over as the others' mask goes down to ``lam``."""
        before, self.faded_to = self.faded_to, lam
        for w in self.weights:
            if w.fqn in self.compensation:
                w.weight.add_(self.compensation[w.fqn], alpha=before - lam)
            w.mask.masked_fill_(w.mask != 1, lam)

    @torch.no_grad()
    def fix(self) -> None:
        """m = hard(m), for good; what is left of the compensation is given; curvature and soft masks are freed."""
        if self.compensation:
            self._fade(0.0)
        for w in self.weights:
            if w.fqn in self.soft:
                w.mask.copy_(self.soft[w.fqn])
        self.soft.clear()
        self.compensation.clear()
        self.curvature.values.clear()
        super().fix()

    # -- the mask update ---------------------------------------------------------------------------------------------
    def _update(self, progress: float) -> None:
        c = self.config
        flips = total = 0
        heat = schedule.temperature(progress, c.temperature_start, c.temperature_floor, c.temperature_half_life)
        reached = schedule.target_sparsity(progress, c.sparsity_warmup, 1.0)
        eta = schedule.structure_strength(progress, c.sparsity_warmup, c.quench_end, c.structure)
        for w in self.weights:
            if c.score != "magnitude" and not self.curvature.values:
                continue  # no probe yet
            mask = self.soft.get(w.fqn, w.mask)
            score = self.score(w)
            gate = self.gate(score, w.dim, heat, reached)
            before = hard_mask(self.sample(mask, w.dim), self.pattern)
            if eta:
                # top-N(G) is top-N of the scores, which do not tie where the sigmoid saturates
                gate.sub_(mask.float() - hard_mask(score, self.pattern, w.dim).float(), alpha=eta)
            mask.copy_(mask.float().lerp_(gate, c.mask_rate).clamp_(0, 1))
            after = hard_mask(self.sample(mask, w.dim), self.pattern)
            flips, total = flips + int((after != before).sum()), total + before.numel()
        self.flip_rate = flips / max(1, total)

    def score(self, w: MaskedWeight) -> Tensor:
        """Importance of each weight, float32, the weight's shape. Magnitude where no gradient has ever come."""
        value = w.weight.detach().float()
        if self.config.score == "magnitude" or w.fqn not in self.curvature.values:
            return value.abs()
        h = self.curvature.values[w.fqn].float()
        if h.dim() < value.dim():  # activation: one value per input
            h = h.unsqueeze(-1 if w.dim == value.dim() - 2 else -2)
        if self.config.score == "ratio":
            return value.abs() / (h + self.config.score_noise_floor).sqrt()
        return value.square() * (h + (FLOOR * h.mean()).clamp(min=1e-30))

    def gate(self, score: Tensor, dim: int, temperature: float, reached: float) -> Tensor:
        """G in [0, 1]; ``reached`` is the share of the final sparsity that the warm-up asks for."""
        pattern = self.pattern
        if self.config.gate == "site":
            low, tau, high = _quantiles(score, 0.16, reached * (1 - pattern.density), 0.84)
            return torch.sigmoid((score - tau) / (temperature * ((high - low) / 2).clamp(min=1e-38)))
        assert isinstance(pattern, Pattern)
        grouped = to_groups(score, pattern, dim)
        share = grouped / grouped.mean(-1, keepdim=True).clamp(min=1e-38)
        legal = all_patterns(pattern, score.device)
        soft = ((share @ legal.t()) / temperature).softmax(-1) @ legal  # -cost_k and kept_k differ by a constant
        return from_groups(1 - reached * (1 - soft), dim)

    # -- reports and resuming ----------------------------------------------------------------------------------------
    def metrics(self) -> dict[str, float]:
        c, progress = self.config, self.progress(self.step)
        heat = schedule.temperature(progress, c.temperature_start, c.temperature_floor, c.temperature_half_life)
        return {
            "temperature": 0.0 if self.fixed else heat,
            "lambda": 0.0 if self.fixed else self.softness(progress),
            **super().metrics(),
        }

    def held(self) -> dict[str, dict[str, Tensor]]:
        return {**super().held(), "soft": self.soft, "compensation": self.compensation}


def _quantiles(values: Tensor, *shares: float) -> list[Tensor]:
    """Quantiles of a matrix, or of each matrix of a stack, from an evenly spaced sample; deterministic. Share 0 is the
    smallest value."""
    flat = values.flatten(-2)
    ordered = flat[..., :: max(1, flat.shape[-1] // SAMPLE)].sort().values
    last = ordered.shape[-1] - 1
    found = [ordered[..., min(last, round(q * last))] for q in shares]
    return found if values.dim() == 2 else [f[:, None, None] for f in found]
