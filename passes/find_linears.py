"""Analysis: which weights of a program are eligible for N:M sparsity, and why the others are not. Changes nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node

from sparseforge_fx.pattern import Pattern
from sparseforge_fx.program import Program

aten = torch.ops.aten

#: operator -> (argument of the input, argument of the weight, the weight is stored [in, out])
LINEAR_OPS = {
    aten.linear.default: (0, 1, False),
    aten.addmm.default: (1, 2, True),
    aten.mm.default: (0, 1, True),
    aten.matmul.default: (0, 1, True),
}
#: operators that hand a weight on with its two dimensions swapped, or as it is
SWAPS = {aten.t.default, aten.numpy_T.default, aten.mT.default}
SAME = {aten.alias.default, aten.detach.default}
#: between the last linear and the program's output: shapes, casts and elementwise functions of one tensor
TAIL_OPS = {
    "view", "reshape", "_unsafe_view", "permute", "transpose", "t", "slice", "select", "squeeze", "unsqueeze", "flatten",
    "_to_copy", "to", "contiguous", "clone", "alias", "detach", "div", "mul", "tanh", "sigmoid", "softmax", "_softmax",
    "log_softmax", "float", "index", "split", "split_with_sizes", "chunk", "add_scalar", "type_as", "neg", "expand",
}  # fmt: skip


@dataclass
class LinearUse:
    """One node that multiplies by the weight."""

    node: str
    swapped: bool  # [in, out] as this node sees the stored weight
    left: bool = False  # weight @ x instead of x @ weight


@dataclass
class LinearSite:
    """One weight with every node that uses it.

    Attributes:
        fqn: name of the weight; ``ties`` are its other names (found by storage, not by name).
        transposed: stored [in, out] (Conv1D, ``x @ W``) instead of [out, in].
        out_features, in_features: groups of M run along ``in_features``, stored in ``reduction_dim``.
        reason: None for a site; otherwise why this weight stays dense, in one clause.
    """

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    ties: tuple[str, ...] = ()
    uses: list[LinearUse] = field(default_factory=list)
    transposed: bool = False
    reason: str | None = None

    @property
    def reduction_dim(self) -> int:
        return 0 if self.transposed else 1

    @property
    def in_features(self) -> int:
        return self.shape[self.reduction_dim]

    @property
    def out_features(self) -> int:
        return self.shape[1 - self.reduction_dim]

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


def find_linears(
    program: Program,
    pattern: Pattern = Pattern(2, 4),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[LinearSite]:
    """Every weight that a linear reads, in graph order: sites (``reason is None``) and skipped ones.

    Args:
        pattern: groups of M must divide the reduction dimension.
        include: globs over weight or module names; given, only these are sites, and they may name the output layer.
        exclude: globs over weight or module names that stay dense; wins over ``include``.

    Output layers (nothing but shape and elementwise operators between them and the program's output) and weights shared
    with an embedding stay dense unless included by name; an embedding's weight always does.
    """
    by_storage: dict[tuple, LinearSite] = {}
    storages: dict[int, set[tuple]] = defaultdict(set)
    sites: list[LinearSite] = []
    buffers = {fqn for _, fqn, _ in program.lifted(InputKind.BUFFER, InputKind.CONSTANT_TENSOR)}
    heads = _output_layers(program)
    head_sites: set[int] = set()
    for node, fqn, value in program.lifted(InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
        uses, others = _uses(node)
        if value.dim() < 2 and not uses:
            continue
        if fqn in buffers and not uses:
            continue
        key = _identity(value)
        site = by_storage.get(key)
        if site is None:
            site = LinearSite(fqn, tuple(value.shape), value.dtype)
            by_storage[key] = site
            sites.append(site)
            storages[key[0]].add(key)
        else:
            site.ties += (fqn,)
        site.uses += uses
        head_uses = [u for u in uses if u.node in heads]
        if head_uses:
            head_sites.add(id(site))
        if others and site.reason is None:
            names = ", ".join(sorted({str(o.target) for o in others}))
            site.reason = f"read by {names}" if not uses else f"also read by {names}"
        if uses and fqn in buffers and site.reason is None:
            site.reason = "a buffer, not a parameter"
    sites = [s for s in sites if s.uses or (len(s.shape) >= 2 and s.reason)]
    for site in sites:
        value = program.tensor(site.fqn)
        if site.uses:
            site.transposed = site.uses[0].swapped
        names = (site.fqn, *site.ties)
        named = any(_matches(n, include) for n in names)
        if site.reason is None:
            site.reason = _refusal(site, value, pattern, overlapping=len(storages[_identity(value)[0]]) > 1)
        if site.reason is None and any(_matches(n, exclude) for n in names):
            site.reason = "excluded by name"
        if site.reason is None and include and not named:
            site.reason = "not among the included names"
        if site.reason is None and id(site) in head_sites and not named:
            site.reason = "output layer (head); include it by name to prune it"
    return sites + _computed_weights(program)


def eligible(sites: Sequence[LinearSite]) -> list[LinearSite]:
    """Those that are to be pruned."""
    return [s for s in sites if s.reason is None]


def _refusal(site: LinearSite, value: Tensor, pattern: Pattern, *, overlapping: bool) -> str | None:
    if len({u.swapped for u in site.uses}) > 1:
        return "used along both of its dimensions (W and W^T)"
    if value.dim() != 2:
        return f"{value.dim()}-D weight"
    if not value.dtype.is_floating_point or value.dtype.itemsize < 2:
        return f"dtype {value.dtype} is not float16, bfloat16 or float32"
    if site.in_features % pattern.m:
        return f"reduction dimension {site.in_features} is not a multiple of {pattern.m}"
    if overlapping:
        return "shares memory with a differently shaped parameter"
    return None


def _identity(value: Tensor) -> tuple:
    # the storage's address in C++, which meta tensors have too
    return (value.untyped_storage()._cdata, value.storage_offset(), tuple(value.shape), tuple(value.stride()))


def _matches(fqn: str, globs: Sequence[str]) -> bool:
    module = fqn.rpartition(".")[0]
    return any(fnmatchcase(fqn, g) or fnmatchcase(module, g) for g in globs)


def _uses(weight: Node) -> tuple[list[LinearUse], list[Node]]:
    """Linear uses of a placeholder, through transposes, and the nodes that read it in any other way."""
    uses: list[LinearUse] = []
    others: list[Node] = []
    stack = [(weight, user, False) for user in weight.users]
    while stack:
        value, node, swapped = stack.pop(0)
        if node.target in SAME or node.target in SWAPS or _is_swap(node):
            flipped = swapped if node.target in SAME else not swapped
            stack += [(node, user, flipped) for user in node.users]
        elif (use := _linear_use(value, node, swapped)) is not None:
            uses.append(use)
        else:
            others.append(node)
    return uses, others


def _is_swap(node: Node) -> bool:
    value = node.args[0] if node.args else None
    if not (isinstance(value, Node) and "val" in value.meta and value.meta["val"].dim() == 2):
        return False
    if node.target == aten.transpose.int:
        return {d % 2 for d in node.args[1:3]} == {0, 1}  # type: ignore[operator]
    return node.target == aten.permute.default and [d % 2 for d in node.args[1]] == [1, 0]  # type: ignore[operator,union-attr]


def _linear_use(value: Node, node: Node, swapped: bool) -> LinearUse | None:
    if node.target not in LINEAR_OPS or node.kwargs:  # addmm(beta=, alpha=) is not a plain linear
        return None
    x_arg, w_arg, stored_in_out = LINEAR_OPS[node.target]
    x, w = node.args[x_arg], node.args[w_arg]
    if x is value and w is value:
        return None
    if w is value:
        if node.target == aten.addmm.default and not _is_vector(node.args[0]):
            return None
        if value.meta["val"].dim() != 2:
            return None
        return LinearUse(node.name, swapped=stored_in_out ^ swapped)
    if x is value and node.target in (aten.mm.default, aten.matmul.default):
        other = w.meta["val"] if isinstance(w, Node) else None
        if other is not None and other.dim() in (1, 2) and value.meta["val"].dim() == 2:
            return LinearUse(node.name, swapped=swapped, left=True)  # W @ x reduces along W's second dimension
    return None


def _is_vector(node) -> bool:
    return isinstance(node, Node) and node.meta["val"].dim() == 1


def _output_layers(program: Program) -> set[str]:
    """Linear nodes with only shape and single-tensor elementwise operators between them and the output."""
    found: set[str] = set()
    stack = list(program.graph.output_node().all_input_nodes)
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node.op != "call_function":
            continue
        if node.target in LINEAR_OPS:
            found.add(node.name)
            continue
        name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
        tensors = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]
        if name == "getitem" or (name in TAIL_OPS and len(tensors) == 1):
            stack += [t for t in node.all_input_nodes if t not in seen]
            seen.update(node.all_input_nodes)
    return found


def _computed_weights(program: Program) -> list[LinearSite]:
    """Linears whose weight the graph computes (weight norm, merged adapters): reported, never touched."""
    out = []
    for node in program.graph.nodes:
        if node.target == aten.linear.default and isinstance(node.args[1], Node):
            root = node.args[1]
            while root.target in SAME or root.target in SWAPS or _is_swap(root):
                root = root.args[0]  # type: ignore[assignment]
            if root.op == "call_function":
                val = root.meta["val"]
                reason = f"its weight is computed in the graph by {root.target}"
                out.append(LinearSite(node.name, tuple(val.shape), val.dtype, uses=[LinearUse(node.name, False)], reason=reason))
    return out
