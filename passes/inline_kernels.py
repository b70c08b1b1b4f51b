"""sparseforge::sparse_linear over planes -> torch.cond over the number of rows, a Triton kernel in every branch.

For graphs that run without Python: the operator looks at x whenever it is called, a compiled graph must do so itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.gpu.planes import HALF_TYPES
from sparseforge_fx.kernels.gpu.planes_linear import as_words
from sparseforge_fx.kernels.gpu.tiles import DECODE_ROWS
from sparseforge_fx.kernels.layouts import PLANES
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.passes.base import PassResult
from sparseforge_fx.passes.rewrite import SparseUse, aten, sparse_use

PLANES_OP = torch.ops.sparseforge.planes_linear.default
COND = torch.ops.higher_order.cond
#: a branch each for at most so many rows of x, the last one for any number: it expands the weight
BRANCHES = (1, 16, DECODE_ROWS, DECODE_ROWS + 1)


def inline_kernels(program: Program) -> PassResult:
    """Let ``sparseforge::planes_linear``, which Inductor takes apart into kernels, stand for the sparse operator.

    Where the number of rows is symbolic, each branch has the kernel for its numbers; in float32, which has no kernels,
    the weight is always expanded. Weights in other layouts are left alone.
    """
    modified = 0
    for node in program.graph.find_nodes(op="call_function", target=OP):
        use = sparse_use(node)
        if use.layout != PLANES.name:
            continue
        packed = use.values.meta["val"]
        if all(isinstance(size, int) for size in use.x.meta["val"].shape[:-1]):
            limits: Sequence[int] = (0,)  # the operator looks, while it is compiled
        else:
            limits = BRANCHES if use.x.meta["val"].dtype in HALF_TYPES else BRANCHES[-1:]
        with program.graph.inserting_before(node):
            words = _call(program.graph, as_words(packed), aten.view.dtype, use.values, as_words(packed).dtype)
            use = use._replace(values=words)
            new = _branches(program.graph_module, use, node.meta["val"], limits)
        program.replace(node, new)
        modified += 1
    return PassResult(program, modified)


def _branches(root: GraphModule, use: SparseUse, result: Any, limits: Sequence[int]) -> Node:
    """The kernel for at most ``limits[0]`` rows if there are no more, else the other branches."""
    if len(limits) == 1:
        return _kernel(root, use, result, limits)
    graph, sizes = root.graph, use.x.meta["val"].shape[:-1]
    dims = [_call(graph, size, aten.sym_size.int, use.x, dim) for dim, size in enumerate(sizes)]
    rows = reduce(lambda a, b: _call(graph, a.meta["val"] * b.meta["val"], operator.mul, a, b), dims)
    compare = operator.eq if limits[0] == 1 else operator.le  # the kernel for one row knows no other number, 0 neither
    few = _call(graph, compare(rows.meta["val"], limits[0]), compare, rows, limits[0])
    ways = [
        graph.get_attr(_add(root, _module(use, result, insert, some)))
        for insert, some in ((_kernel, limits[:1]), (_branches, limits[1:]))
    ]
    both = _call(graph, (result,), COND, few, *ways, _tensors(use))
    return _call(graph, result, operator.getitem, both, 0)


def _kernel(root: GraphModule, use: SparseUse, result: Any, limits: Sequence[int]) -> Node:
    arguments = (use.x, use.values, use.meta, use.in_features, use.bias, use.activation, limits[0], use.scales)
    return _call(root.graph, result, PLANES_OP, *arguments)


def _module(use: SparseUse, result: Any, insert: Callable[..., Node], limits: Sequence[int]) -> GraphModule:
    """A branch: a graph of its own, with the tensors as its inputs."""
    module = GraphModule({}, Graph())
    mine = {}
    for tensor in _tensors(use):
        mine[tensor] = module.graph.placeholder(tensor.name)
        mine[tensor].meta["val"] = tensor.meta["val"]
    bias, scales = (None if t is None else mine[t] for t in (use.bias, use.scales))
    use = use._replace(x=mine[use.x], values=mine[use.values], meta=mine[use.meta], bias=bias, scales=scales)
    module.graph.output((insert(module, use, result, limits),))
    module.recompile()
    return module


def _tensors(use: SparseUse) -> tuple[Node, ...]:
    return tuple(t for t in (use.x, use.values, use.meta, use.bias, use.scales) if t is not None)


def _add(root: GraphModule, branch: GraphModule) -> str:
    name = next(n for i in range(len(root._modules) + 1) if not hasattr(root, n := f"branch_{i}"))
    root.add_module(name, branch)
    return name


def _call(graph: Graph, value: Any, target: Callable, *args: Any) -> Node:
    node = graph.call_function(target, args)
    node.meta["val"] = value
    return node
