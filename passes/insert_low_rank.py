"""SLoRB (AST, arXiv 2407.20584): a low-rank branch beside a masked linear that carries what pruning removed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.soft_masked_linear import OP
from sparseforge_fx.passes.base import PassResult

aten = torch.ops.aten


def branch_names(fqn: str) -> tuple[str, str]:
    """Names of the branch's X and S for a weight."""
    return f"{fqn}_slorb_x", f"{fqn}_slorb_s"


def insert_low_rank(program: Program, block: int = 16) -> PassResult:
    """y = x (W * m)^T  ->  y + (x X^T) S^T with X [in/block, in] block-ones and S [out, in/block], both trainable.

    S starts at the mean over each block of the pruned part W * (1 - m): with a mask of ones it is zero and the
    program computes what it computed. As a LoRA adapter: A = X, B = S, rank in/block, scale 1.
    Raises SparseForgeError if ``block`` does not divide a site's input width.
    """
    names = program.names(InputKind.PARAMETER, InputKind.BUFFER)
    present = set(program.state)
    branches: dict[Node, tuple[Node, Node]] = {}
    modified = 0
    for node in program.graph.find_nodes(op="call_function", target=OP):
        x, weight, mask, _, _, transposed, *_ = node.args
        fqn = names[weight]
        if branch_names(fqn)[0] in present:
            continue
        if weight not in branches:
            pruned = program.tensor(fqn).detach() * (1 - program.tensor(names[mask]))
            branches[weight] = _add_branch(program, fqn, pruned.t() if transposed else pruned, block)
        _add_to(program, node, x, *branches[weight])
        modified += 1
    return PassResult(program, modified)


def _add_branch(program: Program, fqn: str, pruned: Tensor, block: int) -> tuple[Node, Node]:
    in_features = pruned.shape[1]
    if block < 1 or in_features % block:
        raise SparseForgeError(f"slorb block {block} does not divide the input width {in_features} of {fqn}")
    blocks = torch.eye(in_features // block, dtype=pruned.dtype, device=pruned.device).repeat_interleave(block, 1)
    means = pruned.float().unflatten(1, (-1, block)).mean(-1).to(pruned.dtype)
    x_name, s_name = branch_names(fqn)
    return program.add_parameter(x_name, blocks), program.add_parameter(s_name, means)


def _add_to(program: Program, node: Node, x: Node, a: Node, b: Node) -> None:
    """node -> node + (x a^T) b^T, for every reader of node and in the program's outputs."""
    value = node.meta["val"]
    down = program.insert_after(node, aten.linear.default, x, a)
    up = program.insert_after(down, aten.linear.default, down, b, value=value)
    total = program.insert_after(up, aten.add.Tensor, node, up, value=value)
    program.redirect(node, total)
