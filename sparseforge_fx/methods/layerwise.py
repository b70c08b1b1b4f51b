"""Layer-wise pruning: every weight is solved on the inputs that the already pruned prefix of the model produces."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from sparseforge_fx.errors import AS_IT_WAS, add_sentence
from sparseforge_fx.formats import Format
from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.soft_masked_linear import OP
from sparseforge_fx.methods.calibrate import layer_by_layer
from sparseforge_fx.methods.reorder import find_order
from sparseforge_fx.methods.rounding import Rounded, follow, round_weight
from sparseforge_fx.methods.unseen import tell_unseen, unseen
from sparseforge_fx.methods.weights import MaskedWeight, put_back
from sparseforge_fx.passes.find_channels import Channels, find_channels
from sparseforge_fx.pattern import AnyPattern, Pattern


class LayerSolution(NamedTuple):
    """Weight and mask [out, in] of one pruned layer, and what the report should say of it."""

    weight: Tensor
    mask: Tensor
    note: str = ""


#: weight [out, in], its present mask, and the second moments X^T X / tokens [in, in] of its inputs -> its solution
Solve = Callable[[Tensor, Tensor, Tensor], LayerSolution]


@contextmanager
def undone_on_error(weights: Sequence[MaskedWeight], beside: Iterable[Tensor] = ()) -> Iterator[dict[str, Tensor]]:
    """Gives copies of the weights, and puts them back (with masks of one, and ``beside``) if what follows fails
    half-way, which the error then says."""
    dense = {w.fqn: w.weight.detach().clone() for w in weights}
    more = [(tensor, tensor.detach().clone()) for tensor in beside]
    try:
        yield dense
    except BaseException as error:
        if put_back([*((w.weight, dense[w.fqn]) for w in weights), *more]):
            add_sentence(error, AS_IT_WAS)
        with torch.no_grad():
            for w in weights:
                w.mask.fill_(1)
        raise


@torch.no_grad()
def prune_layer_by_layer(
    program: Program,
    weights: Sequence[MaskedWeight],
    batches: Sequence[Any],
    solve: Solve,
    reorder: AnyPattern | None = None,
) -> dict[str, str]:
    """``solve`` every weight of ``program`` in graph order, each on what the pruned ones before it make of ``batches``.

    Args:
        weights: those of the soft-masked program; their weights and masks are written.
        batches: calibration inputs: Readings, or any form that the captured model takes.
        solve: the layer-wise method.
        reorder: give inputs an order in which groups of this pattern lose less, where the graph lets them change
            places: what computes them is written, too.

    Returns what the solver noted, by weight. Memory: what is alive at one point of the graph, for all batches, and one
    [in, in] matrix.
    """
    by_name = {w.fqn: w for w in weights}
    notes: dict[str, str] = {}

    def visit(name: str, moments: Tensor) -> None:
        w = by_name[name]
        value, mask = (w.weight.t(), w.mask.t()) if w.dim == 0 else (w.weight, w.mask)
        result = solve(value, mask, moments)
        value.copy_(result.weight)
        mask.copy_(result.mask)
        if told := "; ".join(filter(None, (result.note, tell_unseen(moments)))):
            notes[name] = told

    module = program.module()
    moves = _Moves(program, reorder, by_name) if isinstance(reorder, Pattern) else None
    _add_padded(notes, layer_by_layer(module, _uses(module, by_name), batches, visit, reorder=moves))
    for name, told in ({} if moves is None else moves.notes).items():
        notes[name] = "; ".join(filter(None, (told, notes.get(name))))
    return notes


class _Moves:
    """Gives the inputs of a weight a better order, and the outputs of what computes them the same."""

    def __init__(self, program: Program, pattern: Pattern, weights: Mapping[str, MaskedWeight]):
        self.program, self.pattern, self.weights = program, pattern, weights
        self.sets: dict[str, list[Channels]] = {}
        for found in find_channels(program, pattern):
            if len(names := {part.fqn for part in found.columns}) == 1:
                self.sets.setdefault(names.pop(), []).append(found)
        self.notes: dict[str, str] = {}
        if not self.sets:
            self.notes[next(iter(weights))] = "reorder changes nothing: no channels of this graph may change places"

    def __call__(self, name: str, moments: Tensor) -> Tensor | None:
        w = self.weights[name]
        inputs = torch.arange(len(moments), device=moments.device)
        value = w.weight.t() if w.dim == 0 else w.weight
        worth = value.float().square() * moments.diagonal()
        tensors = self.program.state
        masks = {other.fqn: other.mask for other in self.weights.values()}
        moved: set[str] = set()
        for each in self.sets.get(name, ()):
            rows = torch.cat([worth[:, part.indices.to(worth.device)] for part in each.columns])
            order = find_order(rows, self.pattern)
            if torch.equal(order, torch.arange(len(order), device=order.device)):
                continue
            each.permute(tensors, order)
            each.permute(masks, order)
            for part in each.columns:
                columns = part.indices.to(inputs.device)
                inputs[columns] = columns[order]
            moved |= {part.fqn for part in each.rows}
        if not moved:
            return None
        self.notes[name] = f"its inputs have a new order, and so have the outputs of {', '.join(sorted(moved))}"
        return inputs


@torch.no_grad()
def round_layer_by_layer(
    program: Program,
    weights: Sequence[MaskedWeight],
    batches: Sequence[Any],
    formats: Mapping[str, Format],
    seen: Callable[[str, Tensor, Rounded], object] = lambda *_: None,
) -> tuple[dict[str, Rounded], dict[str, str]]:
    """Put weights on a grid in graph order, each such that it answers what the rounded ones before it make of
    ``batches`` as the model before rounding answers what it sees itself.

    Args:
        weights: those of the soft-masked program, masks included; they are written.
        batches: as for :func:`prune_layer_by_layer`; twice its time and memory, and a copy of the weights.
        formats: of each weight; its width must fit.
        seen: told of each weight: its name, the floats [out, in] that were to be rounded, and what came of them.

    Returns codes and scales [out, in], and notes, by weight.
    """
    by_name = {w.fqn: w for w in weights if w.fqn in formats}
    rounded: dict[str, Rounded] = {}
    notes: dict[str, str] = {}

    def visit(name: str, moments: Tensor, cross: Tensor) -> None:
        w = by_name[name]
        value, mask = (w.weight.t(), w.mask.t()) if w.dim == 0 else (w.weight, w.mask)
        aim = follow(value * mask, moments, cross)
        rounded[name] = round_weight(aim, formats[name], moments)
        seen(name, aim, rounded[name])
        value.copy_(rounded[name].weight)
        if bool(unseen(moments).all()):
            notes[name] = "saw no calibration token: its own nearest values"

    module = program.module()
    twin = {name: w.weight.detach().clone() for name, w in by_name.items()}
    _add_padded(notes, layer_by_layer(module, _uses(module, by_name), batches, visit, twin))
    return rounded, notes


def _uses(module: GraphModule, names: Collection[str]) -> dict[Node, tuple[str, int]]:
    """The nodes that multiply by a weight of these names, as :func:`layer_by_layer` takes them."""
    nodes = {n: (str(n.args[1].target), 0) for n in module.graph.find_nodes(op="call_function", target=OP)}  # type: ignore[union-attr]
    return {n: w for n, w in nodes.items() if w[0] in names}


def _add_padded(notes: dict[str, str], names: Iterable[str]) -> None:
    for name in names:
        told = "padding counted: its inputs are not the batch's positions"
        notes[name] = "; ".join(filter(None, (notes.get(name), told)))
