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
from sparseforge_fx.kernels.planes import HALF_TYPES

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


def why_not(weight: Tensor) -> str | None:
    """Why cuSPARSELt cannot take this dense 2:4 weight [out, in]; None if it can."""
    if not available(weight.device):
        return f"cuSPARSELt is not available on {weight.device} in this build of PyTorch"
    if weight.dtype not in HALF_TYPES:
        return f"cuSPARSELt is used for bfloat16 and float16, not {weight.dtype}"
    if weight.dim() != 2 or weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE:
        return f"cuSPARSELt takes sides that are multiples of {MULTIPLE}, not {tuple(weight.shape)}"
    return None


def compress(weight: Tensor) -> Tensor:
    """cuSPARSELt's blob of a dense 2:4 weight [out, in]. Outside any graph: the operator has no fake kernel.

    Raises SparseForgeError with :func:`why_not`.
    """
    reason = why_not(weight)
    if reason is not None:
        raise SparseForgeError(f"{reason}: use the plane layout or keep this weight dense")
    blob = torch._cslt_compress(weight.detach().contiguous())
    return blob.view(weight.shape[0], -1)  # the product reads the number of outputs from the first side


def lines_bucket(m: int) -> int:
    """Rows of x that share one searched algorithm: the next power of two, at least 8."""
    return max(_LINES, 1 << (m - 1).bit_length())


def search(blob: Tensor, out_features: int, in_features: int, m: int, dtype: torch.dtype) -> int:
    """The fastest algorithm for ``m`` rows of x, searched once per device, shape and bucket, on random inputs."""
    lines = lines_bucket(m)
    key = (blob.device, dtype, out_features, in_features, lines)
    if key not in _algorithms:
        x = torch.randn(lines, in_features, device=blob.device, dtype=dtype)
        _algorithms[key] = int(torch._cslt_sparse_mm_search(blob, x.t(), transpose_result=True))
    return _algorithms[key]


def linear(x: Tensor, blob: Tensor, algorithm: int = 0, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b: x [..., in] in the weight's dtype, ``blob`` from :func:`compress`, bias [out]; y [..., out]."""
    lines = x.reshape(-1, x.shape[-1])
    m = lines.shape[0]
    padded = F.pad(lines, (0, 0, 0, -m % _LINES))
    y = torch._cslt_sparse_mm(blob, padded.t(), bias=bias, alg_id=algorithm, transpose_result=True)
    return y[:m].view(*x.shape[:-1], y.shape[-1])
