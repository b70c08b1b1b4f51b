"""The packed 2:4 format: the survivors of every group of four, and one bit per weight that says where they stood.

Neutral of any backend and what is written to disk: 9/16 of the bytes of a dense bfloat16 weight. Each kernel
converts it, at load time, to the layout that it reads fastest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.pattern import TWO_FOUR, check_pattern, hard_mask

FORMAT_VERSION = 1
METHOD = "sparseforge"  # quant_method in config.json of a checkpoint in this format
#: what kernels multiply by; others can be packed and unpacked
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # same size in bytes -> integers


class Packed(NamedTuple):
    """A weight [..., out, in] of at most two non-zeros in every four along ``in``.

    Attributes:
        values: [..., out, P/2], P = ``in`` rounded up to a multiple of 8; the two survivors of each group, in order.
        bitmask: uint8 [..., out, P/8]; bit k of byte j is set where element 8 j + k survives. Every group has exactly
            two bits: one with fewer non-zeros keeps zeros at its earliest free places.
        in_features: ``in``. Places beyond it hold zeros; a kernel must not read its input there.
    """

    values: Tensor
    bitmask: Tensor
    in_features: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense weight."""
        return torch.Size((*self.values.shape[:-1], self.in_features))

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.values.nbytes + self.bitmask.nbytes


def packed_names(weight: str) -> tuple[str, str]:
    """Names of the two tensors of a packed weight by the weight's own: in files, modules and graphs, in any layout."""
    return f"{weight}_values", f"{weight}_bitmask"


def weight_of_values(values: str) -> str:
    """The weight's name by that of its values."""
    return values.removesuffix("_values")


#: of a module's weight
VALUES, BITMASK = packed_names("weight")


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


def unpack(packed: Packed) -> Tensor:
    """The dense weight [..., out, in], bit for bit what was packed (-0.0 excepted)."""
    kept = unpack_mask(packed.bitmask).unflatten(-1, (-1, 4))
    first, second = _as_integers(packed.values).unflatten(-1, (-1, 2)).split(1, -1)
    # no boolean indexing: its shape depends on data, which would stop a graph and wait for a GPU
    is_first = kept.cumsum(-1, dtype=torch.uint8) == 1
    dense = torch.where(kept, torch.where(is_first, first, second), 0).flatten(-2)
    return dense[..., : packed.in_features].contiguous().view(packed.values.dtype)


def unpack_mask(bitmask: Tensor) -> Tensor:
    """Boolean [..., 8 * bytes] of a bitmask."""
    places = torch.arange(8, device=bitmask.device, dtype=torch.uint8)
    return (bitmask[..., None] >> places).bitwise_and_(1).bool().flatten(-2)


def check_packed(packed: Packed) -> Packed:
    """``packed`` itself, if it is what :func:`pack` could have made; for data from files.

    Raises SparseForgeError that says which of shape, dtype, or bitmask is wrong.
    """
    bitmask = check_shapes(packed).bitmask
    pairs = bitmask - (bitmask >> 1 & 0x55)  # bits counted two by two, then four by four, in no more bytes
    if ((pairs & 0x33) + (pairs >> 2 & 0x33) != 0x22).any():
        raise SparseForgeError("a group of four in the bitmask has not exactly two bits set: the data is damaged")
    return packed


def check_shapes(packed: Packed) -> Packed:
    """``packed`` itself, if shapes and dtypes fit each other; reads no data."""
    values, bitmask, in_features = packed
    padded = in_features + -in_features % 8
    if bitmask.dtype != torch.uint8:
        raise SparseForgeError(f"the bitmask of a packed weight is uint8, not {bitmask.dtype}")
    if in_features < 1 or values.dim() < 2 or values.shape[-1] != padded // 2:
        raise SparseForgeError(f"packed values of shape {tuple(values.shape)} do not belong to {in_features} inputs")
    if bitmask.shape != (*values.shape[:-1], padded // 8):
        raise SparseForgeError(
            f"a bitmask of shape {tuple(bitmask.shape)} does not belong to values {tuple(values.shape)}"
        )
    return packed


def _as_integers(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_BITS[tensor.element_size()])
