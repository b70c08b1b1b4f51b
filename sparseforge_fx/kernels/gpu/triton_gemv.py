"""One to four rows of x times a 2:4 weight in planes, of 16-bit values or codes of 8 or 4 bits.

Bound by the weight's bytes, which are read once for all rows.

Each pair of survivors picks its two inputs by a byte permute; products are summed in float32 in a fixed order.
"""

import triton
import triton.language as tl

from sparseforge_fx.kernels.gpu.words import activate, decode, high_half, load, low_half, scale_of, select, word_of


@triton.jit
def _add(acc, pairs, scale, x, meta, P: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    chosen = select(x, meta, P, ASM)
    if BITS == 4:
        part = low_half(pairs, DTYPE) * low_half(chosen, DTYPE)
        return tl.fma(tl.fma(high_half(pairs, DTYPE), high_half(chosen, DTYPE), part), scale, acc)
    else:
        acc = tl.fma(low_half(pairs, DTYPE), low_half(chosen, DTYPE), acc)
        return tl.fma(high_half(pairs, DTYPE), high_half(chosen, DTYPE), acc)


@triton.jit
def _dot_rows(
    x_ptr, values_ptr, meta_ptr, scales_ptr, row, start, stop, words, groups,
    ROWS: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, TAIL: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Sums over words start to stop of weight rows ``row`` with 1 to 4 rows of x: four [BN] tensors."""
    acc0 = tl.zeros((BN, BW), tl.float32)
    acc1 = tl.zeros((BN, BW), tl.float32)
    acc2 = tl.zeros((BN, BW), tl.float32)
    acc3 = tl.zeros((BN, BW), tl.float32)
    row = row[:, None]
    for begin in range(start, stop, BW):
        word = (begin + tl.arange(0, BW))[None, :]
        inside = word < stop
        meta = load(meta_ptr + row * words + word, inside, TAIL)
        for p in tl.static_range(8):
            # one address for every row of the tile, or the layout of x would not be that of the pairs
            group = p * words + word + 0 * row
            if p % (16 // BITS) == 0:
                codes = word_of(values_ptr, row, words, word, inside, p, BITS, TAIL)
            pairs = decode(codes, p, BITS, DTYPE, ASM)
            scale = scale_of(scales_ptr, row, words, word, inside, p, GROUP, TAIL) if BITS == 4 else 1.0
            x = _load_x(x_ptr, group, groups, inside, TAIL)
            acc0 = _add(acc0, pairs, scale, x, meta, p, BITS, DTYPE, ASM)
            if ROWS > 1:
                x = _load_x(x_ptr + groups, group, groups, inside, TAIL)
                acc1 = _add(acc1, pairs, scale, x, meta, p, BITS, DTYPE, ASM)
            if ROWS > 2:
                x = _load_x(x_ptr + 2 * groups, group, groups, inside, TAIL)
                acc2 = _add(acc2, pairs, scale, x, meta, p, BITS, DTYPE, ASM)
            if ROWS > 3:
                x = _load_x(x_ptr + 3 * groups, group, groups, inside, TAIL)
                acc3 = _add(acc3, pairs, scale, x, meta, p, BITS, DTYPE, ASM)
    return tl.sum(acc0, 1), tl.sum(acc1, 1), tl.sum(acc2, 1), tl.sum(acc3, 1)


@triton.jit
def _load_x(x_ptr, group, groups, inside, TAIL: tl.constexpr):
    return load(x_ptr + group, inside & (group < groups), TAIL)


@triton.jit
def _store(y_ptr, bias_ptr, y, up, row, n, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr):
    inside = row < n
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=inside, other=0).to(tl.float32)
    y = activate(y, ACTIVATION)
    if ACTIVATION == "silu_mul":
        if HAS_BIAS:
            up += tl.load(bias_ptr + n + row, mask=inside, other=0).to(tl.float32)
        y *= up
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gemv(
    x_ptr, values_ptr, meta_ptr, scales_ptr, bias_ptr, y_ptr, n, word_units, x_units,
    ROWS: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, UNIT: tl.constexpr, TAIL: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y [ROWS, n], or with PARTS float32 sums [splits, ROWS, outputs] without epilogue, outputs = n or 2 n if gated.

    ``word_units * UNIT`` is the number of words in a plane, ``8 * x_units`` the width of x: factors that Triton's
    alignment analysis can see, and 16-byte loads depend on them. ``scales``: of 8-bit values one a row, in float32; of
    4-bit ones one for each GROUP inputs of a row.
    """
    words = word_units * UNIT
    groups = x_units * 2
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    x_ptr = x_ptr.to(tl.pointer_type(tl.int64))
    GATED: tl.constexpr = ACTIVATION == "silu_mul"
    outputs = 2 * n if GATED else n
    part = tl.cdiv(tl.cdiv(words, BW), tl.num_programs(1)) * BW
    start = tl.program_id(1) * part
    stop = tl.minimum(start + part, words)
    limit = outputs if PARTS else n
    safe = tl.minimum(row, limit - 1)
    a0, a1, a2, a3 = _dot_rows(
        x_ptr, values_ptr, meta_ptr, scales_ptr, safe, start, stop, words, groups,
        ROWS, BN, BW, TAIL, BITS, GROUP, DTYPE, ASM,
    )  # fmt: skip
    if BITS == 8:
        scale = tl.load(scales_ptr + safe)
        a0, a1, a2, a3 = a0 * scale, a1 * scale, a2 * scale, a3 * scale
    if PARTS:
        y_ptr += tl.program_id(1) * ROWS * outputs
        inside = row < outputs
        tl.store(y_ptr + row, a0, mask=inside)
        if ROWS > 1:
            tl.store(y_ptr + outputs + row, a1, mask=inside)
        if ROWS > 2:
            tl.store(y_ptr + 2 * outputs + row, a2, mask=inside)
        if ROWS > 3:
            tl.store(y_ptr + 3 * outputs + row, a3, mask=inside)
    else:
        b0, b1, b2, b3 = a0, a1, a2, a3
        if GATED:
            b0, b1, b2, b3 = _dot_rows(
                x_ptr, values_ptr, meta_ptr, scales_ptr, n + safe, start, stop, words, groups,
                ROWS, BN, BW, TAIL, BITS, GROUP, DTYPE, ASM,
            )  # fmt: skip
            if BITS == 8:
                scale = tl.load(scales_ptr + n + safe)
                b0, b1, b2, b3 = b0 * scale, b1 * scale, b2 * scale, b3 * scale
        _store(y_ptr, bias_ptr, a0, b0, row, n, HAS_BIAS, ACTIVATION)
        if ROWS > 1:
            _store(y_ptr + n, bias_ptr, a1, b1, row, n, HAS_BIAS, ACTIVATION)
        if ROWS > 2:
            _store(y_ptr + 2 * n, bias_ptr, a2, b2, row, n, HAS_BIAS, ACTIVATION)
        if ROWS > 3:
            _store(y_ptr + 3 * n, bias_ptr, a3, b3, row, n, HAS_BIAS, ACTIVATION)


@triton.jit
def reduce_splits(
    parts_ptr, bias_ptr, y_ptr, m, n,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """y [m, n] from float32 parts [SPLIT, m, outputs], added in order: the same bits on every run."""
    GATED: tl.constexpr = ACTIVATION == "silu_mul"
    outputs = 2 * n if GATED else n
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n
    line = tl.program_id(1)
    at = parts_ptr + line.to(tl.int64) * outputs + row
    y = tl.zeros((BLOCK,), tl.float32)
    up = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLIT):
        y += tl.load(at + s * m * outputs, mask=inside, other=0)
        if GATED:
            up += tl.load(at + s * m * outputs + n, mask=inside, other=0)
    _store(y_ptr + line.to(tl.int64) * n, bias_ptr, y, up, row, n, HAS_BIAS, ACTIVATION)
