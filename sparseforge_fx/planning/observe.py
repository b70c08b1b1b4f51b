"""What the dense model says of weights on the calibration data: the moments of their inputs, the curvature of their
outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch.fx import Node

from sparseforge_fx.data.reading import Reading
from sparseforge_fx.graph.capture import as_call
from sparseforge_fx.methods.calibrate import Expert, Read, layer_by_layer
from sparseforge_fx.methods.experts import Experts
from sparseforge_fx.passes.find_linears import LinearSite
from sparseforge_fx.passes.operators import LINEAR_OPS, STACK_OPS
from sparseforge_fx.passes.uses import LinearUse, stack_operands
from sparseforge_fx.planning.sensitivity import drawn, output_curvature
from sparseforge_fx.training.distillation import Distillation
from sparseforge_fx.training.first_batch import check_batch
from sparseforge_fx.training.inputs import Run
from sparseforge_fx.training.objective import Objective
from sparseforge_fx.training.recipe import Recipe

#: fields of a recipe that there is a use for
READING = ("include", "exclude", "calibration", "batch_size", "length", "seed", "text_column", "separator")
EXPERTS = 8  # of a stack that are looked at
#: told of a weight: its name, the weight [out, in] in float32, the moments [in, in] of its inputs, and the curvature
#: [out] of its outputs. Of a stack it is told of some experts, one after the other, whose curvature is such that their
#: sum stands for that of all
See = Callable[[str, Tensor, Tensor, Tensor], object]


def check_answer(run: Run) -> None:
    """Raise SparseForgeError for an answer without a curvature."""
    assert run.batches is not None
    objective = Objective(Distillation(task=0), getattr(run.program.source, "config", None), run.reader.note)
    check_batch(run.program, run.reader, objective, run.batches.batch(0))


def observe(
    run: Run,
    recipe: Recipe,
    sites: Sequence[LinearSite],
    see: See,
    purpose: str,
    taken: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, float]:
    """Tell ``see`` of every weight, in the graph's order: one walk with gradients, one for the moments of the inputs.

    Args:
        purpose: what is made of it, for the notes: where padding counts, and where the answers have no gradient.
        taken: nodes of embeddings, with the name of the weight that they take rows of.

    Returns by that name what is at stake there (:func:`output_curvature`).
    """
    batches: list[Reading] = [run.reader.read(*as_call(batch)) for batch in run.first(recipe.calibration)]
    module = run.program.module()
    by_use = {use.node: (site, use) for site in sites for use in site.uses}
    reads = {node: read_of(node, *by_use[node.name]) for node in module.graph.nodes if node.name in by_use}
    loss = recipe.settings(True).objective
    objective = Objective(loss, getattr(run.program.source, "config", None), run.reader.note)
    rows = [node for node in module.graph.nodes if node.name in taken]
    curvature = output_curvature(module, reads, batches, objective.answer, seed=recipe.seed, taken=rows)
    by_name = {site.fqn: site for site in sites}
    experts = Experts(told_of_few="predicted from one input at a time")
    standing = {name: drawn_experts(_oriented(run, by_name[name]), g) for name, g in curvature.items() if g.dim() == 2}

    def visit(name: str, moments: Tensor, expert: Expert | None = None) -> None:
        site, place = by_name[name], 0 if expert is None else expert.place
        weight = _oriented(run, site)
        sharpness = curvature.get(name, torch.zeros(weight.shape[:-1], device=weight.device))
        if not sharpness.any() and place == 0:
            run.notes.append(f"no gradient of the answers reaches {name}: nothing is predicted to {purpose} there")
        if expert is None:
            see(name, weight.float(), moments, sharpness)
        elif place in (shares := standing.get(name, {})):
            if not experts.see(name, expert):  # so few say nothing of how inputs go together
                moments = moments.diag().diag()
            see(name, weight[place].float(), moments, sharpness[place] * shares[place])

    for name in layer_by_layer(module, reads, batches, visit):
        run.notes.append(f"padding counted in what {name} is predicted to {purpose}: its inputs are no positions")
    run.notes += [f"{name}: {told}" for name, told in experts.told().items()]
    stakes = dict.fromkeys(taken.values(), 0.0)
    for node, name in taken.items():
        stakes[name] += float(curvature.get(node, 0.0))
    return stakes


def read_of(node: Node, site: LinearSite, use: LinearUse) -> Read:
    """How a node of the graph multiplies by the site's weight."""
    if site.experts is None or use.expert is not None:
        return Read(site.fqn, LINEAR_OPS[node.target][0], use.expert)
    found = stack_operands(node)
    assert found is not None
    return Read(site.fqn, STACK_OPS[str(node.target)][0], None, found.offsets, site.experts)


def _oriented(run: Run, site: LinearSite) -> Tensor:
    """[out, in], of a stack [experts, out, in]"""
    stored = run.program.tensor(site.fqn).detach()
    return stored.mT if site.transposed else stored


def drawn_experts(stack: Tensor, curvature: Tensor) -> dict[int, float]:
    """Some experts that stand for all, and how many each is: drawn as :func:`drawn` does, by sum_o g_o |w_o|^2."""
    energies = torch.stack([w.float().square().sum(1).double() for w in stack])
    places, shares = drawn((energies * curvature.double()).sum(1), EXPERTS)
    return dict(zip(places.tolist(), shares.tolist(), strict=True))
