"""2:4 products on the sparse tensor cores of sm_80 to sm_89 through the CUTLASS kernels inside PyTorch: prefill.

PyTorch has them for no newer device; there :mod:`sparseforge_fx.kernels.gpu.cusparselt` serves.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import Format
from sparseforge_fx.kernels.activations import ACTIVATIONS
from sparseforge_fx.kernels.gpu.planes import HALF_TYPES
from sparseforge_fx.kernels.packed import Packed, pack, unpack

OUT_MULTIPLE, IN_MULTIPLE = 32, 64  # of a 16-bit weight
_LINES = 8  # the dense operand's rows are padded to a multiple of this


@cache
def available(device: torch.device) -> bool:
    """Whether PyTorch has CUTLASS kernels for this device."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and (8, 0) <= torch.cuda.get_device_capability(device) < (9, 0)
    )


def why_not(out_features: int, in_features: int, dtype: torch.dtype, device: torch.device, form: Format) -> str | None:
    """Why these kernels cannot take such a 2:4 weight [out, in]; None if they can."""
    if not available(device):
        return f"PyTorch has no CUTLASS kernels for 2:4 weights on {device}"
    return _misfit(out_features, in_features, dtype)


def _misfit(out_features: int, in_features: int, dtype: torch.dtype) -> str | None:
    if dtype not in HALF_TYPES:
        return f"CUTLASS is used for bfloat16 and float16, not {dtype}"
    if out_features % OUT_MULTIPLE or in_features % IN_MULTIPLE:
        return f"CUTLASS takes multiples of {OUT_MULTIPLE} x {IN_MULTIPLE}, not {out_features} x {in_features}"
    return None


def as_cutlass(packed: Packed) -> tuple[Tensor, Tensor]:
    """The layout ``cutlass``: survivors [out, in/2] and two-bit places, int16 [out, in/16], in CUTLASS's order.

    Raises SparseForgeError for sides and types that the kernels do not take.
    """
    out, width = packed.shape
    if reason := _misfit(out, width, packed.values.dtype):
        raise SparseForgeError(f"{reason}: use the plane layout or keep this weight dense")
    return sparse_semi_structured_from_dense_cutlass(unpack(packed))


def cutlass_dense(values: Tensor, meta: Tensor, in_features: int, _: Tensor | None = None) -> Tensor:
    """The dense weight [out, in] of a weight from :func:`as_cutlass`."""
    return sparse_semi_structured_to_dense_cutlass(values, meta)


def from_cutlass(values: Tensor, meta: Tensor, in_features: int, _: Tensor | None = None) -> Packed:
    """The packed weight that :func:`as_cutlass` took."""
    return pack(cutlass_dense(values, meta, in_features))


def cutlass_product(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    in_features: int,
    bias: Tensor | None,
    activation: str,
    _: Tensor | None = None,
) -> Tensor:
    """act(x W^T + b): x [rows, in] in the weight's dtype, bias [out]; [rows, out]."""
    rows = x.shape[0]
    if rows == 0:
        y = x.new_empty(0, values.shape[0])
    else:
        turned = F.pad(x, (0, 0, 0, -rows % _LINES)).t()
        if bias is None:
            y = torch._sparse_semi_structured_mm(values, meta, turned)
        else:
            y = torch._sparse_semi_structured_addmm(bias, values, meta, turned)
        y = y.t()[:rows].contiguous()
    return ACTIVATIONS[activation].forward(y)
