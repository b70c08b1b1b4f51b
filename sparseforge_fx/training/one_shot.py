"""A run without training: masks (and survivors) from the weights, or from a calibration set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind

from sparseforge_fx.data.batches import count_rows
from sparseforge_fx.data.reading import Reading
from sparseforge_fx.graph.capture import as_call
from sparseforge_fx.methods.config import MethodConfig
from sparseforge_fx.methods.experts import Experts
from sparseforge_fx.methods.finish import finish
from sparseforge_fx.methods.layerwise import prune_layer_by_layer, undone_on_error
from sparseforge_fx.methods.on_grid import OnGrid, fitting
from sparseforge_fx.methods.one_shot import LayerwiseConfig, magnitude
from sparseforge_fx.methods.reorder import Reordering
from sparseforge_fx.methods.rounding import format_of
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.passes import harden_passes, run_passes, train_passes
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.insert_soft_masks import mask_name
from sparseforge_fx.pattern import check_pattern
from sparseforge_fx.report import describe_change
from sparseforge_fx.training.inputs import Run
from sparseforge_fx.training.recipe import Recipe
from sparseforge_fx.training.teacher import Teacher, counterparts, dense_copies
from sparseforge_fx.training.unused import unused_arguments, unused_for_experts, unused_options


def prune_once(
    run: Run, recipe: Recipe, config: MethodConfig, beside: Mapping[str, Any], report: dict[str, Any]
) -> dict[str, Tensor]:
    """Prune the run's model by a method that does not train, and say in the report how. Returns the scales of weights
    that were put on a grid."""
    batches = run.first(recipe.calibration) if run.batches is not None else None
    report["notes"] += unused_arguments(
        recipe, beside, data=run.data, method=report["method"], trains=False, calibrates=batches is not None,
        batches=run.batches,
    )  # fmt: skip
    told = unused_options(config, recipe, run.data is not None)
    report["notes"] += [*told, *unused_for_experts(config, run.sites)]
    report["config"] = config.describe()
    report["calibration_sequences"] = sum(count_rows(b) for b in batches or ())
    experts = Experts(config.pattern)
    if isinstance(config, LayerwiseConfig):
        experts = Experts(config.pattern, config.expert_tokens, config.every_token)
    readings = [run.reader.read(*as_call(b)) for b in batches or ()]
    report["layer_notes"], scales = _prune(run, config, readings, experts, report)
    learned = experts.describe()
    for fqn, error in learned.pop("layer_errors", {}).items():
        report["layers"].setdefault(fqn, {})["error"] = error
    report |= learned
    return scales


@torch.no_grad()
def _prune(
    run: Run, config: MethodConfig, batches: list[Reading], experts: Experts, report: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    masked, _ = run_passes(run.program, train_passes(run.sites))
    weights = [
        MaskedWeight(s.fqn, masked.tensor(s.fqn), masked.tensor(mask_name(s.fqn)), s.reduction_dim)
        for s in eligible(run.sites)
    ]
    notes: dict[str, str] = {}
    moves: Reordering | None = None
    scales: dict[str, Tensor] = {}
    vectors = [value for _, _, value in masked.lifted(InputKind.PARAMETER) if value.dim() < 2]  # biases change places
    with undone_on_error(weights, vectors) as dense:
        if isinstance(config, LayerwiseConfig):
            if config.reorder:
                moves = Reordering(masked, config.pattern, weights)  # type: ignore[arg-type]
            tensors = [w.weight for w in weights]
            aim = None
            if config.reconstruct:
                taught = run.taught_by
                pairs = dense_copies(run.program, tensors) if taught is None else counterparts(run.program, taught)
                aim = Teacher(run.program, pairs).module
            notes = prune_layer_by_layer(masked, weights, batches, config.solve, experts, moves)
            formats, against = fitting(weights, format_of(config.values), config.pattern)
            grid = OnGrid(weights, formats) if formats else None
            how: dict[str, Any] = {"epochs": config.reconstruct, "lr": config.reconstruct_lr}
            blocks, told, more = finish(masked, weights, batches, grid, aim, **how)
            report |= blocks
            report["notes"] += more
            for fqn, text in (told | against).items():
                notes[fqn] = "; ".join(filter(None, (notes.get(fqn), text)))
            scales = {} if grid is None else grid.scales
        else:
            magnitude(weights, config.pattern)
        run_passes(masked, harden_passes(config.pattern))
        assert all(check_pattern(w.weight, config.pattern, w.dim) for w in weights)
        before = dense if moves is None else {fqn: moves.follow(fqn, value) for fqn, value in dense.items()}
        report["layers"] = {w.fqn: describe_change(w.weight, before[w.fqn]) for w in weights}
    return notes, scales
