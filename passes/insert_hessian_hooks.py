"""Probes: a parameter of zeros beside every masked weight, whose gradient is a curvature estimate of that weight.

There are no hooks: the estimate comes out of autograd as the probe's gradient (see kernels/soft_masked_linear.py).
"""

from __future__ import annotations

import torch
from torch.export.graph_signature import InputKind
from torch.fx import Node

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.padding import mask_names, positions_of
from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.soft_masked_experts import EXPERTS_OP
from sparseforge_fx.passes.base import PassResult
from sparseforge_fx.passes.rewrite import masked_nodes, masked_operands

#: that are the gradient of a probe
ESTIMATORS = ("gauss_newton", "activation")


def probe_name(fqn: str) -> str:
    """Name of the probe that belongs to a weight."""
    return f"{fqn}_probe"


def insert_hessian_hooks(program: Program, estimator: str = "gauss_newton") -> PassResult:
    """Give every masked linear a probe, one per weight: of its shape for ``gauss_newton``; [in], of a stack
    [experts, in], for ``activation``.

    A probe is a parameter of zeros that changes no value and whose "gradient" is the estimate: autograd sums it over a
    weight's users and over micro-batches as it does any gradient. It takes the memory of one element, an expanded zero,
    and so must not be written to (DistributedDataParallel: ``init_sync=False``). An ``activation`` probe gets the
    program's mask of padding, where its inputs are positions that the mask speaks of. Linears that have a probe are
    left alone.

    Raises SparseForgeError for an estimator that needs no probes.
    """
    if estimator not in ESTIMATORS:
        raise SparseForgeError(f"no probe gives the estimator {estimator!r}: choose {' or '.join(ESTIMATORS)}")
    names = program.names(InputKind.PARAMETER)
    inputs = {node.name: node for node in program.user_inputs()}
    masks = mask_names(program.graph, inputs.values())
    probes: dict[Node, Node] = {}
    modified = 0
    for node in masked_nodes(program):
        weight, _, probe, transposed = masked_operands(node)
        if probe is not None:
            continue
        if weight not in probes:
            value = program.tensor(names[weight])
            if estimator == "activation":
                shape, dtype = torch.Size((*value.shape[:-2], value.shape[-2 if transposed else -1])), torch.float32
            else:  # curvature underflows in float16
                shape, dtype = value.shape, torch.bfloat16 if value.dtype == torch.float16 else value.dtype
            zero = torch.zeros((), dtype=dtype, device=value.device).expand(shape)
            probes[weight] = program.add_parameter(probe_name(names[weight]), zero)
        probe = probes[weight]
        if node.target == EXPERTS_OP:
            node.args = (*node.args[:5], probe, *node.args[6:])
        else:
            x, view, *_ = node.args
            if view is not weight:  # a slice of a stack
                probe = program.insert_before(node, view.target, probe, *view.args[1:])  # type: ignore[union-attr,arg-type]
            real = positions_of(x, masks, inputs) if estimator == "activation" else None  # type: ignore[arg-type]
            node.args = (*node.args[:4], probe, node.args[5], *([real] if real is not None else []))
        modified += 1
    return PassResult(program, modified)
