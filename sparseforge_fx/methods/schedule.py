"""Every schedule of the annealing, as pure functions of progress (0 at the first step, 1 at the end of the run)."""

from __future__ import annotations

import math


def ramp(progress: float, start: float, end: float) -> float:
    """0 until ``start``, 1 from ``end`` on, linear between (a jump at ``start`` if they coincide)."""
    if progress >= end:
        return 1.0
    if progress <= start:
        return 0.0
    return (progress - start) / (end - start)


def softness(progress: float, heat_end: float, quench_end: float) -> float:
    """lambda of arXiv 2605.06402: 1 while heating, linear to 0 over the quench, 0 after it."""
    return 1.0 - ramp(progress, heat_end, quench_end)


def target_sparsity(progress: float, warmup_end: float, final: float) -> float:
    """Share of weights below the gate's threshold: linear warm-up from 0 to ``final``."""
    return final * ramp(progress, 0.0, warmup_end)


def temperature(progress: float, start: float, floor: float, half_life: float) -> float:
    """T = max(floor, start * 2^(-progress / half_life)): the paper's T_0 * gamma^k with k proportional to progress."""
    return max(floor, start * 2.0 ** (-progress / half_life))


def between(progress: float, start: float, end: float, first: float, last: float) -> float:
    """``first`` until ``start``, linear to ``last`` at ``end``: eta of the structural hardening."""
    return first + (last - first) * ramp(progress, start, end)


def smooth_step(share: float) -> float:
    """From 0 to 1 with a level start and end: 3 t^2 - 2 t^3."""
    return share * share * (3.0 - 2.0 * share)


def cubic_ramp(progress: float, end: float) -> float:
    """0 at the start, 1 from ``end`` on, fast at first: 1 - (1 - progress / end)^3 (arXiv 1710.01878, eq. 1)."""
    return 1.0 - (1.0 - ramp(progress, 0.0, end)) ** 3


def learning_rate(progress: float, warmup: float, floor: float) -> float:
    """Factor on the peak rate: linear warm-up over ``warmup`` (a share of the run), then a cosine down to ``floor``."""
    if progress < warmup:
        return progress / warmup
    rest = (progress - warmup) / max(1e-12, 1.0 - warmup)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, rest)))


def rescale_decay(decay: float, updates: int, reference_updates: int) -> float:
    """The per-update decay that forgets as much over ``updates`` as ``decay`` does over ``reference_updates``.

    The authors' constants are per mask update of a 20,000-step run; a short run must travel the same way in fewer
    updates.
    """
    return decay ** (reference_updates / max(1, updates))
