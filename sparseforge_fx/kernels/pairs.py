"""The layout ``pairs``: 2:4 weights of int8 or int4 codes as a CPU with AVX2 or AVX-512 multiplies them fastest.

The rows of the weight are taken two by two and their inputs in steps of 64. Of such a step there are 64 survivors: of
each sixteen inputs eight of the first row, then eight of the second. Their int8 codes follow each other; of int4 codes
that of survivor i is in the low bits of byte i where i < 32, else in the high bits of byte i - 32. Where each stands in
its group of four is in 16 bytes: that of survivor i in bits 2 (i // 16) and the next of byte i % 16. These are as many
bytes as on disk, the places instead of the bitmask, in a shape of their own, so that a state dict of one layout is not
taken for one of the other; scales are those on disk. The kernel is ``cpu/pairs_linear.cpp``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import Format
from sparseforge_fx.kernels import cpu
from sparseforge_fx.kernels.packed import Packed, unpack, unpack_mask

STEP = 64  # inputs
ROWS = 4  # a multiple of so many, that halves of the outputs are pairs, too


def why_not(out_features: int, in_features: int, dtype: torch.dtype, device: torch.device, form: Format) -> str | None:
    """Why the kernel cannot take such a weight [out, in]; None if it can."""
    if (misfit := _misfit(out_features, in_features)) is not None:
        return misfit
    if dtype not in (torch.bfloat16, torch.float32):
        return f"pairs multiply bfloat16 and float32, not {dtype}"
    if not cpu.pairs_rows():
        return "pairs need a CPU that has AVX2, and a C++ compiler"
    return "with AVX-512 rows of int8 are as fast" if form.values == "int8" and cpu.vnni() else None


def _misfit(out_features: int, in_features: int) -> str | None:
    if out_features % ROWS or in_features % STEP:
        return f"pairs are of multiples of {ROWS} x {STEP}, not {out_features} x {in_features}"
    return None


def as_pairs(packed: Packed) -> tuple[Tensor, Tensor]:
    """Values, int8 [out, in/2] or uint8 [out, in/4], and places, uint8 [out/2, in/4]; exact.

    Raises SparseForgeError for a weight that is not 2:4 in few bits, or whose sides do not fit.
    """
    (out, width), form = packed.shape, packed.format
    if not (form.is_sparse and form.is_quantized):
        raise SparseForgeError(f"pairs are of 2:4 weights in int8 and int4, not of {form}: keep this one as rows")
    if (misfit := _misfit(out, width)) is not None:
        raise SparseForgeError(f"{misfit}: keep this weight as rows")
    eight, values = form.values == "int8", packed.values
    if not eight:
        values = torch.stack((values & 15, values >> 4), -1).flatten(-2)  # in order, [out, in/2]
    group = unpack_mask(packed.bitmask).unflatten(-1, (-1, 4)).to(torch.uint8)
    first, last = group.argmax(-1), 3 - group.flip(-1).argmax(-1)
    places = torch.stack((first, last), -1).flatten(-2).to(torch.uint8)
    codes = _two_rows(values)
    if not eight:
        low, high = codes.unflatten(-1, (2, -1)).unbind(-2)
        codes = low | high << 4
    fields = _two_rows(places).unflatten(-1, (4, 16)).unbind(-2)
    where = fields[0] | fields[1] << 2 | fields[2] << 4 | fields[3] << 6
    return codes.reshape(out, -1), where.reshape(out // 2, width // 4)


def from_pairs(values: Tensor, places: Tensor, in_features: int, scales: Tensor) -> Packed:
    """The packed weight that these are of, bit for bit."""
    out = values.shape[0]
    eight = values.dtype == torch.int8
    codes = values.reshape(out // 2, -1, STEP if eight else STEP // 2)
    fields = places.reshape(out // 2, -1, 16)
    kept = _one_row(codes if eight else torch.cat((codes & 15, codes >> 4), -1))
    where = _one_row(torch.cat([fields >> 2 * lane & 3 for lane in range(4)], -1))
    if not eight:
        low, high = kept.unflatten(-1, (-1, 2)).unbind(-1)
        kept = low | high << 4
    bits = (torch.ones_like(where) << where).unflatten(-1, (-1, 4))  # of two groups: four survivors
    bitmask = bits[..., 0] | bits[..., 1] | (bits[..., 2] | bits[..., 3]) << 4
    return Packed(kept, bitmask, in_features, scales)


def _two_rows(survivors: Tensor) -> Tensor:
    """[out, in/2] -> [out/2, in/64, 64]: eight of one row, eight of the next."""
    out = survivors.shape[0]
    return survivors.view(out // 2, 2, -1, 4, 8).permute(0, 2, 3, 1, 4).reshape(out // 2, -1, 64)


def _one_row(survivors: Tensor) -> Tensor:
    """The way back."""
    halves = survivors.shape[0]
    return survivors.view(halves, -1, 4, 2, 8).permute(0, 3, 1, 2, 4).reshape(2 * halves, -1)


def pairs_dense(values: Tensor, places: Tensor, in_features: int, scales: Tensor | None) -> Tensor:
    """The dense weight [out, in], in plain torch."""
    if scales is None:
        raise SparseForgeError("a weight of pairs has scales: it is int8 or int4")
    return unpack(from_pairs(values, places, in_features, scales))


def pairs_dense_on_cpu(values: Tensor, places: Tensor, in_features: int, scales: Tensor | None) -> Tensor:
    """The same by the C++ kernel, where it is there."""
    if scales is None or not cpu.available():
        return pairs_dense(values, places, in_features, scales)
    return cpu.pairs_dense(values, places, in_features, scales)


def pairs_product(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    in_features: int,
    bias: Tensor | None,
    activation: str,
    scales: Tensor | None,
) -> Tensor | None:
    """act(x W^T + b), x [rows, in] -> [rows, out] by the C++ kernel; None where it does not serve so many rows."""
    if scales is None or x.dtype not in (torch.bfloat16, torch.float32) or x.shape[0] > most_rows(x.dtype, in_features):
        return None
    return cpu.pairs_linear(x, values, places, in_features, scales, bias, activation)


def most_rows(dtype: torch.dtype, in_features: int) -> int:
    """So many rows of x are served by the kernel; for more, the weight is better expanded."""
    return min(cpu.pairs_rows(), cpu.max_rows(dtype, in_features, quantized=True))
