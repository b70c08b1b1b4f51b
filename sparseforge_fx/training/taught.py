"""Who teaches a run: whether anybody does, and whether the model that does has lost its weights already."""

from __future__ import annotations

from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.config import MethodConfig
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.pattern import Pattern, check_pattern
from sparseforge_fx.training.basis import check_basis
from sparseforge_fx.training.distillation import Distillation
from sparseforge_fx.training.inputs import Run
from sparseforge_fx.training.recipe import Recipe


def is_taught(recipe: Recipe, config: MethodConfig) -> bool:
    """Does anything in the run come near to the dense model?"""
    if getattr(config, "reconstruct", 0):
        return True
    loss = minimised(recipe, config)
    return loss is not None and (bool(loss.kl) or loss.features is not None)


def minimised(recipe: Recipe, config: MethodConfig) -> Distillation | None:
    """What the run minimises; None where nothing trains."""
    return recipe.settings(True).objective if isinstance(config, TrainedConfig) else None


def look_at_teacher(run: Run, recipe: Recipe, config: MethodConfig) -> list[str]:
    """What a run that is taught has to say of who teaches it. Raises SparseForgeError where a teacher was given that is
    no model for what is inside."""
    ours, theirs = run.tensors()
    if theirs is None:
        return _pruned_already(run, config)
    check_basis(run.sites, ours, theirs, config, minimised(recipe, config))
    return []


def _pruned_already(run: Run, config: MethodConfig) -> list[str]:
    """A note where weights are N:M as they are given: what the model is distilled from has lost as much."""
    pattern = config.pattern
    if not isinstance(pattern, Pattern):
        return []
    weights = [(run.program.tensor(s.fqn), s.reduction_dim) for s in eligible(run.sites)]
    count = sum(bool(weight.any()) and check_pattern(weight, pattern, dim) for weight, dim in weights)
    if not count:
        return []
    return [
        f"{count} of {len(weights)} weights are {pattern} already, and the model is its own teacher: teacher= names "
        "what it was before, start='magnitude' begins at the masks that it has"
    ]
