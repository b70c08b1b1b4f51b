"""SparseForge's presets: the authors' two scripts, their annealing with our constants, and the default, which anneals
nothing.

Source of the authors' constants: github.com/liuhanzuo/SparseForge, ``train_llama.sh`` (LLaMA-2-7B) and
``train_universal.sh`` (other models), ``sparse_modeling.py``, ``utils.py``. Their times are shares of 20,000 steps,
their rates are per mask update, and the average of a noisy estimate counts its probes: so shares are kept, rates and
averages are not rescaled.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from sparseforge_fx.methods import schedule
from sparseforge_fx.methods.config import Beside
from sparseforge_fx.methods.soft_mask import SparseForgeConfig
from sparseforge_fx.pattern import TWO_FOUR, AnyPattern, Pattern

REFERENCE_STEPS, REFERENCE_EVERY, REFERENCE_EVERY_LATE = 20_000, 30, 10
REFERENCE_UPDATES = REFERENCE_STEPS // REFERENCE_EVERY
#: what the scripts set beside the method: KL at temperature 2 times T^2, AdamW's decay, SLoRB's k
PAPER_BESIDE = Beside(temperature=2.0, weight_decay=0.1, slorb_block=64)
UNIVERSAL_BESIDE = Beside(temperature=2.0, weight_decay=0.1, slorb_block=16)


def alps_kd_preset(steps: int, pattern: AnyPattern = TWO_FOUR, **changes: Any) -> SparseForgeConfig:
    """Ours, the default: masks and survivors of the layer-wise ALPS solution, fixed from the first step on; the run
    distils, nothing is annealed.

    Where they stay fixed and the start moves weights, channels may change places before it (``reorder``) and every
    block learns for one pass over the calibration data after it (``reconstruct``); more passes take off more. In runs
    of 30 and 60 steps nothing that delayed the hard masks did better; ``quench_end=0.4, softness_start=0.6`` lets the
    pruned weights fade from the dense model instead.
    """
    base = SparseForgeConfig(steps=steps, pattern=pattern, start="alps", heat_end=0.0, quench_end=0.0)
    config = replace(base, **changes)
    if config.starts_fixed and config.start in ("sparsegpt", "alps"):
        grouped = isinstance(pattern, Pattern)
        config = replace(config, **{"reorder": grouped, "reconstruct": 1} | changes)
    return config


def paper_preset(steps: int, pattern: AnyPattern = TWO_FOUR, **changes: Any) -> SparseForgeConfig:
    """The authors' LLaMA script (arXiv 2605.06402), over ``steps`` in the place of 20,000.

    Theirs: Hutchinson with one vector at every step, beta 0.98 from zero; score |w| / sqrt(h + 1e-8); no mask update in
    the first 2.5 % (500 steps), then the whole sparsity at once; a = 0.1 every K = 30 steps, 10 from 10 % on; T from 1
    by 0.97 an update to 0.05; a pull of 0.01; lambda 1 to 10 %, 0 from 85 % on. :data:`PAPER_BESIDE` says the rest.

    Departures, and why:

    - K is the same share of the run and at least 1, a stays 0.1: below 2,000 steps there are fewer updates than theirs,
      and masks follow the gate later (by about ten updates: 8 % of a run of 120, where theirs have 1.5, then 0.5 %).
    - Hutchinson's products are averaged as absolute values, over all micro-batches; theirs are cut at zero, of the last
      one. Few probes cut at zero prune blindly (methods/curvature.py). At least four come before the first update.
    - The gate divides by half the scores' 16-84 % range, not by their standard deviation (methods/soft_mask.py); the
      pull is toward the top-N of the scores, which do not tie where the gate saturates.
    - T falls along the run and is at its floor at 15 %; their count of updates jumps where K changes, and T with it.
    - SLoRB's branch takes over, as the masks harden, the means of what they take; theirs starts at zero.
    - The weight decay and the rate are not scaled: in a short run 0.1 takes less from a weight than in theirs.
    - Embeddings and the head train in theirs, and are decayed: ``trainable="all"`` does as much.
    - Their published hard mask is top-128 of 16 x 16 tiles, not 2:4; the equations are the same for any pattern. Their
      penalties on m (1 - m) and on the sparsity have no gradient and are left out, and so are the 13,000 steps of
      fine-tuning that follow their 20,000.
    """
    base = _theirs(steps, pattern, decay=0.97, pull=(0.01, 0.01), score="ratio")
    return replace(base, **changes)


def paper_universal_preset(steps: int, pattern: AnyPattern = TWO_FOUR, **changes: Any) -> SparseForgeConfig:
    """The authors' universal script, for models up to 3B and experts; as :func:`paper_preset`, but: score
    (h + 1e-8) w^2, T by 0.98 an update, a pull of 0.06 that rises to 0.3, a gate that is mixed with the top-N of its
    groups from 10 to 85 % of the run, and SLoRB's k of 16.

    Departures beside those of :func:`paper_preset`: T is at its floor at 22 %, theirs at 10; h starts at zero, not at
    one, which keeps magnitude ahead for hundreds of steps; their decay of masked weights inside the gradient
    (1e-4 w (1 - m)) is left out.

    As published, that script sets ``--eager_attention False``, catches the error of a second derivative that fused
    attention has not, prints it on one process and goes on: h stays at one for the whole run, and it prunes by
    magnitude. Here Hutchinson runs under math attention, and an error ends the run.
    """
    base = _theirs(steps, pattern, decay=0.98, pull=(0.06, 0.3), score="obd")
    return replace(base, **{"group_mix": 1.0} | changes)


def _theirs(
    steps: int, pattern: AnyPattern, *, decay: float, pull: tuple[float, float], score: Any
) -> SparseForgeConfig:
    """What both scripts have in common; ``decay``: of T, by update."""
    run = steps / REFERENCE_STEPS
    return SparseForgeConfig(
        steps=steps,
        pattern=pattern,
        curvature="hutchinson",
        curvature_beta=0.98,
        curvature_start="zero",
        probe_every=1,
        score=score,
        score_noise_floor=1e-8,
        heat_end=0.1,
        quench_end=0.85,
        sparsity_warmup=0.025,
        first_update=0.025,
        temperature_half_life=math.log(0.5) / math.log(decay) * REFERENCE_EVERY / REFERENCE_STEPS,
        structure_start=pull[0],
        structure=pull[1],
        update_every=max(1, round(REFERENCE_EVERY * run)),
        update_every_late=max(1, round(REFERENCE_EVERY_LATE * run)),
        mask_rate=0.1,
    )


def annealed_preset(steps: int, pattern: AnyPattern = TWO_FOUR, **changes: Any) -> SparseForgeConfig:
    """The paper's annealing with our constants; until this preset had a name of its own it was called ``paper``.

    Gauss-Newton curvature at the mask updates, score h w^2, a pull that grows to 0.5, sparsity warmed up over 10 % of
    the run. K = 30 of 20,000 steps; with fewer steps K shrinks (to 5 from 150 steps on, to 1 below 60) and the
    per-update rates (a = 0.1, beta = 0.985) are rescaled so that masks travel the same way in fewer updates: a is 0.9
    in a run of 120. lambda falls from 10 % to 85 % of the run.
    """
    every = max(
        1, round(REFERENCE_EVERY * steps / REFERENCE_STEPS), min(5, steps // 30)
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
