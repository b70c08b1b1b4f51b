"""``quantize``: linears over int8 or int4 codes, in place: ``generate()`` goes on, and reads fewer bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparseforge_fx.deploy.lowering.modules import SparseLinear, find_packable, replace, weight_of
from sparseforge_fx.deploy.lowering.report import PackedSite, PackingReport
from sparseforge_fx.deploy.lowering.round_on_data import first_batches, round_on_data
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import Format, parse_format
from sparseforge_fx.kernels.layouts import layouts_of, native_layout
from sparseforge_fx.kernels.packed import Packed, pack_codes
from sparseforge_fx.methods.rounding import Rounded, codes_of, round_weight
from sparseforge_fx.methods.weights import put_back
from sparseforge_fx.pattern import TWO_FOUR, check_pattern
from sparseforge_fx.ranges import Count, checked
from sparseforge_fx.report import environment


@checked
@torch.no_grad()
def quantize(
    model: nn.Module,
    values: str = "int8",
    data: Any = None,
    *,
    scales: Mapping[str, Tensor] | None = None,
    dense: bool = True,
    tokenizer: Any = None,
    calibration: Count = 64,
    length: Count = 512,
    batch_size: Count = 4,
    seed: int = 0,
    example_inputs: Any = None,
) -> PackingReport:
    """Replace every nn.Linear and Conv1D by a :class:`SparseLinear` over codes, in place: 2:4 weights stay 2:4.

    With data, each layer is rounded so that it answers what the rounded layers before it give it as the model answers
    now (methods/rounding.py). Without, each weight gets its own nearest values, which costs far more at 4 bits.

    Args:
        values: ``int8`` (one scale per output), ``int4`` (one for every 32 inputs), or ``int4/128``.
        scales: those of weights that are on a grid already, by the weights' names (``sparsify(...).scales``): they are
            packed exactly.
        data: calibration text, token ids or batches, as for :func:`sparseforge_fx.sparsify`. A weight that they do not
            reach gets the scales of its largest values and its nearest codes, and a note.
        dense: weights that are not 2:4, too; False leaves them as they are.
        calibration: sequences of the data that are looked at, of ``length`` tokens each, ``batch_size`` at a time.
        example_inputs: for capture, where they cannot be made from the model's config or from ``data``.

    ``sf.save_packed`` writes the result, ``sf.load`` reads it; ``model.dequantize()`` of a loaded one goes back.
    Returns the report: sites with their formats, the other linears with reasons, bytes before and after.
    Raises SparseForgeError for other values, scales of no linear, or if there is nothing to quantise; the model is as
    it was then.
    """
    values_alone = parse_format(values)
    if values_alone.is_sparse or not values_alone.is_quantized:
        raise SparseForgeError(
            f"values is {values!r}: choose int8, int4 or int4/128; 2:4 weights stay 2:4 by themselves"
        )
    known = dict(scales or {})
    sites, skipped = _find_sites(model, values_alone, known, dense)
    found: list[PackedSite] = []
    before = after = scratch = 0
    notes = ["tokenizer is given and not used: there is no data"] if data is None and tokenizer is not None else []
    with _as_it_was(model, sites, copies=data is not None):
        rounded: dict[str, Rounded] = {}
        formats = {
            name: _format(weight_of(module), values_alone)
            for name, module in sites.items()
            if f"{name}.weight" not in known
        }
        if data is not None and formats:
            batches = first_batches(data, tokenizer, calibration, length=length, batch_size=batch_size, seed=seed)
            weights = {name: sites[name].weight for name in formats}
            rounded, told = round_on_data(model, weights, formats, batches, example_inputs)
            notes += told
        for name, module in sites.items():
            packed = _packed(module, values_alone, known.get(f"{name}.weight"), rounded.get(name), name)
            old = weight_of(module)
            sparse = SparseLinear(packed, module.bias, transposed=isinstance(module, Conv1D), dtype=old.dtype)
            sparse.change_layout(native_layout(old.device, packed.format))
            replace(model, name, sparse.train(module.training))
            kept = {"format": str(packed.format), "layout": sparse.layout, "bytes": packed.nbytes}
            found.append({"name": name, "out": old.shape[0], "in": old.shape[1], **kept})  # type: ignore[typeddict-item]
            before, after, scratch = before + old.nbytes, after + packed.nbytes, max(scratch, old.nbytes)
    return {
        "sites": found,
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped.items()],
        "dense_bytes": before,
        "lowered_bytes": after,
        "scratch_bytes": scratch,
        "notes": notes,
        **environment(),
    }


@contextmanager
def _as_it_was(model: nn.Module, sites: Mapping[str, Any], *, copies: bool) -> Iterator[None]:
    """Put modules back, and with ``copies`` their weights, if what follows fails half-way."""
    before = {name: module.weight.detach().clone() for name, module in sites.items()} if copies else {}
    try:
        yield
    except BaseException:
        for name, module in sites.items():
            if model.get_submodule(name) is not module:
                replace(model, name, module)
        put_back((sites[name].weight, weight) for name, weight in before.items())
        raise


def _format(weight: Tensor, values: Format) -> Format:
    return values._replace(pattern="2:4" if check_pattern(weight, TWO_FOUR) else "dense")


def _packed(module: nn.Module, values: Format, scales: Tensor | None, rounded: Rounded | None, name: str) -> Packed:
    weight = weight_of(module)
    form = _format(weight, values)
    try:
        if rounded is None:
            rounded = round_weight(weight, form) if scales is None else codes_of(weight, scales.to(weight.device), form)
        return pack_codes(rounded.codes, rounded.scales, form)
    except SparseForgeError as error:
        raise SparseForgeError(f"'{name}': {error}") from error


def _find_sites(
    model: nn.Module, values: Format, known: Mapping[str, Tensor], dense: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """The modules to replace, and the other linears with a reason. Raises SparseForgeError where there is nothing to
    do."""

    def against(weight: Tensor) -> str | None:
        if weight.is_meta or not weight.is_floating_point():
            return "on the meta device" if weight.is_meta else f"its weight is {weight.dtype}"
        if not dense and not check_pattern(weight, TWO_FOUR):
            return "not 2:4"
        return _format(weight, values).why_not(weight.shape[1])

    sites, skipped = find_packable(model, against)
    if strange := sorted(known.keys() - {f"{name}.weight" for name in sites}):
        raise SparseForgeError(f"scales of {strange[0]}, which is no linear that can be packed: leave them out")
    if not sites:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:4])
        raise SparseForgeError(f"nothing to quantise: {reasons or 'the model has no linear layer'}")
    device = weight_of(next(iter(sites.values()))).device
    if not any(values.values in layout.takes for layout in layouts_of(device)):
        raise SparseForgeError(
            f"there are no kernels for {values.values} on {device.type}: move the model to the CPU first"
        )
    return sites, skipped
