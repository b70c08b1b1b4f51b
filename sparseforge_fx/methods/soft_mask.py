"""SparseForge (arXiv 2605.06402): soft masks driven by curvature, heated, then quenched to exact N:M.

score   obd: s = (h + eps) w^2 (cost of deletion) | ratio: s = |w| / sqrt(h + eps) | magnitude: s = |w|
gate    site: G = sigmoid((z - quantile(z, sparsity)) / T), z the scores standardised per weight (the paper's), by
        half their 16-84 % range: a normal score's standard deviation, which h w^2, with its long tail, does not have
        pattern: G = sum_k softmax(-cost_k / T) pattern_k over the legal patterns of a group, cost_k the share of the
        group's score that pattern k deletes; every group keeps mass N, so soft meets hard by itself as T -> 0
mix     G <- (1 - beta) G + beta top-N(s), where asked for (the authors' universal script)
pull    G <- G - eta (m - top-N(G)): score structural hardening
mask    m <- clip((1 - a) m + a G, 0, 1) every K steps; in the graph e = lambda m + (1 - lambda) hard(m)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods import schedule
from sparseforge_fx.methods.base import TrainedConfig, TrainedMethod, add_up
from sparseforge_fx.methods.curvature import ESTIMATORS, Curvature, Estimator
from sparseforge_fx.methods.experts import too_few
from sparseforge_fx.methods.part import Part, mean
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import (
    Pattern,
    all_patterns,
    from_groups,
    hard_mask,
    to_groups,
)
from sparseforge_fx.ranges import AtLeastZero, Count, Positive, Share, ShareAboveZero

SCORES, GATES, STARTS = ("obd", "ratio", "magnitude"), ("site", "pattern"), ("first", "zero")
#: eps of ``obd``, a share of the mean of h: where h is zero (no gradient, no token) magnitude decides, not the
#: position; too small to change what is known (a hundredth was no better: docs/measurements.md)
FLOOR = 1e-7
RATIO_FLOOR = 1e-12  # eps of ``ratio``
#: probes of hutchinson before the first mask update; the others' first estimate is good enough
WARM_PROBES = {"hutchinson": 4}
#: fields that say how masks move, with and without curvature, and when
ESTIMATE = ("curvature", "curvature_beta", "curvature_vectors", "curvature_start", "probe_every", "score_noise_floor")
MOVES = (
    *ESTIMATE, "score", "gate", "sparsity_warmup", "first_update", "temperature_start", "temperature_floor",
    "temperature_half_life", "structure_start", "structure", "group_mix", "update_every", "update_every_late",
    "mask_rate", "masked_decay",
)  # fmt: skip
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
        first_update: share of the run that is over before masks move.
        mask_rate: a.
        score_noise_floor: eps; None: ``RATIO_FLOOR``, or ``FLOOR`` of the mean of h for ``obd``.
        structure_start, structure: eta * lambda_mid of the structural hardening at ``sparsity_warmup`` and, linearly
            reached, at ``quench_end`` (both 0: none).
        group_mix: beta at ``quench_end``, which rises there along a smooth step from ``heat_end``.
        probe_every, update_every: steps between curvature probes / mask updates. Hutchinson's first estimates say
            little: it begins with ``WARM_PROBES`` probes at consecutive steps, and the masks move after these.
        update_every_late: steps between mask updates from ``heat_end`` on; None: as before it.
        curvature_vectors: random vectors of a hutchinson probe; each costs as much as the first.
        curvature_start: ``first``: the average begins with the first estimate; ``zero``: at zero, so that no estimate
            weighs more than a later one.
        masked_decay: extra decay of weights per step, proportional to 1 - m.
    """

    curvature: Estimator = "gauss_newton"
    curvature_beta: Share = 0.98
    curvature_vectors: Count = 1
    curvature_start: Literal["first", "zero"] = "first"
    probe_every: Count = 1
    score: Literal["obd", "ratio", "magnitude"] = "obd"
    score_noise_floor: Positive | None = None
    gate: Literal["site", "pattern"] = "site"
    heat_end: Share = 0.1
    quench_end: Share = 0.85
    sparsity_warmup: Share = 0.1
    first_update: Share = 0.0
    temperature_start: Positive = 1.0
    temperature_floor: Positive = 0.05
    temperature_half_life: Positive = 0.04
    softness_start: Share = 1.0
    structure_start: AtLeastZero = 0.0
    structure: AtLeastZero = 0.5
    group_mix: Share = 0.0
    update_every: Count = 1
    update_every_late: Count | None = None
    mask_rate: ShareAboveZero = 0.1
    masked_decay: Share = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choose("curvature", ESTIMATORS)
        self.choose("score", SCORES)
        self.choose("gate", GATES)
        self.choose("curvature_start", STARTS)
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
    def scored(self) -> bool:
        """Does curvature score the weights?"""
        return self.start == "dense" and self.score != "magnitude"

    @property
    def counts_tokens(self) -> bool:
        return super().counts_tokens or self.scored

    @property
    def starts_fixed(self) -> bool:
        return self.start != "dense" and self.quench_end == 0

    @property
    def idle(self) -> dict[str, str]:
        why = super().idle
        if self.start != "dense":
            why |= dict.fromkeys(MOVES, f"masks are those of start={self.start!r}, and none is chosen anew")
        elif not self.scored:
            why |= dict.fromkeys(ESTIMATE, f"score is {self.score!r}")
        elif self.curvature != "hutchinson":
            why["curvature_vectors"] = f"curvature is {self.curvature!r}"
        if self.starts_fixed:
            why["softness_start"] = "quench_end is 0: masks are final from the start on"
        return why

    def build(self, weights: Sequence[MaskedWeight]) -> SparseForge:
        return SparseForge(self, weights)


