"""2:4 products on sparse tensor cores through cuSPARSELt: prefill, where the arithmetic decides.

The weight is compressed at load time (the blob's layout belongs to the library's version: it is never saved), and the
algorithm is searched once per device, shape and bucket of rows; the call itself is plain aten.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.activations import ACTIVATIONS
from sparseforge_fx.kernels.gpu.planes import HALF_TYPES
from sparseforge_fx.kernels.packed import Packed, pack, unpack

MULTIPLE = 16  # of both sides of a 16-bit weight
_LINES = 8  # the dense operand's rows are padded to a multiple of this
_algorithms: dict[tuple[torch.device, torch.dtype, int, int, int], int] = {}


@cache
def available(device: torch.device) -> bool:
    """Whether this build of PyTorch and this device have cuSPARSELt."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.backends.cusparselt.is_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def why_not(out_features: int, in_features: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why cuSPARSELt cannot take such a 2:4 weight [out, in]; None if it can."""
    if not available(device):
        return f"cuSPARSELt is not available on {device} in this build of PyTorch"
    if dtype not in HALF_TYPES:
        return f"cuSPARSELt is used for bfloat16 and float16, not {dtype}"
    if out_features % MULTIPLE or in_features % MULTIPLE:
        return f"cuSPARSELt takes sides that are multiples of {MULTIPLE}, not {out_features} x {in_features}"
    return None


def as_blob(packed: Packed) -> tuple[Tensor, Tensor]:
    """The layout ``cusparselt``: the library's blob, seen as [out, 9/16 in], and no metadata beside it.

    Outside any graph: the operator that compresses has no fake kernel. Raises SparseForgeError with :func:`why_not`.
    """
    out, width = packed.shape
    if reason := why_not(out, width, packed.values.dtype, packed.values.device):
        raise SparseForgeError(f"{reason}: use the plane layout or keep this weight dense")
    blob = torch._cslt_compress(unpack(packed))
    # the product reads the number of outputs from the first side
    return blob.view(out, -1), packed.bitmask.new_empty(out, 0)


def blob_dense(values: Tensor, meta: Tensor, in_features: int) -> Tensor:
    """The dense weight [out, in] of a weight from :func:`as_blob`: its product with the unit matrix, which is exact."""
    unit = torch.eye(in_features, dtype=values.dtype, device=values.device)
    return blob_product(unit, values, meta, in_features, None, "none").t().contiguous()


def from_blob(values: Tensor, meta: Tensor, in_features: int) -> Packed:
    """The packed weight that :func:`as_blob` took."""
    return pack(blob_dense(values, meta, in_features))


def lines_bucket(m: int) -> int:
    """Rows of x that share one searched algorithm: the next power of two, at least 8."""
    return max(_LINES, 1 << (m - 1).bit_length())


def search(blob: Tensor, in_features: int, m: int) -> int:
    """The fastest algorithm for ``m`` rows of x, searched once per device, shape and bucket, on random inputs.

    The default one while a CUDA graph is being captured, where nothing can be timed.
    """
    lines = lines_bucket(m)
    key = (blob.device, blob.dtype, blob.shape[0], in_features, lines)
    if key not in _algorithms:
        if blob.is_cuda and torch.cuda.is_current_stream_capturing():
            return 0
        x = torch.randn(lines, in_features, device=blob.device, dtype=blob.dtype)
        _algorithms[key] = int(torch._cslt_sparse_mm_search(blob, x.t(), transpose_result=True))
    return _algorithms[key]


def tune(values: Tensor, meta: Tensor, in_features: int, m: int) -> None:
    """:func:`search`, before the product is timed or captured."""
    search(values, in_features, m)


def linear(x: Tensor, blob: Tensor, algorithm: int = 0, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b: x [rows, in] in the weight's dtype, blob from :func:`as_blob`, bias [out]; y [rows, out]."""
    m = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -m % _LINES))
    return torch._cslt_sparse_mm(blob, padded.t(), bias=bias, alg_id=algorithm, transpose_result=True)[:m]


def blob_product(
    x: Tensor, values: Tensor, meta: Tensor, in_features: int, bias: Tensor | None, activation: str
) -> Tensor:
    """act(x W^T + b) by the searched algorithm: x [rows, in] in the weight's dtype, bias [out]; [rows, out]."""
    m = x.shape[0]
    y = x.new_empty(0, values.shape[0]) if m == 0 else linear(x, values, search(values, in_features, m), bias)
    return ACTIVATIONS[activation].forward(y)
