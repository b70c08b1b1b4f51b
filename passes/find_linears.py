"""Analysis: which weights of a program are eligible for N:M sparsity, and why the others are not. Changes nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from sparseforge_fx.graph.adapters import find_adapters
from sparseforge_fx.graph.program import Program
from sparseforge_fx.passes.aliases import Aliases
from sparseforge_fx.passes.globs import matches
from sparseforge_fx.passes.low_rank_pairs import find_low_rank_pairs
from sparseforge_fx.passes.operators import LINEAR_OPS, MOVES, op_name
from sparseforge_fx.passes.uses import LinearUse, find_uses, readers_of, stack_operands
from sparseforge_fx.pattern import TWO_FOUR, AnyPattern

aten = torch.ops.aten

#: elementwise functions that may follow the last linear or a router's linear, with one computed operand
TAIL_OPS = {
    "add", "sub", "mul", "div", "neg", "tanh", "sigmoid", "softmax", "_softmax", "log_softmax", "softplus", "sqrt",
}  # fmt: skip
#: products of matrices other than linears
PRODUCTS = {"bmm", "baddbmm", "einsum", "scaled_dot_product_attention", "_grouped_mm", "grouped_mm_fallback"}
#: operators that choose by the largest entry: mixtures of experts route tokens with them
SELECTORS = {"topk", "argmax"}


@dataclass
class LinearSite:
    """One weight with every node that uses it: a matrix, or a stack of them (the experts of a mixture).

    Attributes:
        fqn: name of the weight; ``ties`` are its other names (found by storage, not by name).
        transposed: stored [in, out] (Conv1D, ``x @ W``) instead of [out, in]; stacks have [experts] in front.
        out_features, in_features: groups of M run along ``in_features``, stored in ``reduction_dim``.
        reason: None for a site; otherwise why this weight stays dense, in one clause.
        readers: operators that read it in any other way.
    """

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    ties: tuple[str, ...] = ()
    uses: list[LinearUse] = field(default_factory=list)
    transposed: bool = False
    reason: str | None = None
    readers: tuple[str, ...] = ()

    @property
    def experts(self) -> int | None:
        """Matrices of a stack; None for a matrix."""
        return self.shape[0] if len(self.shape) == 3 else None

    @property
    def reduction_dim(self) -> int:
        return len(self.shape) - (2 if self.transposed else 1)

    @property
    def in_features(self) -> int:
        return self.shape[self.reduction_dim]

    @property
    def out_features(self) -> int:
        return self.shape[len(self.shape) - (1 if self.transposed else 2)]

    @property
    def sides(self) -> tuple[int, ...]:
        """(out, in), of a stack (experts, out, in)"""
        return (*self.shape[:-2], self.out_features, self.in_features)

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    def is_used_by(self, nodes: Collection[str]) -> bool:
        """Is one of the nodes that multiply by it among these?"""
        return any(use.node in nodes for use in self.uses)


def find_linears(
    program: Program,
    pattern: AnyPattern = TWO_FOUR,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
) -> list[LinearSite]:
    """Every matrix and stack of matrices of the program, in graph order: sites (``reason is None``), and the others
    with their reason.

    Args:
        pattern: groups of M must divide the reduction dimension.
        include: globs over the names of weights, or of modules that hold them; given, only these are sites, and they
            may name what is left dense by default.
        exclude: globs over the same names, of what stays dense; wins over ``include``.

    Dense unless included by name: output layers (nothing but shape and elementwise operators between them and the
    program's output), routers (the same before a topk), gates (linears with one output), low-rank pairs beside a linear
    (adapters that nobody declares), and frozen weights of a model that is not frozen as a whole (below adapters they
    are frozen for the adapters' sake).
    Always dense: an embedding's weight and what is tied to it, adapters of PEFT, what an adapter is merged into, and
    what shares memory with anything else in the model.
    """
    sites: dict[tuple, LinearSite] = {}
    parameters = {fqn: value for _, fqn, value in program.lifted(InputKind.PARAMETER)}
    lifted = [found for found in program.lifted() if found[2].layout == torch.strided]  # others have no storage
    for node, fqn, value in lifted:
        uses, rest = find_uses(node)
        if not uses and (value.dim() < 2 or fqn not in parameters):
            continue
        key = _identity(value)
        if key not in sites:
            sites[key] = LinearSite(fqn, tuple(value.shape), value.dtype)
        else:
            sites[key].ties += (fqn,)
        sites[key].uses += uses
        sites[key].readers = tuple(sorted({*sites[key].readers, *(r for other in rest for r in readers_of(other))}))

    for site in sites.values():
        site.transposed = bool(site.uses) and site.uses[0].swapped
    branches = _low_rank_pairs(program, list(sites.values()))
    dense_by_default = _heads_and_routers(program) | branches
    adapters = find_adapters(program.source)
    aliases = Aliases(program.source, {fqn for node, fqn, _ in lifted if node.users})
    own = adapters.own | {id(program.tensor(s.fqn)) for s in sites.values() if s.is_used_by(branches)}
    frozen_model = not any(
        p.requires_grad and id(p) not in own and (p.dim() > 1 or not own) for p in parameters.values()
    )
    overlapping = _overlapping([value for _, _, value in lifted])
    for key, site in sites.items():
        names = (site.fqn, *site.ties)
        named = any(matches(n, include) for n in names)
        ids = {id(parameters[n]) for n in names if n in parameters}
        if ids & adapters.own:
            site.reason = "part of a PEFT adapter"
            continue
        site.reason = _refusal(site, pattern)
        if site.reason is not None:
            site.reason += "; merge_and_unload() its adapter first" if site.readers and ids & adapters.bases else ""
            continue
        if site.fqn not in parameters:
            site.reason = "a buffer, not a parameter"
        elif ids & adapters.merged:
            site.reason = "an adapter is merged into it, to be taken out again: call merge_and_unload() first"
        elif key in overlapping:
            site.reason = "shares memory with another tensor or with itself"
        elif (alias := aliases.of(parameters[site.fqn], site.fqn)) is not None:
            site.reason = f"shares memory with {alias}"
        elif any(matches(n, exclude) for n in names):
            site.reason = "excluded by name"
        elif include and not named:
            site.reason = "not among the included names"
        elif not named:
            by_default = [dense_by_default[u.node] for u in site.uses if u.node in dense_by_default]
            by_default += ["a gate (one output)"] if site.out_features == 1 else []
            if not parameters[site.fqn].requires_grad and not frozen_model:
                by_default.append("frozen (requires_grad is False)")
            site.reason = f"{by_default[0]}; include it by name to prune it" if by_default else None
    return [*sites.values(), *_computed_weights(program, {n for s in sites.values() for n in (s.fqn, *s.ties)})]


def eligible(sites: Sequence[LinearSite]) -> list[LinearSite]:
    """Those that are to be pruned."""
    return [s for s in sites if s.reason is None]


def _refusal(site: LinearSite, pattern: AnyPattern) -> str | None:
    """Why this weight cannot be pruned at all; None if it can."""
    readers = ", ".join(site.readers)
    if len(site.shape) != 2 and (readers or not site.uses):
        return f"{len(site.shape)}-D weight, read by {readers or 'nothing'}"
    if readers:
        return f"{'also ' if site.uses else ''}read by {readers}"
    if not site.uses:
        return "not read by the program"
    if len({u.swapped for u in site.uses}) > 1:
        return "used along both of its dimensions (W and W^T)"
    if site.experts is not None and any(u.left for u in site.uses):
        return "a stack whose matrices are multiplied from the left"
    if not site.dtype.is_floating_point or site.dtype.itemsize < 2:
        return f"dtype {site.dtype} is not float16, bfloat16, float32 or float64"
    if not pattern.fits(site.in_features):
        return f"reduction dimension {site.in_features} is not a multiple of {pattern.m}"  # type: ignore[union-attr]
    return None


# -- memory ----------------------------------------------------------------------------------------------------------
def _identity(value: Tensor) -> tuple:
    # the storage's address in C++, which meta tensors have too
    return (value.untyped_storage()._cdata, value.storage_offset(), tuple(value.shape), tuple(value.stride()))


def _overlapping(values: Sequence[Tensor]) -> set[tuple]:
    """Identities of tensors that share bytes with a differently laid out one, or whose own elements share them."""
    spans: dict[int, dict[tuple, tuple[int, int]]] = defaultdict(dict)
    found = set()
    for value in values:
        length = 1 + sum((int(n) - 1) * int(s) for n, s in zip(value.shape, value.stride(), strict=True))
        if value.numel():
            key, start = _identity(value), int(value.storage_offset()) * value.itemsize
            spans[key[0]][key] = (start, start + length * value.itemsize)
            if length < value.numel():
                found.add(key)
    for by_key in spans.values():
        reach, owner = -1, None  # the furthest end so far
        for key, (start, end) in sorted(by_key.items(), key=lambda item: item[1]):
            if owner is not None and start < reach:
                found |= {key, owner}
            if end > reach:
                reach, owner = end, key
    return found


# -- what the graph does with a linear, and where its weight comes from ------------------------------------------------
def _heads_and_routers(program: Program) -> dict[str, str]:
    """Node name of each linear that ends in the output or in a choice of experts -> which of the two."""
    chosen_by = [n.args[0] for n in program.graph.nodes if op_name(n) in SELECTORS]
    routers = _linears_before(program, [n for n in chosen_by if isinstance(n, Node)])
    ends = [found.offsets for n in program.graph.nodes if (found := stack_operands(n)) and found.offsets is not None]
    others = _only_before(program, _linears_before(program, ends, whatever=True))
    picked = [n.args[0] for n in program.graph.nodes if op_name(n) == "gather"]
    weighing = _linears_before(program, [n for n in picked if isinstance(n, Node)])
    heads = _linears_before(program, program.graph.output_node().all_input_nodes)
    return (
        dict.fromkeys(weighing, "router (gather picks from its output)")
        | dict.fromkeys(others, "router (its output chooses the experts)")
        | dict.fromkeys(routers, "router (topk chooses by its output)")
        | dict.fromkeys(heads, "output layer (head)")
    )


def _only_before(program: Program, names: set[str]) -> set[str]:
    """These linears, and all others whose every reader leads to them and nowhere else: the layers of a router."""
    found = set(names)
    for node in reversed(program.graph.nodes):
        readers = [n for n in node.users if not isinstance(n.meta.get("val"), torch.SymInt)]
        if node.op == "call_function" and all(n.name in found for n in readers):
            found.add(node.name)
    return found


def _low_rank_pairs(program: Program, sites: Sequence[LinearSite]) -> dict[str, str]:
    """Node name of each linear of a low-rank pair -> what it is."""
    by_name = {u.node: s for s in sites for u in s.uses if not u.left and s.experts is None}
    pairs = find_low_rank_pairs({n: by_name[n.name] for n in program.graph.nodes if n.name in by_name})
    return {node.name: f"low-rank branch of {by_name[base.name].fqn}" for node, base in pairs.items()}


def _linears_before(program: Program, nodes: Iterable[Node], whatever: bool = False) -> set[str]:
    """Linear nodes with only moves and elementwise functions of one computed tensor between them and ``nodes``, or
    with ``whatever`` but other products."""
    inputs = {n.name for n in program.graph.find_nodes(op="placeholder")}
    found: set[str] = set()
    stack, seen = list(nodes), set(nodes)
    while stack:
        node = stack.pop()
        if node.target in LINEAR_OPS:
            found.add(node.name)
            continue
        computed = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor) and a.name not in inputs]
        if whatever:
            before = [] if op_name(node) in PRODUCTS else [n for n in node.all_input_nodes if n.name not in inputs]
        elif op_name(node) in MOVES:
            before = node.all_input_nodes[:1]
        else:
            before = computed if op_name(node) in TAIL_OPS and len(computed) == 1 else []
        stack += [n for n in before if n not in seen]
        seen.update(before)
    return found


def _computed_weights(program: Program, listed: set[str]) -> list[LinearSite]:
    """Linears whose weight the graph computes out of tensors that are not in the list: reported, never touched.

    A weight computed from listed parameters (weight norm, merged adapters) is reported as their reason already.
    """
    sources = {}  # node computed from parameters, buffers and constants alone -> the matrices among them
    for node, fqn, value in program.lifted():
        sources[node] = {fqn} if value.dim() >= 2 else set()
    out = []
    for node in program.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "call_function" and all(n in sources for n in inputs):
            sources[node] = set().union(*(sources[n] for n in inputs))
        for operand in _matrix_operands(node):
            known = sources.get(operand, set())
            if operand.op != "call_function" or known & listed or not (known or node.target == aten.linear.default):
                continue
            val = operand.meta["val"]
            while op_name(operand) in MOVES and operand.args[0].op == "call_function":  # type: ignore[union-attr]
                operand = operand.args[0]  # type: ignore[assignment]
            reason = f"its weight is computed in the graph by {operand.target}"
            uses = [LinearUse(node.name, swapped=node.target != aten.linear.default)]
            out.append(LinearSite(node.name, tuple(val.shape), val.dtype, uses=uses, reason=reason))
    return out


def _matrix_operands(node: Node) -> list[Node]:
    """The operands of a matrix product that may be a weight."""
    if node.target == aten.linear.default:
        places = [1]
    elif node.target in (aten.mm.default, aten.matmul.default, aten.bmm.default):
        places = [0, 1]
    elif node.target in (aten.addmm.default, aten.baddbmm.default):
        places = [1, 2]
    else:
        return []
    return [a for a in (node.args[i] for i in places) if isinstance(a, Node)]
