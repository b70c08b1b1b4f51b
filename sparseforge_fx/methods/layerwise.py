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
from sparseforge_fx.kernels.soft_masked_experts import EXPERTS_OP
from sparseforge_fx.kernels.soft_masked_linear import OP
from sparseforge_fx.methods.calibrate import Expert, Read, layer_by_layer
from sparseforge_fx.methods.experts import Experts
from sparseforge_fx.methods.reorder import Reordering
from sparseforge_fx.methods.rounding import Rounded, follow, round_weight, stacked
from sparseforge_fx.methods.streamed import Streamed
from sparseforge_fx.methods.unseen import tell_unseen, unseen
from sparseforge_fx.methods.weights import MaskedWeight, put_back
from sparseforge_fx.pattern import hard_mask
from sparseforge_fx.progress import counted


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
    experts: Experts | None = None,
    reorder: Reordering | None = None,
    streamed: tuple[GraphModule, Streamed] | None = None,
    notes: dict[str, str] | None = None,
) -> dict[str, str]:
    """``solve`` every weight of ``program`` in graph order, each on what the pruned ones before it make of ``batches``.

    Every expert of a stack is solved on the tokens that were routed to it; one that saw too few is pruned by magnitude.

    Args:
        weights: those of the soft-masked program; their weights and masks are written.
        batches: calibration inputs: Readings, or any form that the captured model takes.
        solve: the layer-wise method.
        experts: how few tokens are too few, and where it is kept what each expert saw.
        reorder: gives inputs another order, where the graph lets them change places: what computes them is written,
            too.
        streamed: the module to walk, and where its weights are, if they are not in memory.
        notes: those of an earlier part of the same walk; they are added to.

    Returns what the solver noted, by weight. Memory: what is alive at one point of the graph, for all batches, and one
    [in, in] matrix.
    """
    by_name = {w.fqn: w for w in weights}
    notes = {} if notes is None else notes
    experts = Experts() if experts is None else experts

    def visit(name: str, moments: Tensor, expert: Expert | None = None) -> None:
        value, mask = by_name[name].oriented(None if expert is None else expert.place)
        dense = value.clone()
        few = expert is not None and not experts.see(name, expert)
        if few:
            chosen = hard_mask(value.abs(), experts.pattern)
            result = LayerSolution(value * chosen, chosen)
        else:
            result = solve(value, mask, moments)
        value.copy_(result.weight)
        mask.copy_(result.mask)
        experts.lost(name, dense, value, moments, 0 if expert is None else expert.place)
        told = "; ".join(filter(None, (result.note, tell_unseen(moments))))
        if told and expert is not None and not few:
            experts.notes.setdefault(name, {}).setdefault(told, []).append(expert.place)
        elif told and expert is None:
            notes[name] = told
        advance()

    module, outside = (program.module(), None) if streamed is None else streamed
    uses = _uses(module, by_name)
    count = {w.fqn: w.weight.shape[:-2].numel() for w in weights}
    done = sum(count[name] for name in ([] if outside is None else outside.finished))
    with counted("layer by layer", sum(count.values()), done) as advance:
        padded = layer_by_layer(
            module, uses, batches, visit, reorder=reorder, every_token=experts.every_token, streamed=outside
        )
    for w in weights if outside is None else ():  # what the graph never reads
        read = {use.expert for use in uses.values() if use.name == w.fqn}
        for place in range(len(w.weight)) if w.weight.dim() == 3 and None not in read else ():
            if place not in read:
                value, mask = w.oriented(place)
                mask.copy_(hard_mask(value.abs(), experts.pattern))
                value.mul_(mask)
                experts.never_read(w.fqn, place)
    notes |= experts.told()
    _add_padded(notes, padded)
    for name, told in ({} if reorder is None else reorder.notes).items():
        notes[name] = "; ".join(filter(None, (told, notes.get(name))))
    return notes


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
        seen: told of each weight that is no stack: its name, the floats [out, in] that were to be rounded, and what
            came of them.

    Every expert of a stack is rounded on the tokens that were routed to it; one that saw too few gets its own nearest
    values. Returns codes and scales [out, in] or [experts, out, in], and notes, by weight.
    """
    by_name = {w.fqn: w for w in weights if w.fqn in formats}
    rounded: dict[str, dict[int, Rounded]] = {name: {} for name in by_name}
    notes: dict[str, str] = {}
    experts = Experts(told_of_few="its own nearest values")

    def visit(name: str, moments: Tensor, cross: Tensor | None = None, expert: Expert | None = None) -> None:
        place = None if expert is None else expert.place
        value, mask = by_name[name].oriented(place)
        enough = expert is None or experts.see(name, expert)
        # the twin sends other tokens to an expert than those that it sees here: there is nothing to follow
        aim = value * mask if cross is None or not enough else follow(value * mask, moments, cross)
        found = rounded[name][place or 0] = round_weight(aim, formats[name], moments if enough else None)
        if expert is None:
            seen(name, aim, found)
        value.copy_(found.weight)
        if expert is None and bool(unseen(moments).all()):
            notes[name] = "saw no calibration token: its own nearest values"
        advance()

    module = program.module()
    twin = {name: w.weight.detach().clone() for name, w in by_name.items()}
    with counted("rounding layer by layer", sum(w.weight.shape[:-2].numel() for w in by_name.values())) as advance:
        _add_padded(notes, layer_by_layer(module, _uses(module, by_name), batches, visit, twin))
    for name, found in rounded.items():
        for place in range(len(by_name[name].weight)) if by_name[name].weight.dim() == 3 else ():
            if place not in found:  # the graph never reads it
                value, mask = by_name[name].oriented(place)
                found[place] = round_weight(value * mask, formats[name])
                experts.never_read(name, place)
    result = {
        name: stacked([found[e] for e in sorted(found)]) if by_name[name].weight.dim() == 3 else found[0]
        for name, found in rounded.items()
        if found
    }
    return result, notes | experts.told()


def _uses(module: GraphModule, names: Collection[str]) -> dict[Node, Read]:
    """The nodes that multiply by a weight of these names, as :func:`layer_by_layer` takes them."""
    found = {}
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target not in (OP, EXPERTS_OP):
            continue
        weight, expert = node.args[1], None
        if weight.op == "call_function":  # a slice of a stack
            weight, expert = weight.args[0], weight.args[2]
        if str(weight.target) not in names:
            continue
        if node.target == OP:
            found[node] = Read(str(weight.target), 0, expert)
        else:
            count = len(module.get_parameter(str(weight.target)))
            offsets = node.args[3] if isinstance(node.args[3], Node) else None
            found[node] = Read(str(weight.target), 0, None, offsets, count)
    return found


def _add_padded(notes: dict[str, str], names: Iterable[str]) -> None:
    for name in names:
        told = "padding counted: its inputs are not the batch's positions"
        notes[name] = "; ".join(filter(None, (notes.get(name), told)))
