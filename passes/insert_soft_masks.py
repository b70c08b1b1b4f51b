"""Linears of a site -> sparseforge::soft_masked_linear, products of a stack of matrices -> soft_masked_experts: one
mask buffer per weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind

from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.soft_masked_experts import EXPERTS_OP
from sparseforge_fx.kernels.soft_masked_linear import OP
from sparseforge_fx.passes.base import PassResult
from sparseforge_fx.passes.find_linears import LinearSite, eligible
from sparseforge_fx.passes.rewrite import drop_dead_moves, rewrite_stack_use, rewrite_use

aten = torch.ops.aten


def mask_name(fqn: str) -> str:
    """Name of the mask buffer that belongs to a weight (as torch.nn.utils.prune names it)."""
    return f"{fqn}_mask"


def insert_soft_masks(
    program: Program, sites: Sequence[LinearSite], make: Callable[[Tensor], Tensor] = torch.ones_like
) -> PassResult:
    """Rewrite every node of every eligible site; masks start at one, so that the program computes what it computed.

    A weight with several names or users gets one mask, under its first name. Sites that are masked already are left
    alone. ``sites`` must come from :func:`find_linears` on this program, or on the one that it is a copy of; ``make``
    goes from a weight to its mask of ones.
    """
    placeholders = {fqn: node for node, fqn, _ in program.lifted(InputKind.PARAMETER)}
    modified = 0
    for site in eligible(sites):
        name = mask_name(site.fqn)
        if name in program.state:
            continue
        weight = program.tensor(site.fqn)
        mask = program.add_buffer(name, make(weight))
        for use in site.uses:
            tail = (placeholders[site.fqn], mask)
            if site.experts is not None and use.expert is None:
                rewrite_stack_use(program, use, EXPERTS_OP, *tail)
            else:
                if use.expert is not None:
                    take = partial(program.insert_before, program.node(use.node), aten.select.int)
                    tail = (take(tail[0], 0, use.expert), take(tail[1], 0, use.expert))
                rewrite_use(program, use, OP, lambda x, bias, use=use, tail=tail: (x, *tail, bias, None, use.swapped))
            modified += 1
        for fqn in (site.fqn, *site.ties):
            drop_dead_moves(program, placeholders[fqn])
    return PassResult(program, modified)
