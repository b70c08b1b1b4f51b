"""``lower_modules``: the packed operator under nn.Module, in place: ``generate()`` and pipelines keep working."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparseforge_fx.deploy.lowering import cost
from sparseforge_fx.deploy.lowering.cost_table import Shape, Table, describe
from sparseforge_fx.deploy.lowering.report import PackedSite, PackingReport
from sparseforge_fx.deploy.lowering.routings import find_routings
from sparseforge_fx.deploy.lowering.savable import leave_savable
from sparseforge_fx.deploy.lowering.sparse_modules import (
    PackedWeight,
    SparseExperts,
    SparseLinear,
    lay_together,
    packed_weights,
)
from sparseforge_fx.errors import SparseForgeError, add_sentence
from sparseforge_fx.graph.grouped_experts import PACKED
from sparseforge_fx.kernels.layouts import ROWS, Layout, find_target
from sparseforge_fx.kernels.packed import Packed, pack, why_dense
from sparseforge_fx.models import low_rank
from sparseforge_fx.models.expert_stacks import ExpertStack, find_expert_stacks
from sparseforge_fx.ranges import checked
from sparseforge_fx.report import environment


@torch.no_grad()
@checked
def lower_modules(
    model: nn.Module,
    *,
    target: str = "auto",
    tokens: Sequence[int] | None = None,
    table: str | Path | Table | None = None,
    gate: bool = True,
) -> PackingReport:
    """Replace every nn.Linear and Conv1D whose weight is exactly 2:4, and gains from it, by a :class:`SparseLinear`,
    and the stacks of experts by :class:`SparseExperts`. The time of a stack hangs on how many experts a token goes to:
    a model that has stacks is captured for it, and where it cannot be they stay dense, unless ``gate`` is False.

    In place; their dense weights are freed. Options as for :func:`sparseforge_fx.lower`. Returns the report: sites,
    skipped modules with reasons, the cost table, bytes before and after. Linears that are packed already stay so.
    Raises SparseForgeError if no weight is 2:4.
    """
    counts, known = cost.check_request(tokens, table, None if gate else "gate=False")
    sites, skipped = find_packable(model)
    stacks, dense_stacks = find_packable_stacks(model)
    sites, skipped = sites | stacks, skipped | dense_stacks
    if not sites and not packed_weights(model):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:4])
        raise SparseForgeError(f"nothing to lower: {reasons or 'the model has no linear layer'}; run sparsify first")
    weights = {name: weight_of(module) for name, module in sites.items()}
    device = next(iter(weights.values()) if weights else model.buffers()).device
    layouts = find_target(target, device)
    routings, untold = find_routings(model, stacks) if gate else ({}, {})
    shapes = {
        name: Shape.of(w.shape[-2], w.shape[-1], w.dtype, routing=routings.get(name))
        for name, w in weights.items()
        if name not in untold
    }
    timings = cost.timings(shapes.values(), counts, device, layouts, known) if gate else {}
    before = after = scratch = 0
    lowered: list[PackedSite] = []
    with _dense_again_on_error(model) as done:
        for name, module in sites.items():
            weight = weights.pop(name)
            before += weight.nbytes
            against: str | None
            if name in untold:
                layout, against = None, untold[name]
            else:
                layout, against = cost.choose(timings, shapes[name], layouts, counts) if gate else (layouts[0], None)
            if layout is None:
                skipped[name] = f"gate: {against}"
                after += weight.nbytes
                continue
            sparse = packed_like(module, pack(weight), layout)
            replace(model, name, sparse)
            done.append(name)
            size = sparse.weight_values.nbytes + sparse.weight_bitmask.nbytes
            scratch = max(scratch, weight[0].nbytes if weight.dim() == 3 else weight.nbytes)
            *stack, out, width = sparse.shape
            kept = {"format": str(sparse.format), "layout": layout.name, "bytes": size}
            kept |= {"experts": stack[0]} if stack else {}
            lowered.append({"name": name, "out": out, "in": width, **kept})  # type: ignore[typeddict-item]
            after += size
    lay_together(model.get_submodule(name) for name in done)  # type: ignore[misc]
    leave_savable(model)
    return {
        "sites": lowered,
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped.items()],
        "table": describe(timings),
        "tokens": list(counts),
        "dense_bytes": before,
        "lowered_bytes": after,
        "scratch_bytes": scratch,
        "notes": cost.unasked(tokens, table, bool(sites)),
        **environment(),
    }


@contextmanager
def _dense_again_on_error(model: nn.Module) -> Iterator[list[str]]:
    """Unpack what was packed, named in the list that is given, if not all of it could be."""
    done: list[str] = []
    try:
        yield done
    except BaseException as error:
        for name in done:
            replace(model, name, model.get_submodule(name).to_dense())  # type: ignore[operator]
        add_sentence(error, "the model is dense and sparse as it was")
        raise


def packed_like(module: Any, packed: Packed, layout: Layout = ROWS) -> PackedWeight:
    """The module over ``packed`` that can stand in the place of a linear, a Conv1D or a stack of experts."""
    dtype = module.weight.dtype
    if isinstance(module, ExpertStack):
        sparse: PackedWeight = SparseExperts(packed, layout, transposed=module.transposed, dtype=dtype)
    else:
        sparse = SparseLinear(packed, module.bias, layout, transposed=isinstance(module, Conv1D), dtype=dtype)
    return sparse.train(module.training)


def replace(model: nn.Module, name: str, module: nn.Module | nn.Parameter) -> None:
    """Put ``module`` in the place of that name, which may be a stack's; a low-rank branch goes with the name.

    Where experts are packed transformers computes them by our implementation; where none of a module's is any longer,
    by the one that it had.
    """
    parent, _, leaf = name.rpartition(".")
    owner: Any = model.get_submodule(parent)
    old = getattr(owner, leaf)
    owner._parameters.pop(leaf, None)
    setattr(owner, leaf, module)
    if isinstance(module, SparseExperts):
        module.instead_of = owner.config._experts_implementation
        owner.config._experts_implementation = PACKED
    elif isinstance(old, SparseExperts):
        if old.instead_of != PACKED:
            owner.config._experts_implementation = old.instead_of
    elif isinstance(old, nn.Module):
        low_rank.hand_on(old, module)  # type: ignore[arg-type]


def weight_of(module: Any) -> Tensor:
    """[out, in], of a stack [experts, out, in]."""
    if isinstance(module, ExpertStack):
        return module.oriented
    weight = module.weight.detach()
    return weight.t() if isinstance(module, Conv1D) else weight


def find_packable_stacks(
    model: nn.Module, against: Callable[[Tensor], str | None] = why_dense
) -> tuple[dict[str, Any], dict[str, str]]:
    """Stacks of experts that can be replaced, and whose weight [experts, out, in] nothing is said ``against``, by name;
    the others with a reason."""
    found, others = find_expert_stacks(model)
    reasons = {name: against(stack.oriented) for name, stack in found.items()}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    return {name: stack for name, stack in found.items() if name not in skipped}, others | skipped


def find_packable(
    model: nn.Module, against: Callable[[Tensor], str | None] = why_dense, copied: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """Modules that can be replaced, and whose weight [out, in] nothing is said ``against``, by name; the other linears
    with a reason. By default those that are exactly 2:4.

    Args:
        copied: names of linears whose weight may be another module's, too (``tied_heads`` of models/ties.py).
    """
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    sites, skipped = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        weight = module.weight
        if not name:
            skipped["(the model itself)"] = "it cannot be replaced in itself: wrap it in a module"
        elif type(module) not in (nn.Linear, Conv1D) or type(weight) is not nn.Parameter:
            skipped[name] = f"{type(module).__name__} with a weight of type {type(weight).__name__}"
        elif names[id(module)] > 1:
            skipped[name] = "it stands at several places of the model"
        elif owners[id(weight)] > 1 and name not in copied:
            skipped[name] = "its weight belongs to another module, too"
        elif low_rank.has_other_hooks(module):
            skipped[name] = "it has hooks, or a forward of its own, which a packed linear would not call"
        elif (reason := against(weight_of(module))) is not None:
            skipped[name] = reason
        else:
            sites[name] = module
    return sites, skipped
