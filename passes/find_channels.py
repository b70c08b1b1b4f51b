"""Analysis: which channels between linears may change places without changing what the model computes. Changes nothing.

Where the outputs of linears reach the inputs of other linears through elementwise functions alone (the inside of an
MLP), or as values through attention, rows of the former and columns of the latter can be put in any order together:
it decides which columns share a group of M. Found by following the number of each channel through the graph, whatever
views, splits and copies of heads lie on the way.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_arg

from sparseforge_fx.graph.program import Program
from sparseforge_fx.graph.sizes import hint
from sparseforge_fx.kernels.soft_masked_linear import OP
from sparseforge_fx.passes.aliases import Elsewhere
from sparseforge_fx.passes.operators import MOVES, op_name
from sparseforge_fx.pattern import AnyPattern, Pattern

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
#: moves that change the dtype or the memory alone
COPIES = {"to", "_to_copy", "type_as", "contiguous", "clone", "alias", "detach"}


class Part(NamedTuple):
    """Some channels of a tensor: ``indices`` [k] along its dimension ``dim``."""

    fqn: str
    dim: int
    indices: Tensor


class Channels(NamedTuple):
    """k channels that may change places, if all of these do so in the same way.

    Attributes:
        columns: what the k inputs of consumers are multiplied by; consecutive, whole groups of M.
        rows: what computes them, biases included.
    """

    columns: tuple[Part, ...]
    rows: tuple[Part, ...]

    @torch.no_grad()
    def permute(self, tensors: Mapping[str, Tensor], order: Tensor) -> None:
        """Put channel ``order[i]`` at the place of channel i, in those of the tensors that are here."""
        for part in (*self.columns, *self.rows):
            if part.fqn in tensors:
                tensor = tensors[part.fqn]
                to = part.indices.to(tensor.device)
                tensor.index_copy_(part.dim, to, tensor.index_select(part.dim, to[order.to(tensor.device)]))


#: a producer and the number of one of its outputs
Channel = tuple[Node, int]


class _Flow(NamedTuple):
    """Of each entry of a value the channel that it comes from, per producer, and the head that mixed it (0: none)."""

    channels: dict[Node, Tensor]
    head: Tensor


def find_channels(program: Program, pattern: AnyPattern) -> tuple[list[Channels], dict[str, str]]:
    """The sets of channels between the soft-masked linears of ``program`` that may change places; and of other weights,
    by name, why the inputs stay where the graph alone would let them move.

    A producer whose outputs are read by anything else, whose weight has several uses, or whose bias does not require
    grad (it may be shared with a teacher) has none; nor has a pattern without groups.
    """
    if not isinstance(pattern, Pattern):
        return [], {}
    names = program.names(InputKind.PARAMETER)
    flows: dict[Node, Any] = {}
    spoiled: set[Channel] = set()
    read: list[tuple[Node, _Flow]] = []  # consumer, what each of its inputs is
    for node in program.graph.nodes:
        followed = [n for n in node.all_input_nodes if n in flows]
        if isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool) or op_name(node) == "_assert_tensor_metadata":
            continue
        if node.target == ATTENTION:
            spoiled.update(c for n in node.args[:2] if n in followed for c in _channels(flows[n]))
        if node.target == OP and followed == [node.args[0]]:
            read.append((node, flows[node.args[0]]))
        elif followed and (flow := _through(node, flows)) is not None:
            flows[node] = flow
        else:
            spoiled.update(c for n in followed for c in _channels(flows[n]))
        if node.target == OP and _may_move(program, node, names):
            shape = _sizes(node.meta["val"].shape)
            flows[node] = _Flow({node: torch.arange(shape[-1]).expand(shape)}, torch.zeros(shape, dtype=torch.long))
    return _unseen(program, _sets(read, spoiled, names, pattern))


def _unseen(program: Program, sets: list[Channels]) -> tuple[list[Channels], dict[str, str]]:
    """The sets that nothing of the model but the graph may look at, and why not the others."""
    elsewhere = Elsewhere(program)
    found: list[Channels] = []
    held: dict[str, str] = {}
    for each in sets:
        tensors = [(program.tensor(part.fqn), part) for part in (*each.columns, *each.rows)]
        widths = sorted({tensor.shape[part.dim] for tensor, part in tensors})
        reasons = [elsewhere.shares({part.fqn: tensor for tensor, part in tensors}), *map(elsewhere.may_see, widths)]
        reason = next((r for r in reasons if r is not None), None)
        if reason is None:
            found.append(each)
        else:
            held |= {part.fqn: f"its inputs keep their order: {reason}" for part in each.columns}
    return found, held


def _may_move(program: Program, node: Node, names: dict[Node, str]) -> bool:
    """Is this the only use of a weight of the model, and of its bias, if it has one?"""
    _, weight, _, bias, *_ = node.args
    vectors = [] if bias is None else [bias]
    alone = all(n in names and len(n.users) == 1 for n in (weight, *vectors))  # type: ignore[union-attr]
    return alone and all(program.tensor(names[n]).requires_grad for n in vectors)  # type: ignore[index]


def _channels(flow: Any) -> set[Channel]:
    parts = (flow,) if isinstance(flow, _Flow) else flow
    return {(p, i) for part in parts for p, t in part.channels.items() for i in t.unique().tolist()}


# -- following -------------------------------------------------------------------------------------------------------
def _through(node: Node, flows: dict[Node, Any]) -> Any:
    """What comes out of a node that moves values, computes each from those at its place, or attends; None: unknown."""
    first: Any = node.args[0] if node.args else None
    if node.target is operator.getitem:
        return flows[first][node.args[1]] if isinstance(flows[first], tuple) else None
    if op_name(node) in MOVES and isinstance(flows.get(first), _Flow):
        flow = flows[first]
        if op_name(node) in COPIES:
            return flow
        if any(isinstance(n.meta.get("val"), Tensor) for n in node.all_input_nodes if n is not first):
            return None  # places that are computed
        rest, named = map_arg((node.args[1:], node.kwargs), lambda n: hint(n.meta["val"]))
        rest, named = plain_sizes((rest, named))
        moved = {p: node.target(t.contiguous(), *rest, **named) for p, t in flow.channels.items()}  # type: ignore[operator]
        head = node.target(flow.head.contiguous(), *rest, **named)  # type: ignore[operator]
        if isinstance(head, Tensor):
            return _Flow(moved, head)
        return tuple(_Flow({p: t[i] for p, t in moved.items()}, head[i]) for i in range(len(head)))
    if torch.Tag.pointwise in getattr(node.target, "tags", ()) or op_name(node) == "dropout":
        return _met(node, flows)
    if node.target == ATTENTION:
        return _attended(node, flows)
    return None


def _met(node: Node, flows: dict[Node, Any]) -> _Flow | None:
    """Of an elementwise function, each of whose operands is followed, or one number."""
    met: dict[Node, Tensor] = {}
    heads = []
    for operand in node.all_input_nodes:
        if operand not in flows:
            value = operand.meta.get("val")
            if isinstance(value, Tensor) and value.numel() != 1:
                return None
            continue
        shape = _sizes(node.meta["val"].shape)
        for producer, channels in flows[operand].channels.items():
            channels = channels.expand(shape)
            if not torch.equal(met.setdefault(producer, channels), channels):
                return None
        heads.append(flows[operand].head.expand(shape))
    return _Flow(met, heads[0]) if all(torch.equal(h, heads[0]) for h in heads) else None


def _attended(node: Node, flows: dict[Node, Any]) -> _Flow | None:
    """Of attention: a sum over positions, other shares in every head."""
    value = node.args[2]
    if value not in flows or node.meta["val"].dim() != 4:
        return None
    shape = _sizes(node.meta["val"].shape)  # [batch, heads, positions, width]
    flow = flows[value]  # type: ignore[index]
    groups = shape[1] // flow.head.shape[1]

    def spread(t: Tensor) -> Tensor | None:
        if not torch.equal(t, t[:, :, :1].expand_as(t)):
            return None
        return t[:, :, :1].repeat_interleave(groups, 1).expand(shape)

    channels = {p: spread(t) for p, t in flow.channels.items()}
    head = spread(flow.head)
    if head is None or bool(head.any()) or any(t is None for t in channels.values()):
        return None
    return _Flow(channels, head + 1 + torch.arange(shape[1])[:, None, None])  # type: ignore[arg-type]


def _sizes(shape: Any) -> list[int]:
    return [hint(n) for n in shape]


def plain_sizes(value: Any) -> Any:
    """Numbers for sizes that are known by a symbol, anywhere in it: the example's."""
    return torch.utils._pytree.tree_map(hint, value)


