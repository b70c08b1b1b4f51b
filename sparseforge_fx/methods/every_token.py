"""What each expert would see if every token came to it: the part of a graph between the routed rows and an expert's
product, computed again with all rows in the place of the routed ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.fx.node import map_arg

from sparseforge_fx.kernels.soft_masked_experts import EXPERTS_OP

aten = torch.ops.aten


class CannotTell(Exception):
    """The graph does more with the routing than to pick rows."""


def tokens_of(product: Node) -> Node | None:
    """The rows that routing picks from, for the product of a stack whose rows follow one another: what the first
    product with the same routing reads is ``tokens[picked]``. None where the graph is another."""
    if product.target != EXPERTS_OP or not isinstance(product.args[3], Node):
        return None
    first = next(n for n in product.graph.nodes if n.target == EXPERTS_OP and n.args[3] is product.args[3])
    rows = first.args[0]
    while isinstance(rows, Node) and rows.target in (aten.to.dtype, aten._to_copy.default):
        rows = rows.args[0]  # type: ignore[assignment]
    if not isinstance(rows, Node) or rows.target != aten.index.Tensor or len(rows.args[1]) != 1:  # type: ignore[arg-type]
        return None
    return rows.args[0]  # type: ignore[return-value]


def kept_for(products: Iterable[Node]) -> dict[Node, list[Node]]:
    """Product -> what must not be forgotten before it runs."""
    return {p: [tokens] for p in products if (tokens := tokens_of(p)) is not None}


def inputs_of_expert(run: Interpreter, product: Node, expert: int) -> Tensor:
    """The inputs [tokens, in] of one expert if every token came to it.

    Raises CannotTell where the graph between the products does more than functions of single rows.
    """
    tokens = tokens_of(product)
    if tokens is None:
        raise CannotTell
    offsets = product.args[3]
    known: dict[Node, Any] = {}

    def value(node: Node) -> Any:
        if node not in known:
            known[node] = compute(node)
        return known[node]

    def compute(node: Node) -> Any:
        if node.op in ("placeholder", "get_attr"):
            return run.env[node] if node in run.env else run.run_node(node)
        if node.target == EXPERTS_OP and node.args[3] is offsets:
            x, weight, mask, _, bias, _, transposed, _ = node.args
            if bias is not None:
                raise CannotTell
            w = value(weight)[expert] * value(mask)[expert]  # type: ignore[arg-type]
            return value(x) @ (w if transposed else w.t())  # type: ignore[arg-type]
        if node.target == aten.index.Tensor:
            (picked,) = node.args[1] if len(node.args[1]) == 1 else (None,)  # type: ignore[arg-type,misc]
            if node.args[0] is tokens:
                return run.env[tokens].reshape(-1, run.env[tokens].shape[-1])
            of_experts = isinstance(node.args[0], Node) and node.args[0].op in ("placeholder", "get_attr")
            if picked is None or not of_experts:
                raise CannotTell
            return value(node.args[0])[expert][None]  # type: ignore[arg-type]  # a row of each expert's: its bias
        if node.op != "call_function" or node is offsets or node is tokens:
            raise CannotTell
        args, kwargs = map_arg((node.args, node.kwargs), value)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    return value(product.args[0])  # type: ignore[arg-type]
