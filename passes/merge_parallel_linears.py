"""q/k/v and gate/up: linears that read one input become one wider linear, whose output is split.

One launch instead of two or three, and a wide weight keeps more of the machine busy at small batches.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.export.graph_signature import InputKind
from torch.fx import Node

from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.layouts import LAYOUTS
from sparseforge_fx.kernels.packed import BITMASK, SCALES, VALUES
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.passes.base import Find, PassResult
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.rewrite import sparse_use

aten = torch.ops.aten


def merge_parallel_linears(program: Program, find: Find) -> PassResult:
    """Merge the sites that ``find`` gives among the ``aten.linear`` nodes that read the same value, where all have a
    bias or none has, and likewise ``sparse_linear`` nodes of a layout whose rows follow one another as dense ones do.

    A weight with several uses or names stays alone: merged, it would be stored twice. The merged tensors are new, rows
    in graph order, each bit as it was; ``modified`` counts the linears that went into merged ones.
    """
    lifted = program.names(InputKind.PARAMETER, InputKind.BUFFER)
    alone = {s.fqn for s in eligible(find(program)) if len(s.uses) == 1 and not s.ties}
    groups: dict[tuple, list[tuple[Node, list[Node]]]] = defaultdict(list)
    for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
        x, weight, bias = (*node.args, None)[:3]
        if lifted.get(weight) in alone and (bias is None or bias in lifted):  # type: ignore[arg-type]
            value = weight.meta["val"]  # type: ignore[union-attr]
            rows = [weight] if bias is None else [weight, bias]
            groups[x, value.dtype, value.device, bias is None].append((node, rows))  # type: ignore[arg-type]
    for node in program.graph.find_nodes(op="call_function", target=OP):
        use = sparse_use(node)
        rows = use.rows
        alike = use.activation == "none" and LAYOUTS[use.layout].by_rows
        if alike and all(n in lifted for n in rows) and len(use.values.users) == 1:
            value = use.values.meta["val"]
            width = None if use.scales is None else use.scales.meta["val"].shape[1]
            kind = use.layout, use.in_features, use.meta.meta["val"].shape[1], width
            key = use.x, value.dtype, value.device, use.bias is None, *kind
            groups[key].append((node, rows))
    modified = 0
    for group in groups.values():
        if len(group) > 1:
            _merge(program, [node for node, _ in group], [[lifted[n] for n in rows] for _, rows in group])
            modified += len(group)
    return PassResult(program, modified)


def _merge(program: Program, nodes: list[Node], names: list[list[str]]) -> None:
    """``names``: of each node the tensors that have a row for each output, in the order of its arguments."""
    first = nodes[0]
    spent = {fqn: node for node, fqn in program.names(InputKind.PARAMETER, InputKind.BUFFER).items()}
    old = [[program.tensor(fqn) for fqn in row] for row in names]
    module = merged_name([_module_of(row[0]) for row in names])
    merged = []
    for position, tensors in enumerate(zip(*old, strict=True)):
        name = f"{module}.{_leaf(first, position)}"
        together = torch.cat([t.detach() for t in tensors])
        if isinstance(tensors[0], nn.Parameter):
            grad = any(t.requires_grad for row in old for t in row)
            merged.append(program.add_parameter(name, together, requires_grad=grad))
        else:
            merged.append(program.add_buffer(name, together))
    insert = partial(program.insert_before, first)
    if first.target == OP:
        use = sparse_use(first)
        wide = insert(OP, *use.with_rows(merged))
    else:
        wide = insert(aten.linear.default, first.args[0], *merged)
    parts = insert(aten.split_with_sizes.default, wide, [len(row[0]) for row in old], -1)
    outputs = [insert(operator.getitem, parts, index) for index in range(len(nodes))]
    for node, output in zip(nodes, outputs, strict=True):
        program.replace(node, output)
    for fqn in dict.fromkeys(fqn for row in names for fqn in row):
        if not spent[fqn].users:  # another linear may read the same bias
            program.drop(spent[fqn])


def _leaf(node: Node, position: int) -> str:
    """The last part of the name of a merged tensor: that of the first one; a bias may have had any."""
    if node.target != OP:
        return ("weight", "bias")[position]
    use = sparse_use(node)
    return "bias" if use.rows[position] is use.bias else (VALUES, BITMASK, SCALES)[min(position, 2)]


def _module_of(fqn: str) -> str:
    """``a.q_proj.weight``, ``a.q_proj.weight_values`` -> ``a.q_proj``; a tensor of another name stands for itself."""
    parent, _, leaf = fqn.rpartition(".")
    return parent if leaf in ("weight", VALUES, BITMASK, SCALES, "bias") else fqn


def merged_name(modules: Sequence[str]) -> str:
    """``a.q_proj, a.k_proj`` -> ``a.q_proj_k_proj``: the common parent, and the rest of each name."""
    parts = [m.split(".") for m in modules]
    shared = 0
    while len({tuple(p[: shared + 1]) for p in parts}) == 1:
        shared += 1
    return ".".join([*parts[0][:shared], "_".join("_".join(p[shared:]) for p in parts)])
