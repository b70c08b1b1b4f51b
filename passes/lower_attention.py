"""scaled_dot_product_attention of one position -> ``sparseforge::decode_attention``.

For compiled graphs on a CPU that write the next token. Keys and values that were repeated for heads of queries, as
models do it for torch's kernel, are taken from before that: the operator reads each once.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.decode_attention import DECODE_ATTENTION_OP, DTYPES
from sparseforge_fx.passes.base import PassResult
from sparseforge_fx.passes.rewrite import aten

ATTENTION = aten.scaled_dot_product_attention.default
_RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


def lower_attention(program: Program) -> PassResult:
    """Put the operator in where the queries are [B, H, 1, D] and nothing is dropped at random.

    The result differs from torch's by the order of the sums, and, in 16 bits, is nearer to that in float32.
    """
    modified = 0
    for node in program.graph.find_nodes(op="call_function", target=ATTENTION):
        given = _arguments(*node.args, **node.kwargs)
        if not _served(given):
            continue
        query, key, value = (given[name] for name in ("query", "key", "value"))
        sources = _before_repeating(key), _before_repeating(value)
        if statically_known_true(_heads(sources[0]) == _heads(sources[1])):
            key, value = sources
        scale = 1 / math.sqrt(query.meta["val"].shape[-1]) if given["scale"] is None else given["scale"]
        arguments = query, key, value, given["mask"], scale
        program.replace(
            node, program.insert_before(node, DECODE_ATTENTION_OP, *arguments, value=node.meta["val"].contiguous())
        )
        modified += 1
    if modified:
        program.graph.eliminate_dead_code()  # what repeated keys and values
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
    return {**found, "is_causal": is_causal, "scale": scale}


def _served(given: dict[str, Any]) -> bool:
    query, key, value = (given[name].meta["val"] for name in ("query", "key", "value"))
    if query.dim() != 4 or query.shape[2] != 1 or given["dropout_p"] or given["is_causal"]:
        return False
    fits = [t.shape[0] == query.shape[0] for t in (key, value)]  # torch's would repeat a single one
    fits += [key.shape[1] == value.shape[1], query.shape[1] % key.shape[1] == 0]
    return query.dtype in DTYPES and all(map(statically_known_true, fits))


def _heads(node: Node) -> Any:
    """Of keys or values [B, heads, L, D]."""
    return node.meta["val"].shape[1]


def _before_repeating(node: Node) -> Node:
    """[B, heads, L, D] of which ``node`` [B, heads * count, L, D] has each head so often in a row; else itself."""
    wide = node.args[0] if node.target in _RESHAPES else None
    if not isinstance(wide, Node) or wide.target != aten.expand.default:
        return node
    narrow: Any = wide.args[0]
    while narrow.target == aten.slice.Tensor and narrow.args[2:] == (0, sys.maxsize):
        narrow = narrow.args[0]
    if narrow.target != aten.unsqueeze.default or narrow.args[1] not in (2, -3):
        return node
    source = narrow.args[0]
    before, after, found = source.meta["val"].shape, wide.meta["val"].shape, node.meta["val"].shape
    if len(before) != 4 or len(found) != 4:
        return node
    wanted = before[0], before[1] * after[2], *before[2:]
    same = [a == b for a, b in zip((*after[:2], *after[3:], *found), (*before, *wanted), strict=True)]
    return source if all(map(statically_known_true, same)) else node
