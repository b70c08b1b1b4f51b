"""Which linears of a model are to be kept in which format: by one kind of values for all of them, or by a plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparseforge_fx.deploy.lowering.modules import find_packable, find_packable_stacks, weight_of
from sparseforge_fx.deploy.lowering.packed_embedding import (
    input_embedding,
    tied_packed_heads,
    why_not_one,
    why_not_rows,
)
from sparseforge_fx.deploy.lowering.sparse_modules import PackedWeight, SparseExperts, packed_weights
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import DENSE, Format
from sparseforge_fx.graph.adapters import find_adapters
from sparseforge_fx.models.expert_stacks import find_expert_stacks
from sparseforge_fx.models.ties import tied_heads
from sparseforge_fx.passes.globs import matches
from sparseforge_fx.pattern import TWO_FOUR, check_pattern
from sparseforge_fx.plans import planned_formats


class Tie(NamedTuple):
    """Of a linear whose weight is an embedding's, too.

    Attributes:
        embedding: its name.
        apart: why the linear gets a copy of its own, and the embedding stays as it is; None: they go on as one.
    """

    embedding: str
    apart: str | None


class Chosen(NamedTuple):
    """Linears by name.

    Attributes:
        modules: those that get a quantised format.
        formats: of each of them.
        skipped: the others, with a reason.
        tied: of ``modules``, those whose weight is an embedding's, too.
        embeddings: of a weight of their own, with the formats that they get.
    """

    modules: dict[str, Any]
    formats: dict[str, Format]
    skipped: dict[str, str]
    tied: dict[str, Tie]
    embeddings: dict[str, Format]


def by_values(
    model: nn.Module,
    values: Format,
    dense: bool = True,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
) -> Chosen:
    """All linears and stacks of experts in one kind of values, each in the pattern that it has.

    Args:
        dense: those that are not 2:4, too.
        include, exclude: globs over weights or modules. Only what is included is chosen: a head that is tied to an
            embedding only if it is named, and embeddings only if they are.
    """

    def against(weight: Tensor) -> str | None:
        if (reason := _unreadable(weight)) is not None:
            return reason
        if not dense and not check_pattern(weight, TWO_FOUR):
            return "not 2:4"
        return values.why_not(weight.shape[-1])

    names = _names(model)
    tied = tied_heads(model)
    wanted = {n for n in tied if include and _match(names[id(model.get_submodule(n).weight)], include)}
    modules, skipped = find_packable(model, against, wanted)
    stacks, dense_stacks = find_packable_stacks(model, against)
    modules, skipped = modules | stacks, skipped | dense_stacks
    for name in tied.keys() - wanted:
        skipped[name] = "its weight is an embedding's, too: include it by name, and the embedding with it or not"
    adapters = find_adapters(model)
    for name, module in list(modules.items()):
        known = names[id(module.weight)]
        if id(module.weight) in adapters.own:
            skipped[name] = "part of a PEFT adapter"
        elif id(module.weight) in adapters.merged:
            skipped[name] = "an adapter is merged into it: call merge_and_unload() or unmerge_adapter() first"
        elif _match(known, exclude):
            skipped[name] = "excluded by name"
        elif include and not _match(known, include):
            skipped[name] = "not among the included names"
        else:
            continue
        del modules[name]
    formats = {
        name: values._replace(pattern="2:4" if check_pattern(weight_of(module), TWO_FOUR) else "dense")
        for name, module in modules.items()
    }
    with_it = {e for n, e in tied.items() if n in modules and _match([e, f"{e}.weight"], include)}
    tables: dict[str, Format] = {}
    table = input_embedding(model)
    if table is not None and _match([table, f"{table}.weight"], include):
        embedding: Any = model.get_submodule(table)
        reason = "excluded by name" if _match([table, f"{table}.weight"], exclude) else why_not_rows(embedding, values)
        if (reason := reason or against(embedding.weight)) is None:
            tables[table] = values
        else:
            skipped[table] = reason
    return Chosen(modules, formats, skipped, _ties(model, modules, formats, tied, with_it), tables)


def by_plan(model: nn.Module, plan: Any) -> Chosen:
    """What a plan keeps in few bits, exactly in its formats.

    Args:
        plan: as :func:`planned_formats` takes it.

    Raises SparseForgeError if a weight cannot be kept so, or is not 2:4 where the plan says that it is, or the plan
    keeps nothing in few bits.
    """
    names = _names(model)
    packed = packed_weights(model) | {name: head.table for name, head in tied_packed_heads(model)}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    multiplied: dict[str, Any] = linears | find_expert_stacks(model)[0] | packed
    owner = {n: path for path, m in multiplied.items() for n in _names_of(path, m, names)}
    table = input_embedding(model)
    if table is not None:
        multiplied[table] = model.get_submodule(table)
        owner[f"{table}.weight"] = table
    others = {n: None for n, p in model.named_parameters(remove_duplicate=False) if p.dim() in (2, 3)}
    formats = planned_formats(plan, others | {n: _shape(multiplied[path]) for n, path in owner.items()})
    if not any(form.is_quantized for form in formats.values()):
        raise SparseForgeError(
            "nothing to quantise: the plan keeps all values as floats; sf.save_packed writes the 2:4 ones of them"
        )
    tied = tied_heads(model)
    modules, skipped = find_packable(model, _unreadable, tied)
    stacks, other_stacks = find_packable_stacks(model, _unreadable)
    modules, skipped = modules | stacks, skipped | other_stacks
    skipped |= dict.fromkeys(modules, "not in the plan")
    chosen: dict[str, Format] = {}
    for name, form in formats.items():
        path = owner.get(name)
        if path is None:
            if form.is_quantized:
                raise SparseForgeError(f"the plan makes {name} {form}, and it is no weight of a linear or of experts")
            continue
        module = multiplied[path]
        if isinstance(module, PackedWeight):
            if module.format != form:
                raise SparseForgeError(
                    f"the plan makes {name} {form}, and it is packed in {module.format}: dequantize() the model first"
                )
            continue
        if path == table:
            against = None if form == DENSE else why_not_rows(module, form) or _unreadable(module.weight)
            if against is not None:
                raise SparseForgeError(f"the plan makes {name} {form}, which it cannot be: {against}")
            chosen[path] = form
            continue
        if form.is_quantized and path not in modules:
            raise SparseForgeError(f"the plan makes {name} {form}, which it cannot be: {skipped[path]}")
        if form.is_sparse and not check_pattern(weight_of(module), TWO_FOUR):
            raise SparseForgeError(
                f"the plan makes {name} {form}, and it is not 2:4: run sf.sparsify(model, data, plan=plan) first"
            )
        if chosen.setdefault(path, form) != form:
            raise SparseForgeError(f"the plan makes {name} {form}, and by its other name {chosen[path]}: keep one")
        if path in modules:
            skipped[path] = f"plan: {form}"
    quantized = {path: form for path, form in chosen.items() if form.is_quantized}
    tables = {path: quantized.pop(path) for path in list(quantized) if path == table}
    return Chosen(
        {path: module for path, module in modules.items() if path in quantized},
        quantized,
        {path: reason for path, reason in skipped.items() if path not in quantized},
        _ties(model, modules, quantized, tied, {e for e in tied.values() if f"{e}.weight" in formats}),
        tables,
    )


def _ties(
    model: nn.Module,
    modules: Mapping[str, Any],
    formats: Mapping[str, Format],
    tied: Mapping[str, str],
    named: Collection[str],
) -> dict[str, Tie]:
    """Of the tied linears that get a format, what becomes of the embeddings; ``named``: those that have it, too."""
    return {
        name: Tie(
            embedding,
            why_not_one(modules[name], model.get_submodule(embedding), formats[name])
            if embedding in named
            else "only the linear is named",
        )
        for name, embedding in tied.items()
        if name in formats
    }


def _unreadable(weight: Tensor) -> str | None:
    if weight.is_meta or not weight.is_floating_point():
        return "on the meta device" if weight.is_meta else f"its weight is {weight.dtype}"
    return None


def _shape(module: Any) -> tuple[int, ...]:
    return tuple(module.shape if isinstance(module, PackedWeight) else weight_of(module).shape)


def _names_of(path: str, module: Any, names: Mapping[int, list[str]]) -> list[str]:
    """Of the weight; a packed linear stands for a module, a packed stack for a parameter."""
    if isinstance(module, SparseExperts):
        return [path]
    known = None if isinstance(module, PackedWeight) else names.get(id(module.weight))
    return known or [f"{path}.weight"]


def _names(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> all names of it."""
    found: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[id(parameter)].append(name)
    return found


def _match(names: Sequence[str], globs: str | Sequence[str]) -> bool:
    return any(matches(name, globs) for name in names)
