"""How the scales of a weight in few bits are kept: their dtype says which of three ways.

- float32 [..., out, 1], above zero: int8, one for each output.
- float16 [..., out, in / group], of either sign: int4, one for each group of inputs.
- int8 [..., out, in / 16 + 4], not zero: int4 in groups of 16. Each is times the row's float32, whose bytes are the
  last four (as in the K-quants of llama.cpp, there by super-blocks of 256). A group's peak is near that of its row, so
  eight bits are as good as sixteen, and a group may be half as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseforge_fx.formats import FINE, Format

ROW_BYTES = 4  # of the float32 behind the int8 scales of a row
_MOST = 127
COARSE = 2  # steps of a scale of 8 bits: one of so many is a fifth off, and more


def scales_like(format: Format, in_features: int) -> tuple[torch.dtype, int]:
    """The dtype of the scales of a weight with so many inputs, and how many columns they have."""
    if format.group is None:
        return torch.float32, 1
    groups = in_features // format.group
    return (torch.int8, groups + ROW_BYTES) if format.group == FINE else (torch.float16, groups)


def group_of(scales: Tensor, in_features: int) -> int | None:
    """Inputs that share one; None: all of a row."""
    if scales.dtype == torch.int8:
        return FINE
    return None if scales.dtype == torch.float32 else in_features // max(1, scales.shape[-1])


def scale_values(scales: Tensor) -> Tensor:
    """What they are, float32 [..., out, groups]."""
    if scales.dtype != torch.int8:
        return scales.float()
    return scales[..., :-ROW_BYTES].float() * _row_of(scales)


def _row_of(scales: Tensor) -> Tensor:
    """Float32 [..., out, 1], a copy: bytes that begin anywhere are no numbers."""
    return scales[..., -ROW_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)


def stored_scales(values: Tensor, format: Format) -> Tensor:
    """The nearest that can be kept, and none that is zero, of float32 [..., out, groups]."""
    if format.group == FINE:
        return _in_bytes(values.float())
    dtype, least = (torch.float16, 6e-8) if format.group else (torch.float32, torch.finfo(torch.float32).tiny)
    sizes = values.abs().clamp(least, torch.finfo(dtype).max)
    return torch.where(values < 0, -sizes, sizes).to(dtype)


def _in_bytes(values: Tensor) -> Tensor:
    """The row's has a fraction of 16 bits, so that its products with 127 are exact and come back as they were."""
    row = values.abs().amax(-1, keepdim=True).clamp(torch.finfo(torch.float32).tiny * _MOST, 1e38) / _MOST
    row = ((row.view(torch.int32) + 0x80) & ~0xFF).view(torch.float32)
    codes = (values / row).round_().clamp_(-_MOST, _MOST)
    codes = torch.where(codes == 0, torch.where(values < 0, -1.0, 1.0), codes).to(torch.int8)
    return torch.cat((codes, row.contiguous().view(torch.int8)), -1)


def are_coarse(scales: Tensor) -> Tensor:
    """Which of those of 8 bits, [..., out, groups], are so small beside the largest in their row as to be known to
    a fifth at best."""
    return scales[..., :-ROW_BYTES].abs() <= COARSE


def wrong_scale(scales: Tensor) -> str | None:
    """What is wrong with one of them; None: nothing."""
    if scales.dtype == torch.int8:
        if (scales[..., :-ROW_BYTES] == 0).any():
            return "zero or not finite"
        scales = _row_of(scales)
    if not (scales.isfinite() & (scales != 0)).all():
        return "zero or not finite"
    return "below zero" if scales.dtype != torch.float16 and (scales < 0).any() else None
