"""Which weights a plan decides about, and which formats each of them can have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sparseforge_fx.deploy.lowering.modules import find_packable, find_packable_stacks
from sparseforge_fx.deploy.lowering.packed_embedding import why_not_one
from sparseforge_fx.formats import DENSE, Format
from sparseforge_fx.graph.program import Program
from sparseforge_fx.models.ties import tied_heads
from sparseforge_fx.passes import LinearSite, find_linears
from sparseforge_fx.passes.find_routing import Routing, find_routing
from sparseforge_fx.passes.globs import matches
from sparseforge_fx.pattern import TWO_FOUR, Unstructured

_EMBEDDING = str(torch.ops.aten.embedding.default)
_ANY_WIDTH = Unstructured(0.5)  # whose groups fit every weight


class Candidate(NamedTuple):
    """A weight of the plan.

    Attributes:
        formats: what it can be kept in, dense first.
        tied: its storage is an embedding's, too.
        taken: nodes of that embedding, where it gets the format, too; if none, any other format than dense is a copy
            beside it.
        group: first of the weights that are deployed as one product with it (q, k and v; gate and up).
        group_outputs: of these together.
        routing: of a stack of experts.
    """

    site: LinearSite
    formats: tuple[Format, ...]
    tied: bool = False
    taken: tuple[str, ...] = ()
    group: str = ""
    group_outputs: int = 0
    routing: Routing | None = None


def candidates(
    program: Program,
    formats: Sequence[Format],
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
) -> tuple[list[Candidate], dict[str, str]]:
    """The weights of ``program`` that have a choice, in graph order, and the others with the reason.

    What :func:`find_linears` makes a site may be sparse. What it leaves dense unless it is named (heads, routers), and
    a head that is tied to an embedding, may be quantised, if it is the weight of a linear that can be replaced.

    Args:
        include, exclude: as of :func:`find_linears`; what is not included, or is excluded, has no choice.
    """
    by_default = {site.fqn: site.reason for site in find_linears(program, TWO_FOUR, include, exclude)}
    packable = _packable(program)
    found: list[Candidate] = []
    reasons: dict[str, str] = {}
    for site in find_linears(program, _ANY_WIDTH, include or ["*"], exclude):
        tied = _is_tied(site) and id(program.tensor(site.fqn)) in packable and _named(site, include, exclude)
        if site.reason is not None and not tied:
            reasons[site.fqn] = site.reason
            continue
        if site.experts is not None and program.tensor(site.fqn).device.type != "cpu":
            reasons[site.fqn] = "experts stay dense in a plan for a GPU: no time of theirs is measured there"
            continue
        if any(use.left for use in site.uses):
            reasons[site.fqn] = "it is multiplied from the left, whose inputs are not measured"
            continue
        prunable = by_default.get(site.fqn, "") is None
        alone = id(program.tensor(site.fqn)) in packable
        allowed = [f for f in formats if (prunable or not f.is_sparse) and (alone or not f.is_quantized)]
        fitting = tuple(f for f in allowed if f.why_not(site.in_features) is None and f != DENSE)
        if fitting:
            taken = _taken(program, site) if tied else ()
            found.append(Candidate(site, (DENSE, *fitting), tied, taken, routing=find_routing(program, site)))
        else:
            reasons[site.fqn] = by_default.get(site.fqn) or f"no format fits its {site.in_features} inputs"
    return _grouped(program, found), reasons


def _grouped(program: Program, found: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with their groups: those that passes/merge_parallel_linears.py merges if they have one format."""
    nodes = {node.name: node for node in program.graph.nodes}
    groups: dict[tuple, list[Candidate]] = {}
    for candidate in found:
        site = candidate.site
        key: tuple = (site.fqn,)
        if len(site.uses) == 1 and not site.ties and not candidate.tied:
            node = nodes[site.uses[0].node]
            if node.target == torch.ops.aten.linear.default:
                key = (node.args[0], len(node.args) > 2 and node.args[2] is not None, site.dtype, candidate.formats)
        groups.setdefault(key, []).append(candidate)
    of = {c.site.fqn: together for together in groups.values() for c in together}
    return [
        c._replace(group=of[c.site.fqn][0].site.fqn, group_outputs=sum(o.site.out_features for o in of[c.site.fqn]))
        for c in found
    ]


def _packable(program: Program) -> set[int]:
    """ids of the weights that ``quantize`` can keep in codes: those of modules, and of stacks, that can be replaced."""
    assert program.source is not None
    modules, _ = find_packable(program.source, lambda _: None, tied_heads(program.source))
    stacks, _ = find_packable_stacks(program.source, lambda _: None)
    return {id(module.weight) for module in (*modules.values(), *stacks.values())}


def _is_tied(site: LinearSite) -> bool:
    """Do embeddings alone stand against this weight? Then its linear can have another form."""
    tied = site.readers == (_EMBEDDING,) and site.reason == f"also read by {_EMBEDDING}"
    return tied and len({u.swapped for u in site.uses}) == 1 and site.dtype.is_floating_point


def _taken(program: Program, site: LinearSite) -> tuple[str, ...]:
    """Nodes of the embedding that ``quantize`` gives the format that the plan gives the weight."""
    assert program.source is not None
    model, weight = program.source, program.tensor(site.fqn)
    for name, embedding in tied_heads(model).items():
        head, table = model.get_submodule(name), model.get_submodule(embedding)
        one = why_not_one(head, table, Format("dense", "int8")) is None
        if one and head.weight is weight and site.fqn == f"{embedding}.weight":
            nodes = program.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
            names = {node for node, fqn in program.names().items() if program.tensor(fqn) is weight}
            return tuple(n.name for n in nodes if n.args[0] in names)
    return ()


def _named(site: LinearSite, include: str | Sequence[str], exclude: str | Sequence[str]) -> bool:
    names = (site.fqn, *site.ties)
    return not any(matches(n, exclude) for n in names) and (not include or any(matches(n, include) for n in names))
