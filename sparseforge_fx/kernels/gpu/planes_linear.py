"""``sparseforge::planes_linear``: act(x W^T + b) for a 2:4 weight in the GPU's plane layout.

At most 4 rows of x: GEMV, or tensor cores, which more rows always take. More than 128, or float32: the weight is
expanded and the dense GEMM runs. Codes of 8 or 4 bits become 16-bit numbers in registers; x is never rounded. On a CPU
the same kernels run in Triton's interpreter if TRITON_INTERPRET=1 was set before Triton was imported, and plain torch
otherwise. Registered through ``torch.library.triton_op``: torch.compile sees the kernels.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.activations import ACTIVATIONS
from sparseforge_fx.kernels.gpu.planes import (
    BITS_OF_CODES,
    CODES_OF_PLANES,
    HALF_TYPES,
    check_planes,
    planes_to_dense,
    to_planes,
)
from sparseforge_fx.kernels.gpu.tiles import DECODE_ROWS, Tile, bucket, capability_of, legal_tiles, pick, remember
from sparseforge_fx.kernels.gpu.timing import Replays
from sparseforge_fx.kernels.packed import Packed


def planes_linear(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    in_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    scales: Tensor | None = None,
) -> Tensor:
    """y = act(x W^T + b), sums in float32 in an order that does not change from run to run.

    Args:
        x: [..., in], bfloat16, float16 or float32; like the weight, if that has no scales.
        values, meta: from :func:`~sparseforge_fx.kernels.gpu.planes.to_planes`.
        in_features: ``in``.
        bias: [out] or None.
        activation: none, relu, gelu, gelu_tanh, silu; or silu_mul: silu of the first half of the outputs times the
            second half.
        scales: those of ``Packed``, if the planes hold codes. Between 5 and 128 rows those of 4-bit codes are rounded
            to x's dtype, and so is the weight.

    Returns [..., out], [..., out/2] for silu_mul, in x's dtype. Raises SparseForgeError if the arguments do not belong
    together.
    """
    check_planes(values, meta, in_features)
    if x.shape[-1] != in_features:
        raise SparseForgeError(f"x has {x.shape[-1]} inputs and the packed weight {in_features}: they must be equal")
    fits = 2 * x.element_size() == values.element_size() if scales is None else values.dtype == torch.int32
    if not fits or not x.is_floating_point():
        raise SparseForgeError(
            f"x is {x.dtype} and the packed words are {values.dtype}: convert x to the weight's dtype"
        )
    if activation not in ACTIVATIONS:
        raise SparseForgeError(f"unknown activation {activation!r}: choose from {', '.join(ACTIVATIONS)}")
    if activation == "silu_mul" and values.shape[0] % 2:
        raise SparseForgeError(f"silu_mul takes an even number of outputs, not {values.shape[0]}: pad both halves")
    if bias is not None and bias.shape != values.shape[:1]:
        raise SparseForgeError(f"a bias of shape {tuple(bias.shape)} does not belong to {values.shape[0]} outputs")
    return torch.ops.sparseforge.planes_linear(x, values, meta, in_features, bias, activation, scales=scales)


@torch.library.triton_op("sparseforge::planes_linear", mutates_args=())
def _planes_linear(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    in_features: int,
    bias: Tensor | None,
    activation: str,
    rows: int = 0,
    scales: Tensor | None = None,
) -> Tensor:
    """``rows``: 0, or the most rows that x will have in a graph where their number is symbolic; 1 is exact."""
    lines = x.reshape(-1, x.shape[-1])
    m = rows or lines.shape[0]
    outputs = values.shape[0] // 2 if activation == "silu_mul" else values.shape[0]
    if m == 0 or values.shape[0] == 0:
        y = x.new_empty(lines.shape[0], outputs)
    elif not kernels_run(x) or x.dtype not in HALF_TYPES:
        y = _dense(lines, planes_to_dense(values, meta, in_features, x.dtype, scales), bias, activation)
    elif m > DECODE_ROWS:
        y = _dense(lines, expand_planes(values, meta, in_features, x.dtype, scales), bias, activation)
    else:
        tile = pick(x.device, values.shape[0], values.shape[2], bucket(m), x.dtype, bits_of(values, scales))
        y = launch(lines, values, meta, bias, activation, tile, bucket(m), scales)
    return y.view(*x.shape[:-1], outputs)


def as_planes(packed: Packed) -> tuple[Tensor, Tensor]:
    """The layout ``planes`` of :func:`~sparseforge_fx.kernels.sparse_linear.sparse_linear`: pairs in the weight's own
    dtype, [out, 8, 2 W], and metadata."""
    words, meta = to_planes(packed)
    return words.view(packed.values.dtype), meta


def as_words(values: Tensor) -> Tensor:
    """Pairs in the weight's dtype as the integers that the kernels read."""
    return values.view(torch.int64 if values.element_size() == 4 else torch.int32)


