"""SLoRB (AST, arXiv 2407.20584): a low-rank branch beside a masked linear that carries what pruning removed."""

from __future__ import annotations

import torch
from torch.export.graph_signature import InputKind

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.soft_masked_linear import OP
from sparseforge_fx.passes.base import PassResult
from sparseforge_fx.program import Program

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
    names = {node: fqn for node, fqn, _ in program.lifted(InputKind.PARAMETER, InputKind.BUFFER)}
    branches: dict = {}
    modified = 0
    for node in program.graph.find_nodes(op="call_function", target=OP):
        x, weight, mask, _, _, transposed = node.args
        fqn = names[weight]
        x_name, s_name = branch_names(fqn)
        if weight not in branches:
            if x_name in program.state:
                continue
            value = program.tensor(fqn).detach()
            pruned = value * (1 - program.tensor(names[mask]))
            pruned = pruned.t() if transposed else pruned
            out_features, in_features = pruned.shape
            if in_features % block:
                raise SparseForgeError(f"slorb block {block} does not divide the input width {in_features} of {fqn}")
            rank = in_features // block
            ones = torch.zeros(rank, rank, block, dtype=value.dtype, device=value.device)
            ones[range(rank), range(rank)] = 1
            s = pruned.reshape(out_features, rank, block).float().mean(-1).to(value.dtype)
            branches[weight] = (
                program.add_parameter(x_name, ones.reshape(rank, in_features)),
                program.add_parameter(s_name, s.contiguous()),
            )
        if any(_is_branch_of(user, branches[weight][1]) for add in node.users for user in add.all_input_nodes):
            continue
        a, b = branches[weight]
        with program.graph.inserting_after(node):
            down = program.graph.call_function(aten.linear.default, (x, a))
        with program.graph.inserting_after(down):
            up = program.graph.call_function(aten.linear.default, (down, b))
        down.meta, up.meta = dict(node.meta), dict(node.meta)
        down.meta["val"] = aten.linear.default(x.meta["val"], a.meta["val"])
        with program.graph.inserting_after(up):
            total = program.graph.call_function(aten.add.Tensor, (node, up))
        total.meta = dict(node.meta)
        node.replace_all_uses_with(total, delete_user_cb=lambda user, total=total: user is not total)
        for spec in program.signature.output_specs:
            if getattr(spec.arg, "name", None) == node.name:
                spec.arg.name = total.name
        modified += 1
    return PassResult(program, modified)


def _is_branch_of(node, s) -> bool:
    return node.target == aten.linear.default and node.args[1] is s
