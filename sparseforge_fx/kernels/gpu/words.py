"""Device functions on words of the plane layout: what the Triton kernels share.

``ASM`` chooses between PTX byte permutes and the same index mathematics in plain Triton, which Triton's interpreter
(no inline assembly) and other vendors' GPUs run. Three multiplications turn metadata fields into the selector of a byte
permute; the constants were found by exhaustive search and are checked in ``tests/kernels/gpu/test_triton_bits.py``.
"""

import triton
import triton.language as tl

# selector of a half of a group = (two bits, 8 apart, times the factor) + base, modulo 2^16
LOW_FACTOR = tl.constexpr(0xDE34)
LOW_BASE = tl.constexpr(0x3210)
HIGH_FACTOR = tl.constexpr(0x2234)
HIGH_BASE = tl.constexpr(0x1032)
SELECT_FACTOR = tl.constexpr(0x11)
SELECT_BASE = tl.constexpr(0x1010)
#: two codes, 16 bits apart, -> two numbers. In bfloat16 the fraction has 7 bits: of a code of 8 the sign goes into what
#: is subtracted, 128 or 256
BFLOAT16_OF_8 = tl.constexpr(
    "{ .reg .b32 a, b, c; lop3.b32 a, $1, 0x007F007F, 0x43004300, 0xEA; "
    "lop3.b32 b, $1, 0x00800080, 0xC300C300, 0xEA; mov.b32 c, 0x3F803F80; fma.rn.bf16x2 $0, a, c, b; }"
)
BFLOAT16_OF_4 = tl.constexpr(
    "{ .reg .b32 a, b, c; lop3.b32 a, $1, 0x000F000F, 0x43084308, 0x6A; "
    "mov.b32 b, 0x3F803F80; mov.b32 c, 0xC308C308; fma.rn.bf16x2 $0, a, b, c; }"
)
FLOAT16_OF_8 = tl.constexpr(
    "{ .reg .b32 a, b; lop3.b32 a, $1, 0x00FF00FF, 0x64806480, 0x6A; mov.b32 b, 0x64806480; sub.rn.f16x2 $0, a, b; }"
)
FLOAT16_OF_4 = tl.constexpr(
    "{ .reg .b32 a, b; lop3.b32 a, $1, 0x000F000F, 0x64086408, 0x6A; mov.b32 b, 0x64086408; sub.rn.f16x2 $0, a, b; }"
)
#: times a float32 scale, which is rounded first
BFLOAT16_SCALED = tl.constexpr(
    "{ .reg .b32 s, z; cvt.rn.bf16x2.f32 s, $2, $2; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, s, z; }"
)
FLOAT16_SCALED = tl.constexpr("{ .reg .b32 s; cvt.rn.f16x2.f32 s, $2, $2; mul.rn.f16x2 $0, $1, s; }")
BYTES_02 = tl.constexpr(0x00FF00FF)
BYTES_13 = tl.constexpr(-0x00FF0100)  # 0xFF00FF00 as int32


@triton.jit
def load(pointers, inside, TAIL: tl.constexpr):
    """What the pointers show; where a tile reaches beyond the weight (TAIL), zeros outside."""
    if TAIL:
        return tl.load(pointers, mask=inside, other=0)
    else:
        return tl.load(pointers)


