"""How much memory a run would take beside the process that has its graph: counted, nothing is run."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparseforge_fx.graph.program import Program
from sparseforge_fx.graph.sizes import numel
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.config import MethodConfig
from sparseforge_fx.methods.one_shot import LAYERWISE, AlpsConfig, LayerwiseConfig, SparseGPTConfig, WandaConfig
from sparseforge_fx.passes import LinearSite
from sparseforge_fx.training.forecast import answer_of, scale_of, trained_beside, written
from sparseforge_fx.training.machine import FLOAT32
from sparseforge_fx.training.recipe import Recipe

#: float32 matrices [in, in] and [out, in] that a solver holds at its peak, its moments among them, as measured on
#: weights of 128 x 2048 to 8192 x 1024
SOLVING: dict[type[MethodConfig], tuple[float, float]] = {
    WandaConfig: (1.0, 3.5),
    SparseGPTConfig: (4.5, 2.5),
    AlpsConfig: (9.0, 14.0),
}
LOGITS = 3  # beside the student's: the teacher's, their gradient, and what the backward pass makes of it


def from_disk(chosen: Sequence[LinearSite], recipe: Recipe, config: MethodConfig, dtype: torch.dtype) -> float:
    """Bytes that a walk from disk takes: at its largest weight, with a mask and inputs, what the solver holds."""
    return max(2 * dtype.itemsize * s.numel + _solving(s, recipe, config, dtype) for s in chosen)


def states(weights: int, config: TrainedConfig, optimizer: str, dtype: torch.dtype, others: int = 0) -> float:
    """Bytes that training takes beside the model itself for so many weights with a mask: teacher, mask and gradient,
    curvature where it is estimated, float32 masters of half precision with their gradients, and moments. ``others``
    train without a mask."""
    estimated = getattr(config, "curvature", None) is not None and not config.starts_fixed
    masters = 2 * FLOAT32 if dtype.itemsize < FLOAT32 else 0
    moments = 2 if optimizer == "adamw8bit" else 2 * FLOAT32
    each = masters + moments
    return weights * ((4 if estimated else 3) * dtype.itemsize + each) + others * (2 * dtype.itemsize + each)


def of_training(
    program: Program,
    chosen: Sequence[LinearSite],
    parameters: int,
    recipe: Recipe,
    config: TrainedConfig,
    dtype: torch.dtype,
    shared_by: int = 1,
) -> float:
    """Bytes of the model and of the most that its layer-wise start, or its steps, take beside it, in each of so many
    processes that share the weights; activations are kept, not computed again."""
    weights = sum(s.numel for s in chosen)
    scale = scale_of(program, recipe)
    kept = scale * dtype.itemsize * sum(numel(v) for n in program.graph.nodes for v in written(n))
    logits = LOGITS * scale * dtype.itemsize * numel(answer_of(program))
    own = dtype.itemsize * parameters
    others = trained_beside(program, chosen, config)
    steps = (own + states(weights, config, recipe.optimizer, dtype, others)) / shared_by + kept + logits
    start = 0.0
    if (kind := LAYERWISE.get(config.start)) is not None:
        solver = kind(config.pattern)
        start = own + 2 * dtype.itemsize * weights + max(_solving(s, recipe, solver, dtype) for s in chosen)
    return max(start, steps)


def _solving(site: LinearSite, recipe: Recipe, config: MethodConfig, dtype: torch.dtype) -> float:
    """Bytes of a weight's inputs and outputs over the calibration data, dense and sparse, and of what solves for it."""
    rows = recipe.calibration * recipe.length if isinstance(config, LayerwiseConfig) else 0
    squares, copies = SOLVING.get(type(config), (0.0, 0.0))
    inputs, outputs = site.in_features, site.out_features
    return 2 * dtype.itemsize * rows * (inputs + outputs) + FLOAT32 * inputs * (squares * inputs + copies * outputs)
