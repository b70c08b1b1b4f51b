"""SparseForge (arXiv 2605.06402): soft masks driven by curvature, heated, then quenched to exact N:M.

    score   obd: s = h w^2 (cost of deletion) | ratio: s = |w| / sqrt(h + eps) | magnitude: s = |w|
    gate    site: G = sigmoid((z - quantile(z, sparsity)) / T), z the scores standardised per weight (the paper's)
            pattern: G = sum_k softmax(-cost_k / T) pattern_k over the legal patterns of a group, cost_k the share of the
            group's score that pattern k deletes; every group keeps mass N, so soft meets hard by itself as T -> 0
    pull    G <- G - eta (m - top-N(G)): score structural hardening
    mask    m <- clip((1 - a) m + a G, 0, 1) every K steps; in the graph e = lambda m + (1 - lambda) hard(m)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sparseforge_fx import schedule
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.hessian import ESTIMATORS, Curvature, Estimator
from sparseforge_fx.methods.base import MaskedWeight
from sparseforge_fx.pattern import Pattern, all_patterns, distance_from_binary, from_groups, hard_mask, to_groups

#: the authors' run on LLaMA-2-7B, to which their per-update constants belong
REFERENCE_STEPS, REFERENCE_UPDATES = 20_000, 20_000 // 30
SAMPLE = 1 << 15  # scores from which a weight's quantile is taken; its error in rank is below 0.3 %


@dataclass(frozen=True)
class SparseForgeConfig:
    """Constants of the annealing; times are shares of the run, rates are per mask update.

    Attributes:
        steps: optimizer steps of the whole run.
        start: ``dense``: masks of one; ``obs``: the layer-wise OBS solution (methods/layerwise.py) and its masks.
        heat_end, quench_end: lambda is 1 before the first, falls linearly, and is 0 after the second; then masks are fixed.
        sparsity_warmup: end of the linear warm-up of the target sparsity.
        mask_rate: a; score_noise_floor: eps of ``ratio``.
        structure: final eta * lambda_mid of the structural hardening, reached at ``quench_end`` (0 switches it off).
        probe_every, update_every: steps between curvature probes / mask updates.
        masked_decay: extra decay of weights per step, proportional to 1 - m.
        compensate: at the end of the quench, let the survivors take over by OBS what the pruned weights still carried.
    """

    steps: int
    pattern: Pattern = Pattern(2, 4)
    start: Literal["dense", "obs"] = "dense"
    curvature: Estimator = "gauss_newton"
    curvature_beta: float = 0.98
    probe_every: int = 1
    score: Literal["obd", "ratio", "magnitude"] = "obd"
    score_noise_floor: float = 1e-12
    gate: Literal["site", "pattern"] = "site"
    heat_end: float = 0.1
    quench_end: float = 0.85
    sparsity_warmup: float = 0.1
    temperature_start: float = 1.0
    temperature_floor: float = 0.05
    temperature_half_life: float = 0.04
    structure: float = 0.5
    update_every: int = 1
    mask_rate: float = 0.1
    masked_decay: float = 0.0
    compensate: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise SparseForgeError(f"steps is {self.steps}; a run needs at least one")
        if self.curvature not in ESTIMATORS:
            raise SparseForgeError(f"unknown curvature {self.curvature!r}; choose one of {', '.join(ESTIMATORS)}")
        if not 0 <= self.heat_end <= self.quench_end <= 1:
            raise SparseForgeError(f"need 0 <= heat_end <= quench_end <= 1, got {self.heat_end} and {self.quench_end}")

    def describe(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self) | {"pattern": str(self.pattern)}


def paper_preset(steps: int, pattern: Pattern = Pattern(2, 4), **changes: Any) -> SparseForgeConfig:
    """The authors' constants (DESIGN section 3), scaled to a run of ``steps``.

    K = 30 of 20,000 steps; with fewer steps K shrinks to 1 and the per-update rates (a = 0.1, gamma = 0.975, beta = 0.985) are
    rescaled so that the run travels the same way in fewer updates. lambda falls from 10 % to 85 % of the run.
    """
    every = max(1, round(30 * steps / REFERENCE_STEPS))
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


def tuned_preset(steps: int, pattern: Pattern = Pattern(2, 4), **changes: Any) -> SparseForgeConfig:
    """Ours: start from the layer-wise OBS solution."""
    base = SparseForgeConfig(
        steps=steps,
        pattern=pattern,
        start="obs",
        gate="pattern",
        heat_end=0.0,
        quench_end=0.0,
        sparsity_warmup=0.0,
    )
    return replace(base, **changes)


class SparseForge:
    """The state of the annealing over a set of masked weights; see the module's text."""

    def __init__(self, config: SparseForgeConfig, weights: Sequence[MaskedWeight]):
        self.config = config
        self.pattern = config.pattern
        self.steps = config.steps
        self.weights = list(weights)
        self.curvature = Curvature(config.curvature_beta)
        self.soft: dict[str, Tensor] = {}  # m, where the graph's mask is no longer m itself (during the quench)
        self.step = 0
        self.flip_rate = 0.0
        self._fixed = False
        if config.start == "dense" and config.quench_end == 0:
            raise SparseForgeError("quench_end 0 leaves no time to choose masks; start from obs or give the quench some steps")

    # -- the loop's side ---------------------------------------------------------------------------------------------
    def progress(self, step: int) -> float:
        return step / self.steps

    def wants_curvature(self, step: int) -> bool:
        c = self.config
        return c.score != "magnitude" and self.progress(step) < c.quench_end and step % c.probe_every == 0

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Mask update every K steps, then the effective masks of the next step; hard and final once the quench is over."""
        self.step = step + 1
        progress = self.progress(self.step)
        if self._fixed:
            return
        if progress >= self.config.quench_end:
            self.fix()
            return
        if self.step % self.config.update_every == 0:
            self._update(progress)
        lam = schedule.softness(progress, self.config.heat_end, self.config.quench_end)
        for w in self.weights:
            if self.config.masked_decay:
                w.weight.mul_(1 - self.config.masked_decay * (1 - w.mask))
            if lam < 1:
                soft = self.soft.setdefault(w.fqn, w.mask.clone())
                w.mask.copy_(torch.lerp(hard_mask(soft, self.pattern, w.dim).to(soft.dtype), soft, lam))

    @torch.no_grad()
    def fix(self) -> None:
        """m = hard(m), for good; curvature and soft masks are freed."""
        for w in self.weights:
            w.mask.copy_(hard_mask(self.soft.get(w.fqn, w.mask), self.pattern, w.dim))
        self.soft.clear()
        self.curvature.values.clear()
        self._fixed = True

    @property
    def fixed(self) -> bool:
        return self._fixed

    # -- the mask update -----------------------------------------------------------------------------------------------
    def _update(self, progress: float) -> None:
        c = self.config
        flips = total = 0
        heat = schedule.temperature(progress, c.temperature_start, c.temperature_floor, c.temperature_half_life)
        reached = schedule.target_sparsity(progress, c.sparsity_warmup, 1.0)
        eta = schedule.structure_strength(progress, c.sparsity_warmup, c.quench_end, c.structure)
        for w in self.weights:
            if c.score != "magnitude" and w.fqn not in self.curvature.values:
                continue  # no probe yet
            mask = self.soft.get(w.fqn, w.mask)
            gate = self.gate(self.score(w), w.dim, heat, reached)
            old = hard_mask(mask, self.pattern, w.dim)
            if eta:
                gate.sub_(mask.float() - hard_mask(gate, self.pattern, w.dim).float(), alpha=eta)
            mask.copy_(mask.float().lerp_(gate, c.mask_rate).clamp_(0, 1))
            flips += int((hard_mask(mask, self.pattern, w.dim) != old).sum())
            total += old.numel()
        self.flip_rate = flips / max(1, total)

    def score(self, w: MaskedWeight) -> Tensor:
        """Importance of each weight, float32, the weight's shape."""
        value = w.weight.detach().float()
        if self.config.score == "magnitude":
            return value.abs()
        h = self.curvature.values[w.fqn].float()
        if h.dim() == 1:  # activation: one value per input
            h = h[:, None] if w.dim == 0 else h[None, :]
        if self.config.score == "ratio":
            return value.abs() / (h + self.config.score_noise_floor).sqrt()
        return value.square() * h

    def gate(self, score: Tensor, dim: int, temperature: float, reached: float) -> Tensor:
        """G in [0, 1]; ``reached`` is the share of the final sparsity that the warm-up asks for."""
        pattern = self.pattern
        if self.config.gate == "site":
            z = (score - score.mean()) / score.std().clamp(min=1e-30)
            tau = _quantile(z, reached * (1 - pattern.density))
            return torch.sigmoid((z - tau) / temperature)
        grouped = to_groups(score, pattern, dim)
        share = grouped / grouped.mean(-1, keepdim=True).clamp(min=1e-38)
        legal = all_patterns(pattern, score.device)
        soft = ((share @ legal.t()) / temperature).softmax(-1) @ legal  # -cost_k and kept_k differ by a constant
        return from_groups(1 - reached * (1 - soft), dim)

    # -- reports and resuming --------------------------------------------------------------------------------------------
    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        c, progress = self.config, self.progress(self.step)
        numel = sum(w.mask.numel() for w in self.weights)
        return {
            "temperature": schedule.temperature(progress, c.temperature_start, c.temperature_floor, c.temperature_half_life),
            "lambda": 0.0 if self._fixed else schedule.softness(progress, c.heat_end, c.quench_end),
            "mask_distance_from_binary": sum(distance_from_binary(w.mask) * w.mask.numel() for w in self.weights) / numel,
            "flip_rate": 0.0 if self._fixed else self.flip_rate,
            "density": sum(w.mask.float().sum().item() for w in self.weights) / numel,
        }

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "fixed": self._fixed,
            "flip_rate": self.flip_rate,
            "soft": dict(self.soft),
            "curvature": dict(self.curvature.values),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.step, self._fixed, self.flip_rate = state["step"], state["fixed"], state["flip_rate"]
        self.soft, self.curvature.values = dict(state["soft"]), dict(state["curvature"])


def _quantile(values: Tensor, q: float) -> Tensor:
    """q-quantile from an evenly spaced sample; deterministic."""
    flat = values.flatten()
    sample = flat[:: max(1, flat.numel() // SAMPLE)]
    k = min(sample.numel(), max(1, round(q * sample.numel())))
    return sample.kthvalue(k).values if q > 0 else sample.min() - 1e3