@triton.jit
def word_of(values_ptr, row, words, word, inside, P: tl.constexpr, BITS: tl.constexpr, TAIL: tl.constexpr):
    """The words that hold the pairs of plane P. One word holds those of 16 / BITS planes."""
    PLANES: tl.constexpr = BITS // 2
    return load(values_ptr + row * (PLANES * words) + ((P * BITS // 16) * words + word), inside, TAIL)


@triton.jit
def decode(codes, P: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Words with codes of 8 or 4 bits -> the pairs of plane P in DTYPE, as if the weight were kept in it; exact.

    A code becomes a number without a conversion: its bits are put in the fraction of a power of two, which is
    subtracted (Kim et al., arXiv 2211.10017; Marlin).
    """
    if BITS == 16:
        pairs = codes
    elif not ASM:
        moved = codes >> (BITS * (P % (16 // BITS)))
        pairs = _half(moved, BITS, DTYPE) | (_half(moved >> 16, BITS, DTYPE) << 16)
    else:
        moved = codes >> (BITS * (P % (16 // BITS)))
        WORK: tl.constexpr = (
            (BFLOAT16_OF_8 if BITS == 8 else BFLOAT16_OF_4)
            if tl.bfloat16 == DTYPE
            else (FLOAT16_OF_8 if BITS == 8 else FLOAT16_OF_4)
        )
        pairs = tl.inline_asm_elementwise(WORK, "=r,r", [moved], dtype=tl.int32, is_pure=True, pack=1)
    return pairs


@triton.jit
def _half(codes, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The number in the lowest bits, in DTYPE, in the low half of a word."""
    SIGN: tl.constexpr = 1 << (BITS - 1)
    number = ((codes & (2 * SIGN - 1)) ^ SIGN) - SIGN
    if tl.bfloat16 == DTYPE:
        return (number.to(tl.float32).to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    else:
        return number.to(tl.float32).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def scale_of(scales_ptr, row, words, word, inside, P: tl.constexpr, GROUP: tl.constexpr, TAIL: tl.constexpr):
    """In float32, the scales of 4-bit pairs of plane P: one for each GROUP inputs of a row."""
    at = row * (words * 32 // GROUP) + (P * words + word) // (GROUP // 4)
    return load(scales_ptr + at, inside, TAIL).to(tl.float32)


@triton.jit
def scaled(pairs, scale, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Pairs of DTYPE times their scale, which is rounded to DTYPE first."""
    if ASM:
        WORK: tl.constexpr = BFLOAT16_SCALED if tl.bfloat16 == DTYPE else FLOAT16_SCALED
        pairs = tl.inline_asm_elementwise(WORK, "=r,r,f", [pairs, scale], dtype=tl.int32, is_pure=True, pack=1)
    else:
        s = scale.to(DTYPE).to(tl.float32)
        low = (low_half(pairs, DTYPE) * s).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
        high = (high_half(pairs, DTYPE) * s).to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
        pairs = (low & 0xFFFF) | (high << 16)
    return pairs


@triton.jit
def place_bits(meta):
    """Two words that hold, 8 bits apart, whether places 0, 1 (first word) and 2, 3 (second) of a group are empty."""
    right = (meta >> 1) & 0x7FFFFFFF
    left7 = meta << 7
    empty1 = right & ~((meta << 8) ^ left7)  # the second survivor stands at 2 or 3, the first not at 1
    full3 = left7 | (meta & right)
    low = (meta & BYTES_02) | (empty1 & BYTES_13)
    high = ((meta >> 8) & BYTES_02) | (~full3 & BYTES_13)
    return low, high


@triton.jit
def expand(pairs, meta, low, high, P: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The four weights of each group of plane P, zeros included: four tensors of ``pairs``' shape."""
    if ASM:
        # bits of an even plane stand where the factor wants them; of the odd plane beside it, two further left
        SHIFT: tl.constexpr = 16 * (P // 4) + 4 * ((P % 4) // 2)
        MASK: tl.constexpr = 0x0101 << (2 * (P % 2))
        LOW: tl.constexpr = LOW_FACTOR >> (2 * (P % 2))
        HIGH: tl.constexpr = HIGH_FACTOR >> (2 * (P % 2))
        pick_low = ((low >> SHIFT) & MASK) * LOW + LOW_BASE
        pick_high = ((high >> SHIFT) & MASK) * HIGH + HIGH_BASE
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; prmt.b32 a, $4, 0, $5; prmt.b32 b, $4, 0, $6; "
            "mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; }",
            "=h,=h,=h,=h,r,r,r",
            [pairs, pick_low, pick_high],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=1,
        )
    else:
        first, second = pair_places(meta, P)
        w0 = _at(pairs, first, second, 0)
        w1 = _at(pairs, first, second, 1)
        w2 = _at(pairs, first, second, 2)
        w3 = _at(pairs, first, second, 3)
    return (
        w0.to(DTYPE, bitcast=True),
        w1.to(DTYPE, bitcast=True),
        w2.to(DTYPE, bitcast=True),
        w3.to(DTYPE, bitcast=True),
    )


@triton.jit
def select(inputs, meta, P: tl.constexpr, ASM: tl.constexpr):
    """The two inputs that belong to each pair of plane P, as words like the pairs. ``inputs``: int64, one a group."""
    if ASM:
        SHIFT: tl.constexpr = 16 * (P // 4) + 2 * (P % 4) - 1
        fields = ((meta >> SHIFT) if SHIFT >= 0 else (meta << 1)) & 0x0606
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [inputs.to(tl.int32), (inputs >> 32).to(tl.int32), fields * SELECT_FACTOR + SELECT_BASE],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        first, second = pair_places(meta, P)
        low = (inputs >> (16 * first).to(tl.int64)) & 0xFFFF
        high = (inputs >> (16 * second).to(tl.int64)) & 0xFFFF
        return (low | (high << 16)).to(tl.int32)


@triton.jit
def pair_places(meta, P: tl.constexpr):
    fields = meta >> (16 * (P // 4) + 2 * (P % 4))
    return fields & 3, (fields >> 8) & 3


@triton.jit
def _at(pairs, first, second, PLACE: tl.constexpr):
    return tl.where(first == PLACE, pairs, tl.where(second == PLACE, pairs >> 16, 0)).to(tl.int16)


@triton.jit
def low_half(words, DTYPE: tl.constexpr):
    """The low 16 bits of each word, a number of DTYPE, in float32."""
    if tl.bfloat16 == DTYPE:
        return (words << 16).to(tl.float32, bitcast=True)
    else:
        return words.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def high_half(words, DTYPE: tl.constexpr):
    """The high 16 bits of each word, a number of DTYPE, in float32."""
    if tl.bfloat16 == DTYPE:
        return (words & -65536).to(tl.float32, bitcast=True)
    else:
        return (words >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """y in float32 through the activation; the tanh of gelu_tanh is written as a sigmoid, which is the same number."""
    if ACTIVATION == "relu":
        y = tl.where(y < 0, 0.0, y)  # not maximum: NaN must stay
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "silu" or ACTIVATION == "silu_mul":
        y = y * tl.sigmoid(y)
    return y