class SparseForge(TrainedMethod):
    """The state of the annealing over a set of masked weights; see the module's text."""

    plain = (*TrainedMethod.plain, "faded_to", "mean_curvature", "tokens")

    def __init__(self, config: SparseForgeConfig, weights: Sequence[MaskedWeight]):
        super().__init__(config, weights)
        self.curvature: Curvature = Curvature(
            config.curvature_beta,
            config.curvature if config.scored else None,
            config.curvature_vectors,
            config.curvature_start,
        )
        self.mean_curvature = dict.fromkeys((w.fqn for w in weights), 0.0) if config.scored else {}
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

    @property
    def tokens(self) -> dict[str, list[int]]:
        """Of each expert, by stack, those that its curvature is of."""
        return self.curvature.tokens

    @tokens.setter
    def tokens(self, tokens: dict[str, list[int]]) -> None:
        self.curvature.tokens = tokens

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
        if self._updates(progress):
            self._update(progress)
        for w in self.weights:
            if self.config.masked_decay:
                w.weight.mul_(1 - self.config.masked_decay * (1 - w.mask.float()))
            if lam < 1:
                soft = self.soft.setdefault(w.fqn, w.mask.clone())
                w.mask.copy_(torch.lerp(hard_mask(soft, self.pattern, w.dim).to(soft.dtype), soft, lam))

    def _updates(self, progress: float) -> bool:
        """Do the masks move now?"""
        c = self.config
        late = c.update_every_late is not None and progress >= c.heat_end
        every = c.update_every_late if late else c.update_every
        return self.step % every == 0 and self.step >= max(self.warm, math.ceil(c.first_update * c.steps))

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
        parts = {w.fqn: w.part for w in self.weights}
        self.mean_curvature |= {fqn: float(mean(h, parts[fqn])) for fqn, h in self.curvature.values.items()}
        self.curvature.values.clear()
        super().fix()

    # -- the mask update ---------------------------------------------------------------------------------------------
    def _update(self, progress: float) -> None:
        c = self.config
        flips: list[Tensor] = []
        total = 0
        heat = schedule.temperature(progress, c.temperature_start, c.temperature_floor, c.temperature_half_life)
        reached = schedule.target_sparsity(progress, c.sparsity_warmup, 1.0)
        eta = schedule.between(progress, c.sparsity_warmup, c.quench_end, c.structure_start, c.structure)
        mix = c.group_mix * schedule.smooth_step(schedule.ramp(progress, c.heat_end, c.quench_end))
        for w in self.weights:
            if c.score != "magnitude" and not self.curvature.values:
                continue  # no probe yet
            mask = self.soft.get(w.fqn, w.mask)
            score = self.score(w)
            gate = self.gate(score, w.dim, heat, reached, w.part)
            before = hard_mask(self.sample(mask, w.dim), self.pattern)
            if mix:
                gate.lerp_(hard_mask(score, self.pattern, w.dim).float(), mix)
            if eta:
                # top-N(G) is top-N of the scores, which do not tie where the sigmoid saturates
                gate.sub_(mask.float() - hard_mask(score, self.pattern, w.dim).float(), alpha=eta)
            mask.copy_(mask.float().lerp_(gate, c.mask_rate).clamp_(0, 1))
            after = hard_mask(self.sample(mask, w.dim), self.pattern)
            flips.append((after != before).sum())
            total += before.numel()
        self.flip_rate = self.rate(add_up(flips), total)

    def score(self, w: MaskedWeight) -> Tensor:
        """Importance of each weight, float32, the weight's shape. Magnitude where no gradient has ever come, and of
        experts that saw too few tokens."""
        value = w.weight.detach().float()
        if self.config.score == "magnitude" or w.fqn not in self.curvature.values:
            return value.abs()
        h = self.curvature.values[w.fqn].float()
        if h.dim() < value.dim():  # activation: one value per input
            h = h.unsqueeze(-1 if w.dim == value.dim() - 2 else -2)
        floor = self.config.score_noise_floor
        if self.config.score == "ratio":
            found = value.abs() / (h + (RATIO_FLOOR if floor is None else floor)).sqrt()
        else:
            found = value.square() * (h + ((FLOOR * mean(h, w.part)).clamp(min=1e-30) if floor is None else floor))
        start = 0 if w.part is None else w.part.start  # of a stack a process has whole matrices
        for place in too_few(self.tokens.get(w.fqn, ())[start : start + len(value)], self.config.expert_tokens):
            found[place] = value[place].abs()  # thresholds are each expert's own: no other units come in
        return found

    def gate(self, score: Tensor, dim: int, temperature: float, reached: float, part: Part | None = None) -> Tensor:
        """G in [0, 1]; ``reached`` is the share of the final sparsity that the warm-up asks for."""
        pattern = self.pattern
        if self.config.gate == "site":
            low, tau, high = _quantiles(score, part, 0.16, reached * (1 - pattern.density), 0.84)
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


def _quantiles(values: Tensor, part: Part | None, *shares: float) -> list[Tensor]:
    """Quantiles of a matrix, or of each matrix of a stack, from an evenly spaced sample; deterministic. Share 0 is the
    smallest value. Of a matrix that processes share they are the same; a stack is shared by the matrix."""
    matrix = values.dim() == 2
    count = values[0].numel() if not matrix and len(values) else values.numel() if part is None else part.shape.numel()
    step = max(1, count // SAMPLE)
    sample = part.every(values, step) if part is not None and matrix else values.flatten(-2)[..., ::step]
    ordered = sample.sort().values
    last = ordered.shape[-1] - 1
    found = [ordered[..., min(last, round(q * last))] for q in shares]
    return found if matrix else [f[:, None, None] for f in found]
