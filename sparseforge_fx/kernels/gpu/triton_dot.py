"""Five and more rows of x times a 2:4 weight in planes, on tensor cores: weights are expanded in registers.

Rows of the weight are the rows of the matrix instruction, so that few rows of x waste little. The order of a sum's
terms is free: with ``PAIRS`` places 0, 1 and places 2, 3 of the groups make one product each, because the warp-group
instruction wants two neighbours a register; without, x is read in its own order.
"""

import triton
import triton.language as tl

from sparseforge_fx.kernels.gpu.words import activate, decode, expand, load, place_bits, scale_of, scaled, word_of


@triton.jit
def _tile(
    x_ptr, values_ptr, meta_ptr, scales_ptr, row, line, start, stop, words, width,
    BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, PAIRS: tl.constexpr, TAIL: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Sums over words start to stop: weight rows ``row`` [BN] with rows ``line`` [BM] of x, float32 [BN, BM]."""
    acc = tl.zeros((BN, BM), tl.float32)
    row = row[:, None]
    line = line[None, :]
    for begin in range(start, stop, BW):
        word = (begin + tl.arange(0, BW))[None, :]
        inside = word < stop
        meta = load(meta_ptr + row * words + word, inside, TAIL)
        low, high = place_bits(meta)
        for p in tl.static_range(8):
            if p % (16 // BITS) == 0:
                codes = word_of(values_ptr, row, words, word, inside, p, BITS, TAIL)
            pairs = decode(codes, p, BITS, DTYPE, ASM)
            if BITS == 4:
                scale = scale_of(scales_ptr, row, words, word, inside, p, GROUP, TAIL)
                pairs = scaled(pairs, scale, DTYPE, ASM)
            w0, w1, w2, w3 = expand(pairs, meta, low, high, p, DTYPE, ASM)
            first = 4 * (p * words + begin)
            last = tl.minimum(4 * (p * words + stop), width)
            if PAIRS:
                i = tl.arange(0, 2 * BW)
                k = (first + 4 * (i // 2) + i % 2)[:, None]
                left, right = tl.join(w0, w1).reshape(BN, 2 * BW), tl.join(w2, w3).reshape(BN, 2 * BW)
                acc = _multiply(left, _load_x(x_ptr, line, k, width, last, TAIL), acc, ASM)
                acc = _multiply(right, _load_x(x_ptr, line, k + 2, width, last, TAIL), acc, ASM)
            else:
                k = (first + tl.arange(0, 4 * BW))[:, None]
                w = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BN, 4 * BW)
                acc = _multiply(w, _load_x(x_ptr, line, k, width, last, TAIL), acc, ASM)
    return acc


@triton.jit
def _multiply(w, x, acc, ASM: tl.constexpr):
    if ASM:
        return tl.dot(w, x, acc)
    else:  # the interpreter multiplies bfloat16 as integers
        return tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def _load_x(x_ptr, line, k, width, last, TAIL: tl.constexpr):
    return load(x_ptr + line * width + k, k < last, TAIL)


@triton.jit
def dot(
    x_ptr, values_ptr, meta_ptr, scales_ptr, bias_ptr, y_ptr, m, n, word_units, x_units,
    BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, PAIRS: tl.constexpr, UNIT: tl.constexpr, TAIL: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y [m, n], or with PARTS float32 sums [splits, m, n] without epilogue, for ``reduce_splits``.

    A gated activation needs PARTS: two tiles of sums in one program spill registers. ``word_units * UNIT`` is the
    number of words in a plane, ``8 * x_units`` the width of x.
    """
    words = word_units * UNIT
    width = x_units * 8
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    line = tl.program_id(2) * BM + tl.arange(0, BM)
    safe, safe_line = tl.minimum(row, n - 1), tl.minimum(line, m - 1)
    part = tl.cdiv(tl.cdiv(words, BW), tl.num_programs(1)) * BW
    start = tl.program_id(1) * part
    stop = tl.minimum(start + part, words)
    y = _tile(
        x_ptr, values_ptr, meta_ptr, scales_ptr, safe, safe_line, start, stop, words, width,
        BM, BN, BW, PAIRS, TAIL, BITS, GROUP, DTYPE, ASM,
    )  # fmt: skip
    if BITS == 8:
        y *= tl.load(scales_ptr + safe)[:, None]
    inside = (row < n)[:, None] & (line < m)[None, :]
    at = line.to(tl.int64)[None, :] * n + row[:, None]
    if PARTS:
        tl.store(y_ptr + tl.program_id(1).to(tl.int64) * m * n + at, y, mask=inside)
    else:
        if HAS_BIAS:
            y += tl.load(bias_ptr + safe).to(tl.float32)[:, None]
        tl.store(y_ptr + at, activate(y, ACTIVATION).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def expand_weight(
    values_ptr, meta_ptr, scales_ptr, w_ptr, n, word_units, x_units,
    BN: tl.constexpr, BW: tl.constexpr, UNIT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The dense weight [n, 8 * x_units], for products large enough that the dense GEMM's speed decides."""
    words = word_units * UNIT
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    width = x_units * 8
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    word = (tl.program_id(1) * BW + tl.arange(0, BW))[None, :]
    row = row.to(tl.int64)[:, None]
    inside = (row < n) & (word < words)
    meta = tl.load(meta_ptr + row * words + word, mask=inside, other=0)
    low, high = place_bits(meta)
    for p in tl.static_range(8):
        if p % (16 // BITS) == 0:
            codes = word_of(values_ptr, row, words, word, inside, p, BITS, True)
        pairs = decode(codes, p, BITS, DTYPE, ASM)
        w0, w1, w2, w3 = expand(pairs, meta, low, high, p, DTYPE, ASM)
        if BITS < 16:
            if BITS == 4:
                scale = scale_of(scales_ptr, row, words, word, inside, p, GROUP, True)
            else:
                scale = tl.load(scales_ptr + row, mask=row < n, other=0)
            w0, w1 = (w0.to(tl.float32) * scale).to(DTYPE), (w1.to(tl.float32) * scale).to(DTYPE)
            w2, w3 = (w2.to(tl.float32) * scale).to(DTYPE), (w3.to(tl.float32) * scale).to(DTYPE)
        w = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BN, 4 * BW)
        i = tl.program_id(1) * 4 * BW + tl.arange(0, 4 * BW)[None, :]
        k = p * 4 * words + i
        tl.store(w_ptr + row * width + k, w, mask=(row < n) & (i < 4 * words) & (k < width))
