"""2:4 products on sparse tensor cores through cuSPARSELt: prefill, where the arithmetic decides.

The weight is compressed at load time (the blob's layout belongs to the library's version: it is never saved), and the
algorithm is searched once per device, shape and bucket of rows; the call itself is plain aten. Weights of 8-bit codes
meet rows of x that are rounded to 8 bits, one scale a row: integers are summed exactly.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import Format
from sparseforge_fx.kernels.activations import ACTIVATIONS
from sparseforge_fx.kernels.gpu.eight_bits import finish_rows, round_rows
from sparseforge_fx.kernels.gpu.planes import HALF_TYPES
from sparseforge_fx.kernels.packed import Packed, pack, unpack_codes

#: this version, on this capability, with a side below this: it stopped an H200 with an illegal instruction
BROKEN = (800, (9, 0), 4096)
MULTIPLE = {2: 16, 1: 32}  # bytes of a value -> of both sides of a weight
_LINES = {2: 8, 1: 16}  # and what the dense operand's rows are padded to a multiple of
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


@cache
def _stack(device: torch.device) -> tuple[int | None, tuple[int, int]]:
    """Version of the library and capability of the device."""
    if device.type != "cuda":
        return None, (0, 0)
    return torch.backends.cusparselt.version(), torch.cuda.get_device_capability(device)


def why_not(out_features: int, in_features: int, dtype: torch.dtype, device: torch.device, form: Format) -> str | None:
    """Why cuSPARSELt cannot take such a 2:4 weight [out, in] of a model in ``dtype``; None if it can."""
    if not available(device):
        return f"cuSPARSELt is not available on {device} in this build of PyTorch"
    if dtype not in HALF_TYPES:
        return f"cuSPARSELt is used for bfloat16 and float16, not {dtype}"
    version, capability, least = BROKEN
    if min(out_features, in_features) < least and _stack(device) == (version, capability):
        return (
            f"cuSPARSELt {version // 100 / 10} stops GPUs of compute capability 9.0 with sides below {least}, and this "
            f"weight is {out_features} x {in_features}"
        )
    multiple = MULTIPLE[1 if form.is_quantized else 2]
    if out_features % multiple or in_features % multiple:
        return f"cuSPARSELt takes sides that are multiples of {multiple}, not {out_features} x {in_features}"
    return None


def as_blob(packed: Packed) -> tuple[Tensor, Tensor]:
    """The layout ``cusparselt``: the library's blob, seen as [out, 9/16 in], or 10/16 for int8, and no metadata beside
    it.

    Outside any graph: the operator that compresses has no fake kernel. Raises SparseForgeError with :func:`why_not`.
    """
    out, width = packed.shape
    model = packed.values.dtype if packed.scales is None else HALF_TYPES[0]
    if reason := why_not(out, width, model, packed.values.device, packed.format):
        raise SparseForgeError(f"{reason}: use the plane layout or keep this weight dense")
    blob = torch._cslt_compress(unpack_codes(packed))
    # the product reads the number of outputs from the first side
    return blob.view(out, -1), packed.bitmask.new_empty(out, 0)


def blob_dense(values: Tensor, meta: Tensor, in_features: int, scales: Tensor | None = None) -> Tensor:
    """The dense weight [out, in] of a weight from :func:`as_blob`: its product with the unit matrix, which is exact;
    float32 where there are scales."""
    stored = _stored(values, in_features)
    return stored if scales is None else stored.float() * scales


def from_blob(values: Tensor, meta: Tensor, in_features: int, scales: Tensor | None = None) -> Packed:
    """The packed weight that :func:`as_blob` took."""
    return pack(_stored(values, in_features))._replace(scales=scales)


def _stored(blob: Tensor, in_features: int) -> Tensor:
    unit = torch.eye(in_features, dtype=blob.dtype, device=blob.device)
    return linear(unit, blob, search(blob, in_features, in_features)).t().contiguous()


def lines_bucket(m: int, value_bytes: int = 2) -> int:
    """Rows of x that share one searched algorithm: the next power of two, at least 8, or 16 for int8."""
    return max(_LINES[value_bytes], 1 << (m - 1).bit_length())


def search(blob: Tensor, in_features: int, m: int) -> int:
    """The fastest algorithm for ``m`` rows of x, searched once per device, shape and bucket, on random inputs.

    The default one while a CUDA graph is being captured, where nothing can be timed.
    """
    lines = lines_bucket(m, blob.element_size())
    key = (blob.device, blob.dtype, blob.shape[0], in_features, lines)
    if key not in _algorithms:
        if blob.is_cuda and torch.cuda.is_current_stream_capturing():
            return 0
        x = torch.randn(lines, in_features, device=blob.device).to(blob.dtype)
        product = None if blob.dtype != torch.int8 else torch.bfloat16
        found = torch._cslt_sparse_mm_search(blob, x.t(), out_dtype=product, transpose_result=True)
        _algorithms[key] = int(found)
    return _algorithms[key]


def tune(x: Tensor, values: Tensor, meta: Tensor, in_features: int, scales: Tensor | None) -> None:
    """:func:`search`, before the product is timed or captured."""
    search(values, in_features, len(x))


def linear(
    x: Tensor,
    blob: Tensor,
    algorithm: int = 0,
    bias: Tensor | None = None,
    alpha: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = alpha x W^T + b: x [rows, in] in the weight's dtype, blob from :func:`as_blob`, bias and alpha [out].

    Returns y [rows, out], in ``dtype`` if that is given (integers can be summed to a 16-bit floating one)."""
    m = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -m % _LINES[blob.element_size()]))
    y = torch._cslt_sparse_mm(
        blob, padded.t(), bias=bias, alpha=alpha, out_dtype=dtype, alg_id=algorithm, transpose_result=True
    )
    return y[:m]


def blob_product(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    in_features: int,
    bias: Tensor | None,
    activation: str,
    scales: Tensor | None = None,
) -> Tensor:
    """act(x W^T + b) by the searched algorithm: x [rows, in] in the weight's dtype, or any half one where that is int8,
    bias [out]; [rows, out]."""
    m = x.shape[0]
    if scales is not None and x.dtype not in HALF_TYPES:
        return blob_product(x.bfloat16(), values, meta, in_features, None, "none", scales).to(x.dtype)
    if m == 0:
        return ACTIVATIONS[activation].forward(x.new_empty(0, values.shape[0]))
    algorithm = search(values, in_features, m)
    if scales is None:
        return ACTIVATIONS[activation].forward(linear(x, values, algorithm, bias))
    codes, factors = round_rows(x)
    sums = linear(codes, values, algorithm, None, scales.flatten(), x.dtype)
    return finish_rows(sums, factors, bias, activation)
