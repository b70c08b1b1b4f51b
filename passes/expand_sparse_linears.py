"""sparseforge::sparse_linear -> plain aten operators over the same packed tensors: the graph runs without this package.

For the size of the file and for machines that have torch alone, not for speed: the weight is expanded in every call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.layouts import LAYOUTS
from sparseforge_fx.kernels.packed import unpack
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.passes.base import PassResult
from sparseforge_fx.passes.rewrite import aten, insert_traced, sparse_use


def expand_sparse_linears(program: Program) -> PassResult:
    """Let ``aten.linear`` read the expanded weight wherever the sparse operator stands without an activation.

    Those with an activation are left alone: expand before :func:`fuse_epilogues`, or instead of it.
    """
    modified = 0
    for node in program.graph.find_nodes(op="call_function", target=OP):
        use = sparse_use(node)
        if use.activation != "none":
            continue
        packed = [t for t in (use.values, use.meta, use.scales) if t is not None]
        traced = _trace(packed, use.layout, use.in_features, use.x.meta["val"].dtype)
        weight = insert_traced(traced, node, *packed)
        linear = program.insert_before(node, aten.linear.default, use.x, weight, use.bias)
        program.replace(node, linear)
        modified += 1
    return PassResult(program, modified)


def _trace(packed: Sequence[Node], layout: str, in_features: int, dtype: torch.dtype) -> GraphModule:
    def dense(*tensors: Tensor) -> Tensor:
        values, meta, *scales = tensors
        return unpack(LAYOUTS[layout].restore(values, meta, in_features, *scales)).to(dtype)

    fakes = [node.meta["val"] for node in packed]
    with fakes[0].fake_mode:
        return make_fx(dense)(*fakes)
