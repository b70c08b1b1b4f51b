"""The packed format: survivors in the model's dtype, int8 or int4, a bit per weight that says where they stood, scales.

Neutral of any backend and what is written to disk: 9/16 of the bytes of a dense bfloat16 weight for 2:4, 3.5/16 with
int4 values. Each kernel converts it, at load time, to the layout that it reads fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import CODES, GROUPS, Format
from sparseforge_fx.pattern import TWO_FOUR, check_pattern, hard_mask
from sparseforge_fx.scales import group_of, scale_values, scales_like, wrong_scale

FORMAT_VERSION = 6
METHOD = "sparseforge"  # quant_method in config.json of a checkpoint in this format
#: what kernels multiply by; others can be packed and unpacked
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # same size in bytes -> integers


class Packed(NamedTuple):
    """A weight [..., out, in]: 2:4 (at most two non-zeros in every four along ``in``), or dense in few bits.

    Attributes:
        values: the survivors of each row in order, ``in`` rounded up to P, a multiple of 8 places. 2:4: [..., out,
            P/2], dense: [..., out, P]. In a floating dtype, or int8 codes in [-127, 127], or as uint8 two int4 codes in
            [-8, 7] a byte, in two's complement, the first in the low bits: half as many columns. Of int4 in groups of
            16 a code c stands for ``formats.LEVELS[pattern][c + 8]``.
        bitmask: uint8 [..., out, P/8]; bit k of byte j is set where element 8 j + k survives. Every group has exactly
            two bits: one with fewer non-zeros keeps zeros at its earliest free places. Dense: [..., out, 0].
        in_features: ``in``. Places beyond it hold zeros; a kernel must not read its input there.
        scales: None for floating values. A weight is its code, or what that stands for, times its scale: see
            ``scales.py``.
    """

    values: Tensor
    bitmask: Tensor
    in_features: int
    scales: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense weight."""
        return torch.Size((*self.values.shape[:-1], self.in_features))

    @property
    def format(self) -> Format:
        """The one answer to what a packed weight is kept in."""
        pattern = "2:4" if self.bitmask.shape[-1] else "dense"
        if self.scales is None:
            return Format(pattern)
        if self.values.dtype == torch.int8:
            return Format(pattern, "int8")
        return Format(pattern, "int4", group_of(self.scales, self.in_features))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.values.nbytes + self.bitmask.nbytes + (0 if self.scales is None else self.scales.nbytes)


def packed_names(weight: str) -> tuple[str, str, str]:
    """Names of the tensors of a packed weight by the weight's own: in files, modules and graphs, in any layout. The
    third, of the scales, is there for int8 and int4 alone."""
    return f"{weight}_values", f"{weight}_bitmask", f"{weight}_scales"


def weight_of_values(values: str) -> str:
    """The weight's name by that of its values."""
    return values.removesuffix("_values")


#: of a module's weight
VALUES, BITMASK, SCALES = packed_names("weight")


def why_dense(weight: Tensor) -> str | None:
    """Why a weight [out, in] is not packed, in one clause; None if it is exactly 2:4 and there are kernels for it."""
    if weight.is_meta:
        return "on the meta device"
    if weight.dtype not in DTYPES:
        return f"no kernel for {weight.dtype}"
    if not check_pattern(weight, TWO_FOUR):
        return "not 2:4: a group of four has more than two non-zeros"
    return None


