"""Layer-wise pruning: every weight is solved on the inputs that the already pruned prefix of the model produces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseforge_fx.errors import AS_IT_WAS, add_sentence
from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.soft_masked_linear import OP
from sparseforge_fx.methods.calibrate import layer_by_layer
from sparseforge_fx.methods.weights import MaskedWeight, put_back


class LayerSolution(NamedTuple):
    """Weight and mask [out, in] of one pruned layer, what the report should say of it, and the scales [out, groups] of
    a weight that was put on a grid."""

    weight: Tensor
    mask: Tensor
    note: str = ""
    scales: Tensor | None = None


class Walked(NamedTuple):
    """By weight: what the solver noted, and the scales of those that it put on a grid."""

    notes: dict[str, str]
    scales: dict[str, Tensor]


#: weight [out, in], its present mask, and the second moments X^T X / tokens [in, in] of its inputs -> its solution
Solve = Callable[[Tensor, Tensor, Tensor], LayerSolution]


@contextmanager
def undone_on_error(weights: Sequence[MaskedWeight]) -> Iterator[dict[str, Tensor]]:
    """Gives copies of the weights, and puts them back (with masks of one) if what follows fails half-way, which the
    error then says."""
    dense = {w.fqn: w.weight.detach().clone() for w in weights}
    try:
        yield dense
    except BaseException as error:
        if put_back([(w.weight, dense[w.fqn]) for w in weights]):
            add_sentence(error, AS_IT_WAS)
        with torch.no_grad():
            for w in weights:
                w.mask.fill_(1)
        raise


@torch.no_grad()
def prune_layer_by_layer(
    program: Program, weights: Sequence[MaskedWeight], batches: Sequence[Any], solve: Solve
) -> Walked:
    """``solve`` every weight of ``program`` in graph order, each on what the pruned ones before it make of ``batches``.

    Args:
        weights: those of the soft-masked program; their weights and masks are written.
        batches: calibration inputs: Readings, or any form that the captured model takes.
        solve: the layer-wise method.

    Returns notes and scales. Memory: what is alive at one point of the graph, for all batches, and one
    [in, in] matrix.
    """
    by_name = {w.fqn: w for w in weights}
    notes: dict[str, str] = {}
    scales: dict[str, Tensor] = {}

    def visit(name: str, moments: Tensor) -> None:
        w = by_name[name]
        value, mask = (w.weight.t(), w.mask.t()) if w.dim == 0 else (w.weight, w.mask)
        result = solve(value, mask, moments)
        value.copy_(result.weight)
        mask.copy_(result.mask)
        if result.scales is not None:
            scales[name] = result.scales
        if result.note:
            notes[name] = result.note

    module = program.module()
    nodes = {n: (str(n.args[1].target), 0) for n in module.graph.find_nodes(op="call_function", target=OP)}
    for name in layer_by_layer(module, {n: w for n, w in nodes.items() if w[0] in by_name}, batches, visit):
        told = "padding counted: its inputs are not the batch's positions"
        notes[name] = "; ".join(filter(None, (notes.get(name), told)))
    return Walked(notes, scales)
