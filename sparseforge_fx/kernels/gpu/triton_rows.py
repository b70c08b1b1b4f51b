"""What surrounds a product of 8-bit integers: rows of x rounded to codes before it, scales and epilogue after it."""

import triton
import triton.language as tl

from sparseforge_fx.kernels.gpu.words import activate


@triton.jit
def round_rows(x_ptr, codes_ptr, scales_ptr, width, BLOCK: tl.constexpr):
    """codes [rows, width] int8 and scales [rows] float32 of x: the largest of a row becomes 127. An inf or NaN makes
    the scale NaN."""
    line = tl.program_id(0)
    x_ptr += line.to(tl.int64) * width
    codes_ptr += line.to(tl.int64) * width
    most = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, width, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < width, other=0).to(tl.float32)
        most = tl.maximum(most, tl.abs(x))
        bad += x * 0.0
    largest = tl.max(most, 0)
    tl.store(scales_ptr + line, largest / 127.0 + tl.sum(bad, 0))
    factor = tl.where(largest > 0, 127.0 / largest, 0.0)
    for begin in range(0, width, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < width, other=0).to(tl.float32)
        even = (x * factor + 12582912.0) - 12582912.0  # rounded to nearest: the sum has no bits for fractions
        tl.store(codes_ptr + i, even.to(tl.int8), mask=i < width)


@triton.jit
def finish_rows(
    sums_ptr, scales_ptr, bias_ptr, y_ptr, n,
    BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y [rows, n] = activation(sums * scales + bias): sums [rows, n, or 2 n if gated], scales [rows]."""
    GATED: tl.constexpr = ACTIVATION == "silu_mul"
    outputs = 2 * n if GATED else n
    line = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n
    sums_ptr += line.to(tl.int64) * outputs
    scale = tl.load(scales_ptr + line)
    y = tl.load(sums_ptr + row, mask=inside, other=0).to(tl.float32) * scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=inside, other=0).to(tl.float32)
    y = activate(y, ACTIVATION)
    if GATED:
        up = tl.load(sums_ptr + n + row, mask=inside, other=0).to(tl.float32) * scale
        if HAS_BIAS:
            up += tl.load(bias_ptr + n + row, mask=inside, other=0).to(tl.float32)
        y *= up
    tl.store(y_ptr + line.to(tl.int64) * n + row, y.to(y_ptr.dtype.element_ty), mask=inside)
