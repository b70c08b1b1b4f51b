"""``quantize``: linears over int8 or int4 codes, in place: ``generate()`` goes on, and reads fewer bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_fx.data.opening import LENGTH, first_batches, idle_reading, open_batches, tell_length, tell_text
from sparseforge_fx.deploy.lowering.chosen import Chosen, Tie, by_plan, by_values
from sparseforge_fx.deploy.lowering.modules import packed_like, replace, weight_of
from sparseforge_fx.deploy.lowering.packed_embedding import PackedEmbedding, TiedHead
from sparseforge_fx.deploy.lowering.report import PackingReport, stored_site
from sparseforge_fx.deploy.lowering.round_on_data import round_on_data
from sparseforge_fx.deploy.lowering.savable import leave_savable
from sparseforge_fx.deploy.lowering.sparse_modules import PackedWeight, lay_together, packed_weights
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import Format, parse_format
from sparseforge_fx.graph.forward import unwrapped
from sparseforge_fx.kernels.layouts import layouts_of, native_layout
from sparseforge_fx.kernels.packed import Packed, pack_codes, unpack_codes
from sparseforge_fx.methods.rounding import Rounded, codes_of, round_weight, stacked
from sparseforge_fx.methods.weights import put_back
from sparseforge_fx.models.compute_dtype import cast, cast_inputs, choose_dtype, dtype_of
from sparseforge_fx.models.expert_stacks import ExpertStack
from sparseforge_fx.models.ties import part
from sparseforge_fx.passes.globs import unmatched
from sparseforge_fx.ranges import Count, Seed, checked
from sparseforge_fx.report import environment
from sparseforge_fx.scales import are_coarse

#: options that say what of the data is read
READING = ("calibration", "length", "batch_size", "seed", "text_column", "separator", "cache_dir")

BATCH_SIZE = 4


@torch.no_grad()
@checked
def quantize(
    model: nn.Module,
    values: str | None = None,
    data: Any = None,
    *,
    plan: Any = None,
    scales: Mapping[str, Tensor] | None = None,
    dense: bool = True,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    tokenizer: Any = None,
    example_inputs: Any = None,
    **reading: Any,
) -> PackingReport:
    """Replace nn.Linear and Conv1D modules by :class:`SparseLinear` over codes, and stacks of experts by
    :class:`SparseExperts`, in place: all of them in one kind of values, 2:4 weights staying 2:4, or those that a plan
    keeps in few bits, exactly in its formats.

    With data, each layer is rounded so that it answers what the rounded layers before it give it as the model answers
    now (methods/rounding.py). Without, each weight gets its own nearest values, which costs far more at 4 bits.

    Args:
        values: ``int8`` (one scale per output; the default without a plan), ``int4`` (one for every 32 inputs),
            ``int4/128``, or ``int4/16`` (one of 8 bits for every 16: the bytes of ``int4``, the smallest error).
        plan: a :class:`Plan`, the path of one, or formats by the weights' names. What it makes 2:4 must be so:
            ``sf.sparsify(model, data, plan=plan)`` comes first. What it makes dense is kept dense, zeros included. What
            it leaves in floats stays as it is, for ``lower_modules`` and ``save_packed``.
        scales: those of weights that are on a grid already, by the weights' names (``sparsify(...).scales``): they are
            packed exactly.
        data: calibration text, token ids or batches, as for :func:`sparseforge_fx.sparsify`. A weight that they do not
            reach gets the scales of its largest values and its nearest codes, and a note. Where half precision is
            slower on this CPU, the model goes over them in float32, and a note says so.
        dense: weights that are not 2:4, too; False leaves them as they are. A plan says so itself.
        include, exclude: globs over weights or modules, in the place of a plan: only what is included is quantised. A
            head that is tied to an embedding stays as it is unless it is included, and the table of the tokens, tied or
            not, too (``include="*"``: everything). Where both are included, or the embedding is named in a plan, the
            two go on as one weight in few bits; else, and for an embedding that reads its weight in a way of its own,
            the head gets a copy beside it, which the notes say.
        example_inputs: for capture, where they cannot be made from the model's config or from ``data``.
        reading: what of the data is looked at: ``calibration`` (sequences; default 64), ``length`` (tokens of each;
            512), ``batch_size`` (4), ``seed`` (0); of text ``text_column``, ``separator``, ``cache_dir``.

    Of a tied head the model's configuration no longer says so: what ties it then is the packed weight.
    ``sf.save_packed`` writes the result, ``sf.load`` reads it; ``model.dequantize()`` of a loaded one goes back.
    Returns the report: sites with their formats, the other linears with reasons, bytes before and after.
    Raises SparseForgeError for other values, a plan that does not fit, scales of no linear, or if there is nothing to
    quantise; the model is as it was then.
    """
    model = unwrapped(model)
    notes = _unused(data, {"tokenizer": tokenizer, "example_inputs": example_inputs}, reading)
    chosen = _choose(model, values, plan, dense, include, exclude)
    notes += unmatched(model, include=include, exclude=exclude)
    known = dict(scales or {})
    _check(model, chosen, known)
    sites = chosen.modules
    tables = {name: model.get_submodule(name) for name in chosen.embeddings}
    with _as_it_was(model, sites, {**tables, **_tied_embeddings(model, chosen)}, copies=data is not None):
        for name, tie in chosen.tied.items():
            sites[name].weight = nn.Parameter(sites[name].weight.detach().clone(), sites[name].weight.requires_grad)
            notes.append(_tell(name, tie, chosen.formats[name]))
        rounded: dict[str, Rounded] = {}
        formats = {name: form for name, form in chosen.formats.items() if f"{name}.weight" not in known}
        if data is not None and formats:
            weights = {name: sites[name].weight for name in formats}
            rounded, told = _rounded(model, weights, formats, example_inputs, data, tokenizer, reading)
            notes += told
        elif data is not None:
            why = "the scales of all weights are known" if sites else "rows of an embedding are rounded by themselves"
            notes.append(f"data is given and not used: {why}")
        packed = {
            name: _packed(module, chosen.formats[name], known.get(f"{name}.weight"), rounded.get(name), name)
            for name, module in sites.items()
        }
        rows = {name: _packed(module, chosen.embeddings[name], None, None, name) for name, module in tables.items()}
        layouts = _put(model, sites, packed, {n: tie.embedding for n, tie in chosen.tied.items() if not tie.apart})
        layouts |= _put_tables(model, rows)
        for name in chosen.tied:
            part(model, name)
    leave_savable(model)
    return _report(chosen, {**sites, **tables}, {**packed, **rows}, layouts, notes)


def _tied_embeddings(model: nn.Module, chosen: Chosen) -> dict[str, nn.Module]:
    return {tie.embedding: model.get_submodule(tie.embedding) for tie in chosen.tied.values()}


def _rounded(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    formats: Mapping[str, Format],
    example_inputs: Any,
    data: Any,
    tokenizer: Any,
    reading: Mapping[str, Any],
) -> tuple[dict[str, Rounded], list[str]]:
    """By name what the weights become on the data, and what to say of it."""
    batches, told = _batches(model, data, tokenizer, **reading)
    computing = choose_dtype(dtype_of(model), next(iter(weights.values())).device)
    inputs = cast_inputs((batches, example_inputs), computing.checkpoint, computing.dtype)
    back = cast(model, computing.dtype)
    try:
        rounded, more = round_on_data(model, weights, formats, *inputs)
    finally:
        back()
    return rounded, [*computing.notes(), *told, *more]


def _report(
    chosen: Chosen,
    modules: Mapping[str, Any],
    packed: Mapping[str, Packed],
    layouts: Mapping[str, str],
    notes: list[str],
) -> PackingReport:
    coarse = {name: _why_coarse(p) for name, p in packed.items() if p.format.levels is not None}
    dense_bytes = [packed[name].shape.numel() * module.weight.dtype.itemsize for name, module in modules.items()]
    return {
        "sites": [stored_site(name, weight, layouts[name]) for name, weight in packed.items()],
        "skipped": [{"name": name, "reason": reason} for name, reason in chosen.skipped.items()],
        "dense_bytes": sum(dense_bytes),
        "lowered_bytes": sum(p.nbytes for p in packed.values()),
        "scratch_bytes": max(dense_bytes),
        "notes": [*notes, *(f"{name}: {why}" for name, why in coarse.items() if why)],
        **environment(),
    }


def _why_coarse(packed: Packed) -> str | None:
    """What to say of a weight some groups of which are so much larger than others in their rows that 8 bits of scale do
    not tell these apart; None: nothing. A group of zeros needs no scale."""
    few = are_coarse(packed.scales)  # type: ignore[arg-type]
    if few.float().mean() <= 0.01:
        return None
    some = (unpack_codes(packed).unflatten(-1, (few.shape[-1], -1)) != 0).any(-1)
    share = ((few & some).sum() / some.sum().clamp(min=1)).item()
    if share <= 0.01:
        return None
    return (
        f"{share:.0%} of its groups have a scale of less than a fiftieth of the largest in their row, which 8 bits "
        "know to a fifth at best: int4/32 may keep it better"
    )


def _unused(data: Any, beside: Mapping[str, Any], reading: Mapping[str, Any]) -> list[str]:
    """What to say of options that only data has a use for. Raises SparseForgeError for those that there are not."""
    if unknown := sorted(set(reading) - set(READING)):
        raise SparseForgeError(f"quantize has no option {', '.join(unknown)}; of data it takes {', '.join(READING)}")
    given = {**beside, **reading} if data is None else {}
    return [f"{name} is given and not used: there is no data" for name, value in given.items() if value is not None]


def _choose(
    model: nn.Module,
    values: str | None,
    plan: Any,
    dense: bool,
    include: str | Sequence[str],
    exclude: str | Sequence[str],
) -> Chosen:
    if plan is not None:
        if values is not None or not dense or include or exclude:
            raise SparseForgeError("a plan gives every weight its format: leave out values, dense, include and exclude")
        return by_plan(model, plan)
    form = parse_format("int8" if values is None else values)
    if form.is_sparse or not form.is_quantized:
        raise SparseForgeError(
            f"values is {values!r}: choose int8, int4, int4/128 or int4/16; 2:4 weights stay 2:4 by themselves"
        )
    return by_values(model, form, dense, include, exclude)


def _check(model: nn.Module, chosen: Chosen, known: Mapping[str, Tensor]) -> None:
    """Raise a SparseForgeError where there is nothing to do, or nobody to do it."""
    sites, tables = chosen.modules, chosen.embeddings
    if strange := sorted(known.keys() - {f"{name}.weight" for name in sites}):
        raise SparseForgeError(f"scales of {strange[0]}, which is no linear that can be packed: leave them out")
    if not sites and not tables and packed_weights(model):
        raise SparseForgeError("nothing to quantise: the linears are packed already; model.dequantize() goes back")
    if not sites and not tables:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(chosen.skipped.items())[:4])
        raise SparseForgeError(f"nothing to quantise: {reasons or 'the model has no linear layer'}")
    some: Any = next(iter(sites.values())) if sites else model.get_submodule(next(iter(tables)))
    device = weight_of(some).device
    known_values = {values for layout in layouts_of(device) for values in layout.takes}
    if unknown := next((form for form in chosen.formats.values() if form.values not in known_values), None):
        raise SparseForgeError(f"there are no kernels for {unknown} on {device.type}: move the model to the CPU first")


@checked
def _batches(
    model: nn.Module,
    data: Any,
    tokenizer: Any,
    *,
    calibration: Count = 64,
    length: Count = LENGTH,
    batch_size: Count = BATCH_SIZE,
    seed: Seed = 0,
    **text: Any,
) -> tuple[list[Any], list[str]]:
    """What of the data is looked at, and what to say of it."""
    batches = open_batches(
        model, data, tokenizer, tokens=calibration * length, length=length, batch_size=batch_size, seed=seed, **text
    )
    found, notes = first_batches(batches, calibration)
    given = {"tokenizer": tokenizer, "length": length, "batch_size": batch_size, **text}
    usual = {"length": LENGTH, "batch_size": BATCH_SIZE}
    idle = idle_reading(data, batches, length)
    notes += [f"{n} is given and not used: {why}" for n, why in idle.items() if given.get(n) != usual.get(n)]
    return found, [*notes, *tell_text(data, batches, text.get("text_column")), *tell_length(data, batches, length)]


@contextmanager
def _as_it_was(
    model: nn.Module, sites: Mapping[str, Any], embeddings: Mapping[str, Any], *, copies: bool
) -> Iterator[None]:
    """Put modules and their parameters back, and with ``copies`` their values, if what follows fails half-way."""
    own = {name: module.weight for name, module in sites.items()}
    rows = {name: embedding.weight for name, embedding in embeddings.items()}
    before = {name: weight.detach().clone() for name, weight in own.items()} if copies else {}
    try:
        yield
    except BaseException:
        for name, module in sites.items():
            if isinstance(module, ExpertStack):
                replace(model, name, own[name])
            elif model.get_submodule(name) is not module:
                replace(model, name, module)
            module.weight = own[name]
        for name, embedding in embeddings.items():
            embedding.__dict__.pop("weight", None)
            embedding.weight = rows[name]
            replace(model, name, embedding)
        put_back((own[name], weight) for name, weight in before.items())
        raise


def _put(
    model: nn.Module, sites: Mapping[str, Any], packed: Mapping[str, Packed], tables: Mapping[str, str]
) -> dict[str, str]:
    """Packed linears in the place of those of that name, in the layout of their device, which is given by name.

    Args:
        tables: heads whose weight is that of the embedding of that name, and stays so.
    """
    layouts: dict[str, str] = {}
    placed: list[PackedWeight] = []
    for name, module in sites.items():
        if name in tables:
            layouts[name] = _put_tables(model, {tables[name]: packed[name]})[tables[name]]
            table: Any = model.get_submodule(tables[name])
            replace(model, name, TiedHead(table, module.bias).train(module.training))
            continue
        sparse = packed_like(module, packed[name])
        sides = sparse.out_features, sparse.in_features
        sparse.change_layout(native_layout(module.weight.device, sparse.format, *sides, module.weight.dtype))
        layouts[name] = sparse.layout
        replace(model, name, sparse)
        placed.append(sparse)
    lay_together(placed)
    return layouts


def _put_tables(model: nn.Module, packed: Mapping[str, Packed]) -> dict[str, str]:
    """Packed embeddings in the place of those of that name; their layouts."""
    made = {name: PackedEmbedding(rows, model.get_submodule(name)) for name, rows in packed.items()}  # type: ignore[arg-type]
    for name, table in made.items():
        replace(model, name, table)
    lay_together(made.values())
    return {name: table.layout for name, table in made.items()}


def _tell(name: str, tie: Tie, form: Format) -> str:
    if tie.apart is None:
        return f"{name} and {tie.embedding} stay one weight, in {form}"
    return f"{name}: a copy of its own, in {form}, beside the weight of {tie.embedding} ({tie.apart})"


def _packed(module: Any, form: Format, scales: Tensor | None, rounded: Rounded | None, name: str) -> Packed:
    weight = weight_of(module)
    try:
        if rounded is None and scales is not None:
            rounded = codes_of(weight, scales.to(weight.device), form)
        elif rounded is None:
            rounded = (
                stacked([round_weight(w, form) for w in weight]) if weight.dim() == 3 else round_weight(weight, form)
            )
        return pack_codes(rounded.codes, rounded.scales, form)
    except SparseForgeError as error:
        raise SparseForgeError(f"'{name}': {error}") from error
