"""Adapters that nobody declares, by their place in the graph: two linears of a narrow width between them, whose result
is added to that of a linear of the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch.fx import Node

from sparseforge_fx.passes.operators import LINEAR_OPS, MOVES, op_name

SUMS, SCALES = {"add", "add_"}, {"mul", "div", "dropout"}


class Sized(Protocol):
    """What is to be known of the weight of a linear."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...


def find_low_rank_pairs(weights: Mapping[Node, Sized]) -> dict[Node, Node]:
    """Nodes of the two linears of every pair -> the node of the linear to whose output theirs is added.

    ``weights``: of all linear nodes. Nothing but moves and scales stands between the two, and between them and the sum.
    """

    def back(value: Any) -> Any:
        """The node whose value this is, but for moves and scales."""
        while isinstance(value, Node) and value not in weights and (op_name(value) in MOVES or _scales(value)):
            value = next((a for a in value.args if isinstance(a, Node)), None)
        return value

    def origin(linear: Node) -> Any:
        return back(linear.args[LINEAR_OPS[linear.target][0]])  # type: ignore[index]

    found: dict[Node, Node] = {}
    for up in weights:
        down = origin(up)
        if down in weights and weights[down].out_features < min(weights[down].in_features, weights[up].out_features):
            for base in _added_to(up, back):
                if base in weights and base is not up and origin(base) is origin(down):
                    found |= {up: base, down: base}
    return {node: base for node, base in found.items() if base not in found}


def _scales(node: Node) -> bool:
    """By a number or a parameter."""
    return op_name(node) in SCALES and sum(n.op != "placeholder" for n in node.all_input_nodes) <= 1


def _added_to(node: Node, back: Callable[[Any], Any]) -> Iterator[Any]:
    """All terms of the sum that a value goes into."""
    while True:
        readers = [n for n in node.users if op_name(n) != "_assert_tensor_metadata"]  # stands beside a cast
        if len(readers) != 1:
            return
        (node,) = readers
        if op_name(node) in SUMS:
            break
        if op_name(node) not in MOVES and not _scales(node):
            return
    stack = [node]
    while stack:
        for term in map(back, stack.pop().args):
            if isinstance(term, Node) and op_name(term) in SUMS:
                stack.append(term)
            else:
                yield term
