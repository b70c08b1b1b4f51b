"""scaled_dot_product_attention of one position -> products and sums in float32 or better, which Inductor fuses.

For compiled graphs on a CPU that write the next token: torch's kernel calls BLAS for every head of every sequence,
which on some processors has no fast product of a vector in 16 bits, and reads keys and values from copies, one for each
head of the queries.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from sparseforge_fx.graph.program import Program
from sparseforge_fx.passes.base import PassResult
from sparseforge_fx.passes.rewrite import aten, insert_traced

ATTENTION = aten.scaled_dot_product_attention.default


def expand_attention(program: Program) -> PassResult:
    """Take attention apart where the queries are [B, H, 1, D] and nothing is dropped at random.

    The result differs from torch's by the order of the sums, and, in 16 bits, is nearer to that in float32.
    """
    modified = 0
    for node in program.graph.find_nodes(op="call_function", target=ATTENTION):
        given = _arguments(*node.args, **node.kwargs)
        query, key, value, mask = (given[name] for name in ("query", "key", "value", "mask"))
        if query.meta["val"].dim() != 4 or query.meta["val"].shape[2] != 1 or given["dropout_p"] or given["is_causal"]:
            continue
        tensors = [query, key, value, *([mask] if mask is not None else [])]
        options = {"scale": given["scale"], "groups": _groups(query, key) if given["enable_gqa"] else 1}
        fakes = [t.meta["val"] for t in tensors]
        with fakes[0].fake_mode:
            traced = make_fx(lambda *t, o=options: _attend(*t, **o))(*fakes)
        program.replace(node, insert_traced(traced, node, *tensors))
        modified += 1
    return PassResult(program, modified)


def _arguments(
    query: Node,
    key: Node,
    value: Node,
    attn_mask: Node | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> dict[str, Any]:
    found = {"query": query, "key": key, "value": value, "mask": attn_mask, "dropout_p": dropout_p}
    return {**found, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}


def _groups(query: Node, key: Node) -> int:
    """Heads of the queries for one of the keys."""
    return query.meta["val"].shape[1] // key.meta["val"].shape[1]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, scale: float | None, groups: int
) -> Tensor:
    """[B, H, 1, D] over keys [B, H / groups, L, D] and values [B, H / groups, L, V] -> [B, H, 1, V]."""
    if groups > 1:
        key, value = (t.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for t in (key, value))
    exact = torch.promote_types(query.dtype, torch.float32)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query.to(exact) * factor * key.to(exact)).sum(-1, keepdim=True)  # [B, H, L, 1]
    if mask is not None:
        seen = mask.transpose(-1, -2)  # from [.., 1, L]
        scores = scores.masked_fill(~seen, -math.inf) if mask.dtype == torch.bool else scores + seen
    shares = torch.ops.aten._safe_softmax(scores, -2)  # zeros where no position is seen
    return (shares * value.to(exact)).sum(-2, keepdim=True).to(query.dtype)
