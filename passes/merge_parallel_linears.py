"""q/k/v and gate/up: linears that read one input become one wider linear, whose output is split.

One launch instead of two or three, and a wide weight keeps more of the machine busy at small batches.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node

from sparseforge_fx.passes.base import PassResult
from sparseforge_fx.passes.find_linears import LinearSite, eligible
from sparseforge_fx.passes.rewrite import call_like
from sparseforge_fx.program import Program

aten = torch.ops.aten


def merge_parallel_linears(program: Program, sites: Sequence[LinearSite]) -> PassResult:
    """Merge the sites among the ``aten.linear`` nodes that read the same value, where all have a bias or none has.

    A weight with several uses or names stays alone: merged, it would be stored twice. The merged weight is a new
    parameter, rows in graph order, each bit as it was; ``modified`` counts the linears that went into merged ones.
    ``sites`` must come from :func:`find_linears` on this program, or on the one that it is a copy of.
    """
    weights = {node: fqn for node, fqn, _ in program.lifted(InputKind.PARAMETER)}
    biases = {node: value for node, _, value in program.lifted(InputKind.PARAMETER, InputKind.BUFFER)}
    alone = {s.fqn for s in eligible(sites) if len(s.uses) == 1 and not s.ties}
    groups: dict[tuple, list[Node]] = defaultdict(list)
    for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
        x, weight, bias = (*node.args, None)[:3]
        fqn = weights.get(weight, "")  # type: ignore[arg-type]
        if fqn in alone and (bias is None or bias in biases):
            value = program.tensor(fqn)
            groups[x, value.dtype, value.device, bias is None].append(node)
    modified = 0
    for nodes in groups.values():
        if len(nodes) > 1:
            _merge(program, nodes, [weights[n.args[1]] for n in nodes])  # type: ignore[index]
            modified += len(nodes)
    return PassResult(program, modified)


def _merge(program: Program, nodes: list[Node], fqns: list[str]) -> None:
    first = nodes[0]
    weights = [program.tensor(fqn) for fqn in fqns]
    name = merged_name([fqn.removesuffix(".weight") for fqn in fqns])
    grad = any(w.requires_grad for w in weights)
    merged = [program.add_parameter(f"{name}.weight", torch.cat([w.detach() for w in weights]), requires_grad=grad)]
    spent = [n.args[1] for n in nodes]
    if len(first.args) > 2:
        old = {node: value for node, _, value in program.lifted(InputKind.PARAMETER, InputKind.BUFFER)}
        bias = torch.cat([old[n.args[2]].detach() for n in nodes])  # type: ignore[index]
        merged.append(program.add_parameter(f"{name}.bias", bias, requires_grad=grad))
        spent += [n.args[2] for n in nodes]
    with program.graph.inserting_before(first):
        wide = call_like(first, aten.linear.default, first.args[0], *merged)
        parts = call_like(first, aten.split_with_sizes.default, wide, [len(w) for w in weights], -1)
        outputs = [call_like(node, operator.getitem, parts, index) for index, node in enumerate(nodes)]
    for node, output in zip(nodes, outputs, strict=True):
        program.replace(node, output)
    for placeholder in dict.fromkeys(spent):
        if not placeholder.users:  # type: ignore[union-attr]  # another linear may read the same bias
            program.drop(placeholder)  # type: ignore[arg-type]


def merged_name(modules: Sequence[str]) -> str:
    """``a.q_proj, a.k_proj`` -> ``a.q_proj_k_proj``: the common parent, and the rest of each name."""
    parts = [m.split(".") for m in modules]
    shared = 0
    while len({tuple(p[: shared + 1]) for p in parts}) == 1:
        shared += 1
    return ".".join([*parts[0][:shared], "_".join("_".join(p[shared:]) for p in parts)])