def pack(weight: Tensor) -> Packed:
    """Pack ``weight`` [..., out, in]; any dtype of 1 to 8 bytes. Exact, except that -0.0 becomes 0.0.

    Raises SparseForgeError if a group of four has more than two non-zeros (NaN counts as one).
    """
    in_features = weight.shape[-1]
    bits = torch.nn.functional.pad(_as_integers(weight.detach()), (0, -in_features % 8)).contiguous()
    nonzero = bits != 0
    if weight.is_floating_point():
        nonzero &= bits != (
            1 << (8 * weight.element_size() - 1) if bits.dtype == torch.uint8 else torch.iinfo(bits.dtype).min
        )
    kept = hard_mask(nonzero, TWO_FOUR)
    if (nonzero & ~kept).any():
        raise SparseForgeError("the weight has more than two non-zeros in a group of four: harden or prune it first")
    values = torch.where(nonzero, bits, 0)[kept].view(*bits.shape[:-1], bits.shape[-1] // 2)
    powers = (1 << torch.arange(8, device=kept.device)).to(torch.uint8)
    bitmask = (kept.view(*kept.shape[:-1], kept.shape[-1] // 8, 8) * powers).sum(-1, dtype=torch.uint8)
    return Packed(values.view(weight.dtype), bitmask, in_features)


def pack_codes(codes: Tensor, scales: Tensor, format: Format) -> Packed:
    """Pack the weight ``codes * scales`` in a quantised format. Exact.

    Args:
        codes: integers [..., out, in], in [-127, 127] for int8 and [-8, 7] for int4, or of the format's levels; zero
            wherever the pattern prunes.
        scales: as they are kept (``scales.py``), or of int8 and float16 in another floating dtype.

    Raises SparseForgeError if the codes or scales are not those of such a format.
    """
    in_features = codes.shape[-1]
    if (against := format.why_not(in_features)) is not None:
        raise SparseForgeError(f"{format}: {against}")
    dtype, width = scales_like(format, in_features)
    if scales.shape != (*codes.shape[:-1], width) or scales.is_floating_point() != dtype.is_floating_point:
        raise SparseForgeError(
            f"scales of shape {list(scales.shape)}, {scales.dtype}, do not belong to {format} codes {list(codes.shape)}"
        )
    codes = _places_of(codes, format)
    scales = scales.to(dtype)
    if (wrong := wrong_scale(scales)) is not None:
        raise SparseForgeError(f"a scale of {format} is {wrong} as {scales.dtype}: choose scales in its range")
    if format.is_sparse:
        values, bitmask, _, _ = pack(codes)
    else:
        values = torch.nn.functional.pad(codes, (0, -in_features % 8))
        bitmask = torch.empty(*codes.shape[:-1], 0, dtype=torch.uint8, device=codes.device)
    if format.values == "int4":
        low, high = values.view(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
        values = low & 15 | high << 4
    return Packed(values.contiguous(), bitmask, in_features, scales.contiguous())


def _places_of(codes: Tensor, format: Format) -> Tensor:
    """The codes as they are kept, int8. Raises SparseForgeError if they are not those of the format."""
    if format.levels is None:
        (least, largest), (lowest, highest) = CODES[format.values], map(int, codes.aminmax())
        if lowest < least or highest > largest:
            raise SparseForgeError(f"a code of {format} is beyond {least} to {largest}: round and clamp first")
        return codes.to(torch.int8)
    levels = torch.tensor(format.levels, dtype=codes.dtype, device=codes.device)
    place = torch.searchsorted(levels, codes.contiguous()).clamp_(max=len(levels) - 1)
    if (levels[place] != codes).any():
        raise SparseForgeError(f"a code of {format} is none of {', '.join(map(str, format.levels))}: round first")
    return (place - 8).to(torch.int8)


def unpack(packed: Packed) -> Tensor:
    """The dense weight [..., out, in], bit for bit what was packed (-0.0 excepted); float32 if it is quantised."""
    dense = unpack_codes(packed)
    if packed.scales is None:
        return dense
    scales = scale_values(packed.scales)
    return dense.float() * scales.repeat_interleave(packed.in_features // scales.shape[-1], -1)


def unpack_codes(packed: Packed) -> Tensor:
    """What the values of a packed weight stand for, [..., out, in], without the scales: int8 codes, or levels, if it is
    quantised."""
    values = packed.values
    if values.dtype == torch.uint8 and packed.scales is not None:
        values = int4_codes(values, packed.format)
    if packed.bitmask.shape[-1] == 0:
        return values[..., : packed.in_features].contiguous()
    kept = unpack_mask(packed.bitmask).unflatten(-1, (-1, 4))
    first, second = _as_integers(values).unflatten(-1, (-1, 2)).split(1, -1)
    # no boolean indexing: its shape depends on data, which would stop a graph and wait for a GPU
    is_first = kept.cumsum(-1, dtype=torch.uint8) == 1
    dense = torch.where(kept, torch.where(is_first, first, second), 0).flatten(-2)
    return dense[..., : packed.in_features].contiguous().view(values.dtype)


def int4_codes(values: Tensor, format: Format) -> Tensor:
    """The int8 codes [..., 2 n] of bytes [..., n] that hold two each, or what they stand for."""
    halves = torch.stack((values & 15, values >> 4), -1).flatten(-2)
    if format.levels is None:
        return (halves.view(torch.int8) ^ 8) - 8
    # no table, which a graph would have to hold as a constant: the levels are the bytes of two integers
    first, second = (_bytes_in_one(part) for part in (format.levels[8:], format.levels[:8]))
    eight = torch.where(halves < 8, first, second) >> 8 * (halves & 7).long()
    return (((eight & 255) ^ 128) - 128).to(torch.int8)


def _bytes_in_one(levels: Sequence[int]) -> int:
    return int.from_bytes(bytes(level & 255 for level in levels), "little", signed=True)


def unpack_mask(bitmask: Tensor) -> Tensor:
    """Boolean [..., 8 * bytes] of a bitmask."""
    places = torch.arange(8, device=bitmask.device, dtype=torch.uint8)
    return (bitmask[..., None] >> places).bitwise_and_(1).bool().flatten(-2)


def check_packed(packed: Packed) -> Packed:
    """``packed`` itself, if it is what :func:`pack` or :func:`pack_codes` could have made; for data from files.

    Raises SparseForgeError that says which of shape, dtype, bitmask, codes or scales is wrong.
    """
    values, bitmask, _, scales = check_shapes(packed)
    pairs = bitmask - (bitmask >> 1 & 0x55)  # bits counted two by two, then four by four, in no more bytes
    if ((pairs & 0x33) + (pairs >> 2 & 0x33) != 0x22).any():
        raise SparseForgeError("a group of four in the bitmask has not exactly two bits set: the data is damaged")
    if scales is None:
        return packed
    if (wrong := wrong_scale(scales)) is not None:
        raise SparseForgeError(f"a scale is {wrong}: the data is damaged")
    if values.dtype == torch.int8 and (values == -128).any():
        raise SparseForgeError("a code of the values is -128, which is on no grid: the data is damaged")
    return packed


def check_shapes(packed: Packed) -> Packed:
    """``packed`` itself, if shapes and dtypes fit each other; reads no data."""
    values, bitmask, in_features, scales = packed
    padded = in_features + -in_features % 8
    if bitmask.dtype != torch.uint8:
        raise SparseForgeError(f"the bitmask of a packed weight is uint8, not {bitmask.dtype}")
    sparse, halved = bitmask.shape[-1:] != (0,), values.dtype == torch.uint8 and scales is not None
    if in_features < 1 or values.dim() < 2 or values.shape[-1] * (1 + sparse) * (1 + halved) != padded:
        raise SparseForgeError(f"packed values of shape {tuple(values.shape)} do not belong to {in_features} inputs")
    if sparse and bitmask.shape != (*values.shape[:-1], padded // 8):
        raise SparseForgeError(
            f"a bitmask of shape {tuple(bitmask.shape)} does not belong to values {tuple(values.shape)}"
        )
    if scales is None:
        if not sparse:
            raise SparseForgeError("a packed weight that is dense has scales: it is int8 or int4")
        return packed
    if values.dtype not in (torch.int8, torch.uint8):
        raise SparseForgeError(f"a packed weight with scales has values of int8 or uint8, not {values.dtype}")
    groups = [g for g in GROUPS if not in_features % g] if halved else [None]
    forms = [scales_like(Format(values="int4" if halved else "int8", group=group), in_features) for group in groups]
    if (scales.dtype, scales.shape[-1]) not in forms or scales.shape[:-1] != values.shape[:-1]:
        raise SparseForgeError(
            f"scales of {scales.dtype} {tuple(scales.shape)} do not belong to {values.dtype} values of "
            f"{in_features} inputs"
        )
    return packed


def _as_integers(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_BITS[tensor.element_size()])
