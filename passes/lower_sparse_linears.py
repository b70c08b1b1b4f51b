"""Sites whose weight is exactly 2:4 -> sparseforge::sparse_linear, of a stack sparse_experts, over the packed weight:
the dense weight goes."""

from __future__ import annotations

from collections.abc import Sequence

from torch.export.graph_signature import InputKind

from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.packed import pack, packed_names, why_dense
from sparseforge_fx.kernels.sparse_experts import PACKED_EXPERTS_OP
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.passes.base import Choose, Find, PassResult
from sparseforge_fx.passes.find_linears import LinearSite, eligible
from sparseforge_fx.passes.rewrite import drop_dead_moves, rewrite_use
from sparseforge_fx.passes.uses import LinearUse, stack_operands


def keep_dense(program: Program, sites: Sequence[LinearSite], experts: bool = False) -> list[LinearSite]:
    """The sites, in place, with a reason on those whose weight cannot be packed; ``experts``: stacks can."""
    for site in eligible(sites):
        weight = program.tensor(site.fqn).detach()
        if site.experts is not None and not experts:
            site.reason = "experts stay dense here: only sf.lower packs them"
        elif site.experts is not None and any(use.expert is not None for use in site.uses):
            site.reason = "experts stay dense: the graph slices them apart"
        else:
            site.reason = why_dense(weight.mT if site.transposed else weight)
    return list(sites)


def lower_sparse_linears(program: Program, find: Find, choose: Choose) -> PassResult:
    """Pack the weights that ``choose`` has a layout for, of those that ``find`` gives, and let each of their uses call
    the sparse operator.

    The packed tensors are buffers of the names that files have for them; a weight with several uses or names is packed
    once, and its dense parameter leaves the program.

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
        tensors = layout.convert_each(pack(weight.mT if site.transposed else weight))
        buffers = map(
            program.add_buffer, packed_names(site.fqn), tensors
        )  # the weight is 2:4, its values have no scales
        packed = (*buffers, layout.name, site.in_features)
        for use in site.uses:
            if site.experts is not None:
                _rewrite_stack(program, use, packed)
            else:
                rewrite_use(program, use, OP, lambda x, bias, packed=packed: (x, *packed, bias, "none"))
            modified += 1
        for fqn in (site.fqn, *site.ties):
            drop_dead_moves(program, placeholders[fqn])
            program.drop(placeholders[fqn])
    return PassResult(program, modified)


def _rewrite_stack(program: Program, use: LinearUse, packed: tuple) -> None:
    node = program.node(use.node)
    found = stack_operands(node)
    assert found is not None
    arguments = (found.x, *packed, found.offsets, found.bias)
    program.replace(node, program.insert_before(node, PACKED_EXPERTS_OP, *arguments, value=node.meta["val"]))
