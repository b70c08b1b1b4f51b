"""The GPU's layout of a packed 2:4 weight: pairs of survivors in eight planes, four bits of metadata a group.

One copy serves the GEMV, which picks its inputs by the metadata, and the tensor-core kernel, which expands the pairs:
9/16 of the dense bytes; with codes of 8 bits 5/16, of 4 bits 3/16 and the scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import Format
from sparseforge_fx.kernels.packed import Packed, unpack_mask

PLANES = 8
HALF_TYPES = (torch.bfloat16, torch.float16)
#: dtype of ``Packed.values`` -> bits of a code
BITS_OF_CODES = {torch.int8: 8, torch.uint8: 4}
#: planes of words with codes -> that dtype
CODES_OF_PLANES = {bits // 2: dtype for dtype, bits in BITS_OF_CODES.items()}


def why_not_planes(form: Format) -> str | None:
    """Why the plane layout does not take a format of few bits; None if it does."""
    return f"the plane layout has no kernels for {form}, whose codes stand for levels" if form.levels else None


def to_planes(packed: Packed) -> tuple[Tensor, Tensor]:
    """Repack a two-dimensional weight for the GPU kernels; exact. Works on any device.

    Returns:
        values: [out, 8, W] of the weight's dtype seen as pairs, W = ceil(in / 32): int32 for bfloat16 and float16 (the
            pair's first survivor in the low half), int64 for float32. Group g (inputs 4g to 4g + 3) is word g mod W
            of plane g // W. The first survivor of a pair is the one further left, except where the third and fourth
            of a group survive: those two are swapped, so that a single multiplication makes a byte selector
            out of the metadata (``words.py``). Codes of 8 bits are [out, 4, W] of int32, of 4 bits [out, 2, W]: a
            word holds the pairs of two or four planes, their first survivors in its low half and their second ones in
            its high half, each in the order of the planes.
        meta: int32 [out, W]. Word w holds, for plane p, the place (0 to 3) in its group of the pair's first survivor
            in bits 16 (p // 4) + 2 (p mod 4) and of the second 8 bits further.

    Padding places hold zeros. Scales stay as they are. Raises SparseForgeError for a weight that is not [out, in], not
    2:4, or of values that are neither codes nor of 2 or 4 bytes.
    """
    values, bitmask, in_features, scales = packed
    if values.dim() != 2:
        raise SparseForgeError(f"the plane layout takes a weight [out, in], not one of shape {tuple(packed.shape)}")
    if scales is None and values.element_size() not in (2, 4):
        raise SparseForgeError(f"the plane layout takes 16- and 32-bit weights, not {values.dtype}: convert the weight")
    if bitmask.shape[1] == 0:
        raise SparseForgeError("the plane layout takes 2:4 weights, not dense ones: keep it in rows")
    if (against := why_not_planes(packed.format)) is not None:
        raise SparseForgeError(f"{against}: keep it in rows")
    if values.dtype == torch.uint8:
        values = torch.stack((values & 15, values >> 4), -1).flatten(-2)
    out, words = values.shape[0], -(-in_features // 32)
    present = 2 * bitmask.shape[1]
    kept = unpack_mask(bitmask).view(out, present, 4)
    place = torch.arange(4, device=kept.device, dtype=torch.int32)
    first = torch.where(kept, place, 4).amin(-1)
    second = torch.where(kept, place, -1).amax(-1)
    pairs = values.contiguous().view(out, present, 2)
    swap = first == 2
    first, second = torch.where(swap, second, first), torch.where(swap, first, second)
    pairs = torch.where(swap[..., None], pairs.flip(-1), pairs)
    pad = PLANES * words - present
    pairs = torch.nn.functional.pad(pairs, (0, 0, 0, pad))
    first, second = (torch.nn.functional.pad(t, (0, pad)).view(out, PLANES, words) for t in (first, second))
    second = torch.where(second == first, 1, second)  # padding: a legal pattern
    meta = torch.zeros(out, words, dtype=torch.int64, device=values.device)
    for plane in range(PLANES):
        meta |= (first[:, plane].long() | second[:, plane].long() << 8) << _shift(plane)
    if scales is not None:
        return _codes_to_words(pairs.view(out, PLANES, words, 2), packed.values.dtype), _signed(meta)
    word = torch.int32 if values.element_size() == 2 else torch.int64
    return pairs.contiguous().view(word).view(out, PLANES, words), _signed(meta)


def _codes_to_words(pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """[out, 8, W, 2] of codes -> int32 [out, 4 or 2, W]."""
    bits = BITS_OF_CODES[dtype]
    several = pairs.unflatten(1, (bits // 2, 16 // bits)).long() & (1 << bits) - 1
    word = torch.zeros_like(several[:, :, 0, :, 0])
    for plane in range(16 // bits):
        word |= several[:, :, plane, :, 0] << bits * plane | several[:, :, plane, :, 1] << 16 + bits * plane
    return _signed(word)


def _words_to_codes(words: Tensor, dtype: torch.dtype) -> Tensor:
    """The way back: int8 [out, 8, W, 2], in [-8, 7] for codes of 4 bits."""
    bits = BITS_OF_CODES[dtype]
    shifts = torch.arange(16 // bits, device=words.device, dtype=torch.int32)[None, None, :, None] * bits
    fields = torch.stack([words[:, :, None] >> shifts + half for half in (0, 16)], -1).flatten(1, 2)
    sign = 1 << bits - 1
    return (((fields & 2 * sign - 1) ^ sign) - sign).to(torch.int8)


def from_planes(
    values: Tensor, meta: Tensor, in_features: int, dtype: torch.dtype = torch.bfloat16, scales: Tensor | None = None
) -> Packed:
    """The packed weight that :func:`to_planes` took, bit for bit. ``dtype`` is that of its values.

    Raises SparseForgeError if shapes, ``in_features`` and ``dtype`` do not belong together.
    """
    check_planes(values, meta, in_features)
    out = values.shape[0]
    groups = (in_features + -in_features % 8) // 4
    first, second = places(meta)
    pairs = _pairs(values, dtype).view(out, PLANES * meta.shape[1], 2)[:, :groups]
    first, second = first[:, :groups], second[:, :groups]
    pairs = torch.where((first > second)[..., None], pairs.flip(-1), pairs)
    bits = (1 << first | 1 << second).view(out, groups // 2, 2)
    bitmask = (bits[..., 0] | bits[..., 1] << 4).to(torch.uint8)
    kept = pairs.reshape(out, 2 * groups)
    if dtype == torch.uint8:
        low, high = kept.view(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
        kept = low & 15 | high << 4
    return Packed(kept, bitmask, in_features, scales)


def planes_to_dense(
    values: Tensor, meta: Tensor, in_features: int, dtype: torch.dtype, scales: Tensor | None = None
) -> Tensor:
    """The dense weight [out, in] in plain torch ops: the reference of every kernel on this layout.

    ``dtype`` is the weight's; codes times their scales are rounded to it once.
    """
    out, width = values.shape[0], 32 * meta.shape[1]
    stored = dtype if scales is None else CODES_OF_PLANES[values.shape[1]]
    pairs = _pairs(values, stored).view(out, PLANES * meta.shape[1], 2)
    index = torch.stack(places(meta), -1).long()
    groups = torch.zeros(*pairs.shape[:2], 4, dtype=pairs.dtype, device=values.device).scatter_(-1, index, pairs)
    dense = groups.view(out, width)[:, :in_features].contiguous()
    if scales is None:
        return dense
    return (dense.float() * scales.float().repeat_interleave(in_features // scales.shape[1], 1)).to(dtype)


def _pairs(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Words of planes -> pairs [out, 8, W, 2] in the dtype of ``Packed.values``; codes of 4 bits in int8."""
    if dtype in BITS_OF_CODES:
        if CODES_OF_PLANES.get(values.shape[1]) != dtype:
            raise SparseForgeError(
                f"{values.shape[1]} planes do not hold codes in {dtype}: name the weight's own dtype"
            )
        return _words_to_codes(values, dtype)
    if 2 * dtype.itemsize != values.element_size():
        raise SparseForgeError(f"words of {values.dtype} do not hold pairs of {dtype}: name the weight's own dtype")
    return values.contiguous().view(dtype).view(*values.shape, 2)


def places(meta: Tensor) -> tuple[Tensor, Tensor]:
    """Where the first and the second survivor of each pair stand in their group: two int32 [out, 8 W]."""
    fields = torch.stack([meta >> _shift(p) for p in range(PLANES)], dim=1)
    return (fields & 3).flatten(1), (fields >> 8 & 3).flatten(1)


def check_planes(values: Tensor, meta: Tensor, in_features: int) -> None:
    """Raises SparseForgeError if the three do not belong together."""
    words = -(-in_features // 32)
    held = values.dim() == 3 and (values.shape[1] == PLANES or values.shape[1] in CODES_OF_PLANES)
    if not held or values.shape[2] != words:
        raise SparseForgeError(
            f"values of shape {tuple(values.shape)} are no planes of {in_features} inputs: make them with to_planes"
        )
    if meta.dtype != torch.int32 or meta.shape != (values.shape[0], words):
        raise SparseForgeError(
            f"metadata {meta.dtype} {tuple(meta.shape)} does not belong to values {tuple(values.shape)}: "
            "make both with to_planes"
        )


def _shift(plane: int) -> int:
    return 16 * (plane // 4) + 2 * (plane % 4)


def _signed(words: Tensor) -> Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
