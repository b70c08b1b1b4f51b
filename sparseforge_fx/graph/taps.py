"""Intermediate values of a captured graph, found by its structure and not by names: hidden states and attention scores.

Hidden states are what each repeated block hands to the next. Attention is found where the graph calls
scaled_dot_product_attention: its queries and keys are kept, and the scores are computed from them when they are asked
for, so that the fused kernel stays.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.compile import block_outputs, shallow_twin
from sparseforge_fx.graph.padding import Rows, mask_names


class Taps:
    """Filled by every forward pass of the modules that it was given to; clear it before each."""

    def __init__(self) -> None:
        self.hidden: list[Tensor] = []
        self.hidden_rows: list[Rows | None] = []  # for each, the mask of padding that speaks of its rows
        self.attention: list[Tensor] = []  # scores before the softmax [batch, heads, queries, keys], -inf where masked
        self.attention_rows: list[Rows | None] = []

    def clear(self) -> None:
        """Forget the last forward pass."""
        self.hidden.clear()
        self.attention.clear()


class _KeepHidden(nn.Module):
    def __init__(self, taps: Taps):
        super().__init__()
        self._taps = taps

    def forward(self, value: Tensor) -> Tensor:
        self._taps.hidden.append(value)
        return value


class _KeepAttention(nn.Module):
    def __init__(self, taps: Taps, scale: float | None, causal: bool):
        super().__init__()
        self._taps, self._scale, self._causal = taps, scale, causal

    def forward(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        if key.shape[1] != query.shape[1]:  # grouped queries
            key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scale = self._scale if self._scale is not None else 1 / math.sqrt(query.shape[-1])
        scores = (query @ key.transpose(-1, -2)).float() * scale
        hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        if self._causal:
            hidden = hidden.logical_not().triu(1)
        if mask is not None and mask.dtype == torch.bool:
            hidden = hidden | ~mask
        elif mask is not None:
            scores, hidden = scores + mask, hidden | (mask < -1e4)  # masks of finite numbers mean the same
        self._taps.attention.append(scores.masked_fill(hidden, -math.inf))
        return query


def tap(module: GraphModule, taps: Taps, *, attention: bool = False) -> GraphModule:
    """A twin of an exported module (same parameters, same results) that fills ``taps`` as it runs.

    Raises SparseForgeError if the graph has no repeated blocks, or no attention, to tap.
    """
    twin = shallow_twin(module)
    graph = torch.fx.Graph(tracer_cls=module.graph._tracer_cls)
    graph._codegen = module.graph._codegen
    wanted = set(block_outputs(module))
    count = 0
    masks = mask_names(module.graph, module.graph.find_nodes(op="placeholder"))
    taps.hidden_rows = [masks.get(node) for node in module.graph.nodes if node in wanted]
    taps.attention_rows = []
    env: dict[Node, Node] = {}
    for node in module.graph.nodes:
        if attention and node.target is torch.ops.aten.scaled_dot_product_attention.default:
            name, count = f"tap_{count}", count + 1
            options = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:], strict=False)) | node.kwargs
            twin.add_module(name, _KeepAttention(taps, options.get("scale"), bool(options.get("is_causal"))))
            mask = options.get("attn_mask")
            given = (node.args[0], node.args[1], *([mask] if mask is not None else []))
            taps.attention_rows.append(masks.get(node.args[0]))
            query = graph.call_module(name, tuple(env[a] for a in given))
            env[node] = graph.node_copy(node, {**env, node.args[0]: query}.__getitem__)
        else:
            env[node] = graph.node_copy(node, env.__getitem__)
        if node in wanted:
            name, count = f"tap_{count}", count + 1
            twin.add_module(name, _KeepHidden(taps))
            value = env[node]
            env[node] = graph.call_module(name, (value,))
            env[node].meta = dict(value.meta)
    if not wanted:
        raise SparseForgeError("the model has no repeated blocks, so there are no hidden states to distil")
    found = count - len(wanted)
    if attention and not found:
        raise SparseForgeError("the model calls no scaled_dot_product_attention, so there is no attention to distil")
    twin.graph = graph
    return twin