def bits_of(values: Tensor, scales: Tensor | None) -> int:
    """Of one survivor in words of planes: 4, 8, or 16 where there are no scales."""
    return 16 if scales is None else BITS_OF_CODES[CODES_OF_PLANES[values.shape[1]]]


def planes_dense(values: Tensor, meta: Tensor, in_features: int, scales: Tensor | None = None) -> Tensor:
    """The dense weight [out, in] of a weight from :func:`as_planes`; float32 where there are scales."""
    if scales is not None:
        return planes_to_dense(as_words(values), meta, in_features, torch.float32, scales)
    expand = expand_planes if values.is_cuda and values.dtype in HALF_TYPES else planes_to_dense
    return expand(as_words(values), meta, in_features, values.dtype)


def planes_product(x: Tensor, values: Tensor, *further: Any) -> Tensor:
    """:func:`planes_linear` of a weight from :func:`as_planes`."""
    return planes_linear(x, as_words(values), *further)


def _dense(lines: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return ACTIVATIONS[activation].forward(F.linear(lines, weight, None if bias is None else bias.to(lines.dtype)))


def kernels_run(x: Tensor) -> bool:
    """Whether Triton's kernels take it, on its device or in the interpreter."""
    if x.device.type == "cpu":
        return find_spec("triton") is not None and _interpreted()
    if find_spec("triton") is None:
        raise SparseForgeError(f"2:4 weights on {x.device} need Triton, which is not installed: pip install triton")
    return True


@cache
def _interpreted() -> bool:
    from sparseforge_fx.kernels.gpu.triton_gemv import gemv

    return type(gemv).__name__ == "InterpretedFunction"


@cache
def _asm(device_type: str) -> bool:
    return device_type == "cuda" and torch.version.hip is None and not _interpreted()


def launch(
    lines: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    activation: str,
    tile: Tile,
    most: int = 0,
    scales: Tensor | None = None,
) -> Tensor:
    """One product by the kernel and the tile given: ``lines`` [m, in], with m at most 4 for the GEMV.

    ``most``: the bucket of m where m is symbolic. The rest as for :func:`planes_linear`.
    """
    from sparseforge_fx.kernels.gpu.triton_dot import dot
    from sparseforge_fx.kernels.gpu.triton_gemv import gemv, reduce_splits

    m, rows, words = lines.shape[0], values.shape[0], values.shape[2]
    if lines.shape[1] % 8:  # a row of x must start at 16 bytes; the zeros meet padding of the weight
        lines = F.pad(lines, (0, -lines.shape[1] % 8))
    lines = lines.contiguous()
    width = lines.shape[1]
    outputs = rows // 2 if activation == "silu_mul" else rows
    unit = next(u for u in (4, 2, 1) if words % u == 0)
    parts = tile.split > 1 or (tile.lines > 0 and outputs < rows)
    fixed: dict[str, Any] = {
        "BN": tile.rows,
        "BW": tile.words,
        "UNIT": unit,
        # without tails nothing is masked: every word and every input is there
        "TAIL": bool(words % tile.words or width != 32 * words),
        "PARTS": parts,
        "HAS_BIAS": bias is not None,
        "ACTIVATION": activation,
        "ASM": _asm(lines.device.type),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    fixed |= _codes(values, scales, width)
    y = lines.new_empty(m, outputs)
    target = lines.new_empty(tile.split, m, rows, dtype=torch.float32) if parts else y
    there, factors = (y if t is None else t for t in (bias, scales))  # a pointer that is never read
    if tile.lines:
        grid = (-(-rows // tile.rows), tile.split, -(-m // tile.lines))
        _kernel(dot)[grid](
            lines, values, meta, factors, there, target, m, rows, words // unit, width // 8,
            BM=tile.lines, PAIRS=tile.pairs, **fixed,
        )  # fmt: skip
    else:
        _kernel(gemv)[(-(-(rows if parts else outputs) // tile.rows), tile.split)](
            lines, values, meta, factors, there, target, outputs, words // unit, width // 8,
            ROWS=most or bucket(m), **fixed,
        )  # fmt: skip
    if parts:
        _kernel(reduce_splits)[(-(-outputs // 256), m)](
            target, there, y, m, outputs,
            SPLIT=tile.split, BLOCK=256, HAS_BIAS=bias is not None, ACTIVATION=activation,
        )  # fmt: skip
    return y


def _codes(values: Tensor, scales: Tensor | None, width: int) -> dict[str, int]:
    """The kernels' constants for codes: bits of one, and how many inputs share a scale."""
    bits = bits_of(values, scales)
    return {"BITS": bits, "GROUP": width // scales.shape[1] if scales is not None and bits == 4 else 0}


def expand_planes(
    values: Tensor, meta: Tensor, in_features: int, dtype: torch.dtype, scales: Tensor | None = None
) -> Tensor:
    """The dense weight [out, in] in scratch memory, by a kernel that writes it once."""
    from sparseforge_fx.kernels.gpu.triton_dot import expand_weight

    rows, _, words = values.shape
    width = in_features + -in_features % 8  # rows that start at 16 bytes are written 16 bytes at a time
    dense = torch.empty(rows, width, dtype=dtype, device=values.device)
    unit = next(u for u in (4, 2, 1) if words % u == 0)
    _kernel(expand_weight)[(-(-rows // 16), -(-words // 32))](
        values, meta, dense if scales is None else scales, dense, rows, words // unit, width // 8,
        BN=16, BW=32, UNIT=unit, ASM=_asm(values.device.type), num_warps=4, **_codes(values, scales, width),
    )  # fmt: skip
    return dense[:, :in_features]


def tune(
    values: Tensor,
    meta: Tensor,
    in_features: int,
    dtype: torch.dtype,
    m: int,
    scales: Tensor | None = None,
) -> Tile:
    """Time every legal tile for ``m`` rows of x on the weight's CUDA device, remember the fastest and return it.

    Each is timed on copies of the weight that together exceed any L2 cache: a cached weight would flatter small tiles.
    """
    if values.device.type != "cuda" or m > DECODE_ROWS or dtype not in HALF_TYPES:
        raise SparseForgeError("only 16-bit weights on a CUDA device with at most 128 rows of x have tiles to tune")
    from triton.runtime.errors import OutOfResources

    copies = max(2, min(64, (1 << 28) // values.nbytes))
    weights = [(values.clone(), meta.clone()) for _ in range(copies)]
    lines = torch.randn(m, in_features, device=values.device, dtype=dtype)

    def calls(tile: Tile) -> list[Callable[[], object]]:
        return [partial(launch, lines, v, w, None, "none", tile, 0, scales) for v, w in weights]

    def compiles(tile: Tile) -> bool:
        try:
            calls(tile)[0]()
        except OutOfResources:  # this Triton version keeps more in shared memory than the one they were checked with
            return False
        return True

    tiles = legal_tiles(capability_of(values.device), values.shape[0], values.shape[2], bucket(m))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # most of it is the compilers' work, outside of Python
        runs = [
            (tile, Replays(calls(tile))) for tile, fits in zip(tiles, pool.map(compiles, tiles), strict=True) if fits
        ]
    if not runs:
        raise SparseForgeError(f"no tile runs {tuple(values.shape)} words on {values.device}: keep this weight dense")
    times = {tile: statistics.median(run.seconds(3) for _ in range(5)) for tile, run in runs}
    best = min(times, key=times.__getitem__)
    remember(values.device, values.shape[0], values.shape[2], bucket(m), dtype, best, bits_of(values, scales))
    return best


def tune_planes(x: Tensor, values: Tensor, meta: Tensor, in_features: int, scales: Tensor | None) -> None:
    """:func:`tune` of a weight from :func:`as_planes` for as many rows as x has, where there is anything to tune."""
    if len(x) <= DECODE_ROWS and x.dtype in HALF_TYPES:
        tune(as_words(values), meta, in_features, x.dtype, len(x), scales=scales)


def _kernel(kernel: Any) -> Any:
    return kernel if _interpreted() else torch.library.wrap_triton(kernel)