# -- sets of channels ------------------------------------------------------------------------------------------------
def _sets(
    read: list[tuple[Node, _Flow]], spoiled: set[Channel], names: dict[Node, str], pattern: Pattern
) -> list[Channels]:
    blocks: dict[tuple, list[tuple[Node, Tensor]]] = defaultdict(list)  # tied ones, by what computes them
    for consumer, flow in read:
        _, weight, *_ = consumer.args
        found = _blocks(flow, pattern)
        if found is None or weight not in names or len(weight.users) != 1:  # type: ignore[union-attr]
            spoiled |= _channels(flow)
            continue
        for columns, rows in found:
            blocks[tuple((p, tuple(t.tolist())) for p, t in rows.items())].append((consumer, columns))
    of = {key: {(p, i) for p, ids in key for i in ids} for key in blocks}
    shared = Counter(channel for found in of.values() for channel in found)
    spoiled |= {channel for channel, count in shared.items() if count > 1}  # in two sets that are not tied
    return [
        Channels(
            tuple(_columns(c, t, names) for c, t in columns),
            tuple(part for p, ids in key for part in _rows(p, torch.tensor(ids), names)),
        )
        for key, columns in blocks.items()
        if spoiled.isdisjoint(of[key]) and all(len(set(ids)) == len(ids) for _, ids in key)
    ]


def _blocks(flow: _Flow, pattern: Pattern) -> list[tuple[Tensor, dict[Node, Tensor]]] | None:
    """Columns of one head each, and the channels that they are; None if inputs differ from row to row, or a head's
    columns are no whole groups."""
    head = flow.head.reshape(-1, flow.head.shape[-1])
    channels = {p: t.reshape(-1, t.shape[-1]) for p, t in flow.channels.items()}
    if any(not torch.equal(t, t[:1].expand_as(t)) for t in (head, *channels.values())):
        return None
    found = []
    for one in head[0].unique_consecutive():
        columns = (head[0] == one).nonzero()[:, 0]
        whole = len(columns) == int(columns[-1] - columns[0]) + 1
        if not whole or int(columns[0]) % pattern.m or len(columns) % pattern.m:
            return None
        found.append((columns, {p: t[0, columns] for p, t in channels.items()}))
    return found


def _columns(node: Node, indices: Tensor, names: dict[Node, str]) -> Part:
    _, weight, _, _, _, transposed, *_ = node.args
    return Part(names[weight], 0 if transposed else 1, indices)  # type: ignore[index]


def _rows(node: Node, indices: Tensor, names: dict[Node, str]) -> list[Part]:
    _, weight, _, bias, _, transposed, *_ = node.args
    parts = [Part(names[weight], 1 if transposed else 0, indices)]  # type: ignore[index]
    return parts if bias is None else [*parts, Part(names[bias], 0, indices)]  # type: ignore[index]
