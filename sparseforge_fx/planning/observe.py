"""What the dense model says of weights on the calibration data: the moments of their inputs, the curvature of their
outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparseforge_fx.data.reading import Reading
from sparseforge_fx.graph.capture import as_call
from sparseforge_fx.methods.calibrate import layer_by_layer
from sparseforge_fx.passes.find_linears import LinearSite
from sparseforge_fx.passes.operators import LINEAR_OPS
from sparseforge_fx.planning.sensitivity import output_curvature
from sparseforge_fx.training.distillation import Distillation
from sparseforge_fx.training.first_batch import check_batch
from sparseforge_fx.training.inputs import Run
from sparseforge_fx.training.objective import Objective
from sparseforge_fx.training.recipe import Recipe

#: fields of a recipe that there is a use for
READING = ("include", "exclude", "calibration", "batch_size", "length", "seed", "text_column", "separator")
#: told of a weight: its name, the weight [out, in] in float32, the moments [in, in] of its inputs, and the curvature
#: [out] of its outputs
See = Callable[[str, Tensor, Tensor, Tensor], object]


def check_answer(run: Run) -> None:
    """Raise SparseForgeError for an answer without a curvature."""
    assert run.batches is not None
    objective = Objective(Distillation(task=0), getattr(run.program.source, "config", None), run.reader.note)
    check_batch(run.program, run.reader, objective, run.batches.batch(0))


def observe(run: Run, recipe: Recipe, sites: Sequence[LinearSite], see: See, purpose: str) -> None:
    """Tell ``see`` of every weight, in the graph's order: one walk with gradients, one for the moments of the inputs.

    Args:
        purpose: what is made of it, for the notes: where padding counts, and where the answers have no gradient.
    """
    batches: list[Reading] = [run.reader.read(*as_call(batch)) for batch in run.first(recipe.calibration)]
    module = run.program.module()
    by_use = {use.node: site for site in sites for use in site.uses}
    nodes = {node: by_use[node.name] for node in module.graph.nodes if node.name in by_use}
    loss = recipe.settings(True).objective
    objective = Objective(loss, getattr(run.program.source, "config", None), run.reader.note)
    names = {node: site.fqn for node, site in nodes.items()}
    curvature = output_curvature(module, names, batches, objective.answer, seed=recipe.seed)
    by_name = {site.fqn: site for site in sites}

    def visit(name: str, moments: Tensor) -> None:
        site = by_name[name]
        stored = run.program.tensor(name).detach()
        weight = (stored.t() if site.transposed else stored).float()
        none = torch.zeros(site.out_features, device=weight.device)
        sharpness = curvature.get(name, none)
        if not sharpness.any():
            run.notes.append(f"no gradient of the answers reaches {name}: nothing is predicted to {purpose} there")
        see(name, weight, moments, sharpness)

    sources = {node: (site.fqn, LINEAR_OPS[node.target][0]) for node, site in nodes.items()}
    for name in layer_by_layer(module, sources, batches, visit):
        run.notes.append(f"padding counted in what {name} is predicted to {purpose}: its inputs are no positions")
