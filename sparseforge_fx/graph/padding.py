"""Whose rows are real: which mask of padding speaks of the rows of each value in a graph, and their selection."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

MASK, DECODER_MASK = "attention_mask", "decoder_attention_mask"  # [batch, positions], 0 where there is padding
#: what a mask [batch, positions] is beside, whatever the trace says of their sizes
TEXT = ("input_ids", "inputs_embeds")


class Rows(NamedTuple):
    """Whose rows a value [..., width] has: those of the mask of this name; ``positions_first``: all samples of one
    position after the other, as torch's own attention flattens them."""

    mask: str
    positions_first: bool = False

    def of(self, real: Mapping[str, Tensor]) -> Tensor | None:
        """Their mask in their order; ``real``: by name, [batch, positions]."""
        mask = real.get(self.mask)
        return mask.t() if mask is not None and self.positions_first else mask


def mask_names(graph: Graph, inputs: Iterable[Node]) -> dict[Node, Rows]:
    """Node -> ``decoder_attention_mask`` for what depends on a decoder's inputs, ``attention_mask`` for what depends on
    the other inputs whose positions that mask has. Values that depend on neither (another tower's) are left out.

    Args:
        inputs: the placeholders that are the user's, not parameters or buffers.
    """
    inputs = list(inputs)
    mask = next((n for n in inputs if n.name == MASK), None)
    names: dict[Node, Rows] = {}
    for node in inputs:
        if node.name.startswith("decoder_"):
            names[node] = Rows(DECODER_MASK)
        elif node.name in TEXT or (mask is not None and node is not mask and _same_positions(node, mask)):
            names[node] = Rows(MASK)
    sizes = {_lead(node) for node in names}
    if mask is not None:  # it tells what of ids [positions, batch] comes first
        sizes = (sizes - {_lead(mask)[::-1]}) | {_lead(mask)}
    for node in graph.nodes:
        found = [names[n] for n in node.all_input_nodes if n in names]
        if found and not isinstance(node.meta.get("val"), torch.SymInt):  # the trace reads a size wherever it stands
            masks = {rows.mask for rows in found}
            name = DECODER_MASK if DECODER_MASK in masks else MASK
            names[node] = Rows(name, _positions_first(node, found, sizes))
    return names


def _lead(node: Node) -> tuple[str, ...]:
    """The first two sizes: numbers, or the trace's symbols."""
    return tuple(map(str, getattr(node.meta.get("val"), "shape", ())[:2]))


def _positions_first(node: Node, found: Sequence[Rows], sizes: set[tuple[str, ...]]) -> bool:
    """By the first two sizes of a value, where they tell (``sizes``: those of [batch, positions]); else as what it is
    made of. Rows that are samples have one order."""
    shape, lead = getattr(node.meta.get("val"), "shape", ()), _lead(node)
    if len(shape) > 2 and (lead in sizes or lead[::-1] in sizes):
        return lead not in sizes
    if len(shape) == 2 and lead[0] in {size[0] for size in sizes if size}:
        return False
    return any(rows.positions_first for rows in found)


def _same_positions(node: Node, mask: Node) -> bool:
    """By the second size alone: the trace may not know that the batches are one."""
    mine, theirs = (tuple(getattr(n.meta.get("val"), "shape", ())) for n in (node, mask))
    return len(mine) >= 2 and len(theirs) == 2 and str(mine[1]) == str(theirs[1])


def real_rows(value: Tensor, mask: Tensor | None) -> Tensor | None:
    """The rows of ``value`` [..., width] that are real, as [rows, width].

    Args:
        mask: bool [batch, positions], or [positions, batch] of such rows (:meth:`Rows.of`), or None: all are real.

    A value with one row per sample has no padding. None where its rows are neither samples nor positions, and some
    positions are padding.
    """
    lead = value.shape[:-1]
    flat = value.reshape(-1, value.shape[-1])
    if mask is None or bool(mask.all()) or lead == mask.shape[:1]:
        return flat
    if lead[:2] == mask.shape:
        return value[mask].reshape(-1, value.shape[-1])
    if lead[1::-1] == mask.shape:
        return value[mask.t()].reshape(-1, value.shape[-1])
    return flat[mask.flatten()] if flat.shape[0] == mask.numel() else None


def positions_of(node: Node, names: dict[Node, Rows], inputs: Mapping[str, Node]) -> Node | None:
    """The input that says which rows of a node's value [..., width] are padding; None where its rows are no positions
    or stand in another order.

    Args:
        names: of :func:`mask_names`.
        inputs: the user's inputs by name.
    """
    rows = names.get(node)
    mask = None if rows is None or rows.positions_first else inputs.get(rows.mask)
    beside = next((n for n in inputs.values() if n is not mask and names.get(n) == rows), None)
    if mask is None or beside is None:
        return None
    lead, sizes = node.meta["val"].shape[:-1], beside.meta["val"].shape[: mask.meta["val"].dim()]
    same_order = len(lead) < 2 or str(lead[-1]) == str(sizes[-1])
    return mask if same_order and str(math.prod(lead)) == str(math.prod(sizes)) else None
