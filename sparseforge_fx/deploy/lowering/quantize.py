"""Weight quantisation after sparsity, by torchao's symmetric integer grids: zero is on them, so the pattern stays."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparseforge_fx.deploy.transformers_hook import torchao_unheard
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.pattern import AnyPattern, check_pattern, parse_pattern


@torch.no_grad()
def quantize(
    model: nn.Module, bits: int = 8, group: int | None = None, *, pattern: str | AnyPattern = "2:4"
) -> dict[str, Any]:
    """Give every sparse nn.Linear of ``model`` integer weights, in place, and show that its zeros are still zeros.

    Args:
        bits: 8 or 4.
        group: inputs that share a scale; default: 8 bits one scale per output, 4 bits 32 inputs. A layer whose width
            is no multiple of it gets one scale per output.
        pattern: what makes a weight sparse; linears that do not fit it keep their dtype.

    Returns ``{"bits", "quantized": {name: group or None}, "skipped": {name: reason}}``. The weights become torchao
    tensors of int8 storage (4-bit ones too, unpacked) that compute in the model's dtype.
    Raises SparseForgeError if torchao is not installed, for other bits, or if no linear is sparse.
    """
    if bits not in (4, 8):
        raise SparseForgeError(f"cannot quantise to {bits} bits: choose 8 or 4")
    if group is not None and group < 1:
        raise SparseForgeError(f"a group of {group} inputs makes no sense: give at least 1, or None")
    try:
        with torchao_unheard():
            from torchao.quantization import IntxWeightOnlyConfig, quantize_
            from torchao.quantization.granularity import PerAxis, PerGroup
    except ImportError as error:
        raise SparseForgeError(
            "quantisation needs torchao: pip install 'sparseforge-fx[quantize]', or torchao itself"
        ) from error
    shape = parse_pattern(pattern)
    width = group or (32 if bits == 4 else None)
    quantized: dict[str, int | None] = {}
    skipped: dict[str, str] = {}
    before: list[tuple[Any, Any]] = []
    try:
        for name, module in model.named_modules():
            reason = _why_not(module, shape)
            if reason is not None:
                if reason:
                    skipped[name] = reason
                continue
            fits = width is not None and module.in_features % width == 0  # type: ignore[operator]
            granularity = PerGroup(width) if fits else PerAxis(0)
            before.append((module, module.weight))
            zeros = module.weight == 0
            config = IntxWeightOnlyConfig(
                weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity, scale_dtype=torch.float32
            )
            quantize_(module, config, filter_fn=lambda m, _, this=module: m is this)
            if module.weight.dequantize()[zeros].any():  # type: ignore[operator]
                raise AssertionError(f"{name}: torchao moved a zero")
            quantized[name] = width if fits else None
    except BaseException:
        for module, weight in before:
            module.weight = weight
        raise
    if not quantized:
        raise SparseForgeError(f"no nn.Linear of the model is {shape} sparse: run sparsify first")
    return {"bits": bits, "quantized": quantized, "skipped": skipped}


def _why_not(module: nn.Module, pattern: AnyPattern) -> str | None:
    """None: quantise it. Otherwise why not; empty for what is no linear at all."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return ""
    if not isinstance(module, nn.Linear):
        return f"torchao quantises nn.Linear, not {type(module).__name__}"
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return "it is quantised already"
    if not check_pattern(weight, pattern):
        return f"it is not {pattern} sparse"
    return None
