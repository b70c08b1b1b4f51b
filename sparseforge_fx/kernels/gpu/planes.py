"""The GPU's layout of a packed 2:4 weight: pairs of survivors in eight planes, four bits of metadata a group.

One copy serves the GEMV, which picks its inputs by the metadata, and the tensor-core kernel, which expands the pairs:
9/16 of the dense bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.packed import Packed, unpack_mask

PLANES = 8
HALF_TYPES = (torch.bfloat16, torch.float16)


def to_planes(packed: Packed) -> tuple[Tensor, Tensor]:
    """Repack a two-dimensional weight for the GPU kernels; exact. Works on any device.

    Returns:
        values: [out, 8, W] of the weight's dtype seen as pairs, W = ceil(in / 32): int32 for bfloat16 and float16 (the
            pair's first survivor in the low half), int64 for float32. Group g (inputs 4g to 4g + 3) is word g mod W
            of plane g // W. The first survivor of a pair is the one further left, except where the third and fourth
            of a group survive: those two are swapped, so that a single multiplication makes a byte selector
            out of the metadata (``words.py``).
        meta: int32 [out, W]. Word w holds, for plane p, the place (0 to 3) in its group of the pair's first survivor
            in bits 16 (p // 4) + 2 (p mod 4) and of the second 8 bits further.

    Padding places hold zeros. Raises SparseForgeError for a weight that is not [out, in], or not of 2 or 4 bytes.
    """
    values, bitmask, in_features, _ = packed
    if values.dim() != 2:
        raise SparseForgeError(f"the plane layout takes a weight [out, in], not one of shape {tuple(packed.shape)}")
    if values.element_size() not in (2, 4):
        raise SparseForgeError(f"the plane layout takes 16- and 32-bit weights, not {values.dtype}: convert the weight")
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
    word = torch.int32 if values.element_size() == 2 else torch.int64
    return pairs.contiguous().view(word).view(out, PLANES, words), _signed(meta)


def from_planes(values: Tensor, meta: Tensor, in_features: int, dtype: torch.dtype = torch.bfloat16) -> Packed:
    """The packed weight that :func:`to_planes` took, bit for bit. ``dtype`` is the weight's.

    Raises SparseForgeError if shapes, ``in_features`` and ``dtype`` do not belong together.
    """
    check_planes(values, meta, in_features)
    if 2 * dtype.itemsize != values.element_size():
        raise SparseForgeError(f"words of {values.dtype} do not hold pairs of {dtype}: name the weight's own dtype")
    out = values.shape[0]
    groups = (in_features + -in_features % 8) // 4
    first, second = places(meta)
    pairs = values.contiguous().view(dtype).view(out, PLANES * meta.shape[1], 2)[:, :groups]
    first, second = first[:, :groups], second[:, :groups]
    pairs = torch.where((first > second)[..., None], pairs.flip(-1), pairs)
    bits = (1 << first | 1 << second).view(out, groups // 2, 2)
    bitmask = (bits[..., 0] | bits[..., 1] << 4).to(torch.uint8)
    return Packed(pairs.reshape(out, 2 * groups), bitmask, in_features)


def planes_to_dense(values: Tensor, meta: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """The dense weight [out, in] in plain torch ops: the reference of every kernel on this layout."""
    out = values.shape[0]
    pairs = values.contiguous().view(dtype).view(out, PLANES * meta.shape[1], 2)
    index = torch.stack(places(meta), -1).long()
    groups = torch.zeros(*pairs.shape[:2], 4, dtype=dtype, device=values.device).scatter_(-1, index, pairs)
    return groups.flatten(1)[:, :in_features].contiguous()


def places(meta: Tensor) -> tuple[Tensor, Tensor]:
    """Where the first and the second survivor of each pair stand in their group: two int32 [out, 8 W]."""
    fields = torch.stack([meta >> _shift(p) for p in range(PLANES)], dim=1)
    return (fields & 3).flatten(1), (fields >> 8 & 3).flatten(1)


def check_planes(values: Tensor, meta: Tensor, in_features: int) -> None:
    """Raises SparseForgeError if the three do not belong together."""
    words = -(-in_features // 32)
    if values.dim() != 3 or values.shape[1:] != (PLANES, words):
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
