"""Sites whose weight is exactly 2:4 -> sparseforge::sparse_linear over the packed weight; the dense weight goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.export.graph_signature import InputKind

from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.layouts import Layout
from sparseforge_fx.kernels.packed import pack
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.passes.base import PassResult
from sparseforge_fx.passes.find_linears import Find, LinearSite, eligible
from sparseforge_fx.passes.rewrite import drop_dead_moves, rewrite_use
from sparseforge_fx.pattern import TWO_FOUR, check_pattern

#: sites -> the layout of each that is to be packed, by the weight's name; the others get a reason
Choose = Callable[[Sequence[LinearSite]], Mapping[str, Layout]]


def keep_dense(program: Program, sites: Sequence[LinearSite]) -> list[LinearSite]:
    """The sites, in place, with a reason on those whose weight is not exactly 2:4 or cannot be read."""
    for site in eligible(sites):
        value = program.tensor(site.fqn)
        if value.is_meta:
            site.reason = "on the meta device"
        elif not check_pattern(value, TWO_FOUR, site.reduction_dim):
            site.reason = "not 2:4: a group of four has more than two non-zeros"
        elif value.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            site.reason = f"no kernel for {value.dtype}"
    return list(sites)


def lower_sparse_linears(program: Program, find: Find, choose: Choose) -> PassResult:
    """Pack the weights that ``choose`` has a layout for, of those that ``find`` gives, and let each of their uses call
    the sparse operator.

    The packed tensors are buffers ``<weight>_values`` and ``<weight>_meta``; a weight with several uses or names is
    packed once, and its dense parameter leaves the program.

    Raises SparseForgeError if the weight of an eligible site is not 2:4 (see :func:`keep_dense`).
    """
    sites = find(program)
    layouts = choose(sites)
    placeholders = {fqn: node for node, fqn, _ in program.lifted(InputKind.PARAMETER)}
    modified = 0
    for site in eligible(sites):
        if site.fqn not in layouts or site.fqn not in placeholders:  # stays dense, or is packed already
            continue
        weight = program.tensor(site.fqn).detach()
        layout = layouts[site.fqn]
        values, meta = layout.convert(pack(weight.t() if site.transposed else weight))
        packed = (
            program.add_buffer(f"{site.fqn}_values", values),
            program.add_buffer(f"{site.fqn}_meta", meta),
            layout.name,
            site.in_features,
        )
        for use in site.uses:
            rewrite_use(program, use, OP, lambda x, bias, packed=packed: (x, *packed, bias, "none"))
            modified += 1
        for fqn in (site.fqn, *site.ties):
            drop_dead_moves(program, placeholders[fqn])
            program.drop(placeholders[fqn])
    return PassResult(program, modified)
