"""``quantize``: linears over int8 or int4 codes, in place: ``generate()`` goes on, and reads fewer bytes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparseforge_fx.deploy.lowering.modules import SparseLinear, find_packable, replace, weight_of
from sparseforge_fx.deploy.lowering.report import PackedSite, PackingReport
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import Format, parse_format
from sparseforge_fx.kernels.layouts import ROWS, layouts_of
from sparseforge_fx.kernels.packed import Packed, pack_codes
from sparseforge_fx.methods.rounding import codes_of, round_weight
from sparseforge_fx.pattern import TWO_FOUR, check_pattern
from sparseforge_fx.report import environment


@torch.no_grad()
def quantize(
    model: nn.Module, values: str = "int8", *, scales: Mapping[str, Tensor] | None = None, dense: bool = True
) -> PackingReport:
    """Replace every nn.Linear and Conv1D by a :class:`SparseLinear` over codes, in place: 2:4 weights stay 2:4.

    Args:
        values: ``int8`` (one scale per output), ``int4`` (one for every 32 inputs), or ``int4/128``.
        scales: those of weights that are on a grid already, by the weights' names (``sparsify(...).scales``): they are
            packed exactly. Other weights get the scales of least squared error, and their nearest codes.
        dense: weights that are not 2:4, too; False leaves them as they are.

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

    def against(weight: Tensor) -> str | None:
        if weight.is_meta or not weight.is_floating_point():
            return "on the meta device" if weight.is_meta else f"its weight is {weight.dtype}"
        if not dense and not check_pattern(weight, TWO_FOUR):
            return "not 2:4"
        return _format(weight, values_alone).why_not(weight.shape[1])

    sites, skipped = find_packable(model, against)
    if strange := sorted(known.keys() - {f"{name}.weight" for name in sites}):
        raise SparseForgeError(f"scales of {strange[0]}, which is no linear that can be packed: leave them out")
    if not sites:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:4])
        raise SparseForgeError(f"nothing to quantise: {reasons or 'the model has no linear layer'}")
    device = weight_of(next(iter(sites.values()))).device
    if not any(layout.quantized for layout in layouts_of(device)):
        raise SparseForgeError(f"there are no kernels for {values} on {device.type}: move the model to the CPU first")
    found: list[PackedSite] = []
    before = after = scratch = 0
    done: dict[str, nn.Module] = {}
    try:
        for name, module in sites.items():
            packed = _packed(module, values_alone, known.get(f"{name}.weight"), name)
            old = weight_of(module)
            sparse = SparseLinear(packed, module.bias, transposed=isinstance(module, Conv1D), dtype=old.dtype)
            replace(model, name, sparse.train(module.training))
            done[name] = module
            kept = {"format": str(packed.format), "layout": ROWS.name, "bytes": packed.nbytes}
            found.append({"name": name, "out": old.shape[0], "in": old.shape[1], **kept})  # type: ignore[typeddict-item]
            before, after, scratch = before + old.nbytes, after + packed.nbytes, max(scratch, old.nbytes)
    except BaseException:
        for name, module in done.items():
            replace(model, name, module)
        raise
    return {
        "sites": found,
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped.items()],
        "dense_bytes": before,
        "lowered_bytes": after,
        "scratch_bytes": scratch,
        **environment(),
    }


def _format(weight: Tensor, values: Format) -> Format:
    return values._replace(pattern="2:4" if check_pattern(weight, TWO_FOUR) else "dense")


def _packed(module: nn.Module, values: Format, scales: Tensor | None, name: str) -> Packed:
    weight = weight_of(module)
    form = _format(weight, values)
    try:
        rounded = round_weight(weight, form) if scales is None else codes_of(weight, scales.to(weight.device), form)
        return pack_codes(rounded.codes, rounded.scales, form)
    except SparseForgeError as error:
        raise SparseForgeError(f"'{name}': {error}") from error
