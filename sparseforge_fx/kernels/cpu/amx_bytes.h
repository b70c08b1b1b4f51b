// Tile matrix multiply of int8: sixteen weight rows of codes as they are on disk, 2:4 ones expanded a step at a time,
// against up to 32 rows of x, each in fifteen bits: 128 times one byte and another, products of which are summed apart.
// Included by codes_linear.cpp behind CodesJob.

#ifdef SPARSEFORGE_X86
namespace amx_bytes {
#define TARGET AMX_TARGET
constexpr int64_t kColumnsAtOnce = 32;
constexpr int64_t kTileBytes = 16 * kStep;  // 1 KiB
constexpr int32_t kLow = 128;               // what the first byte of an x comes times
constexpr float kMost = 127 * kLow;

inline int64_t steps_of(int64_t in) { return (in + kStep - 1) / kStep; }

// Of sixteen rows of x: [2 bytes][steps][16 times four inputs][16 rows of x][4], and their scales.
inline int64_t row_bytes_of(int64_t in) { return 2 * steps_of(in) * kStep + static_cast<int64_t>(sizeof(float)); }

INLINE __m512 widened(const float* x, __mmask16 there) { return _mm512_maskz_loadu_ps(there, x); }
INLINE __m512 widened(const bf16* x, __mmask16 there) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, x)), 16));
}
INLINE __mmask16 there_of(int64_t count) {  // of sixteen
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1);
}

// Up to sixteen rows of x, zeros outside. Where a row holds inf or NaN its scale is NaN: it spoils its own outputs.
template <class S>
TARGET void prepare(const S* x, int64_t columns, int64_t in, void* rows) {
  const int64_t steps = steps_of(in);
  auto* const bytes = static_cast<int8_t*>(rows);
  auto* const scales = reinterpret_cast<float*>(bytes + 2 * steps * kTileBytes);
  const __m512 most = _mm512_set1_ps(3.4028235e38f);
  alignas(64) float inverse[16] = {};
  for (int64_t m = 0; m < 16; ++m) {
    scales[m] = 0.f;
    if (m >= columns) continue;
    __m512 peak = _mm512_setzero_ps();
    bool finite = true;
    for (int64_t k = 0; k < in; k += 16) {
      const __m512 size = _mm512_abs_ps(widened(x + m * in + k, there_of(in - k)));
      finite = finite && _mm512_cmp_ps_mask(size, most, _CMP_LE_OQ) == 0xffff;
      peak = _mm512_max_ps(peak, size);
    }
    const float largest = _mm512_reduce_max_ps(peak);
    const bool counts = finite && largest > 1e-34f;
    scales[m] = counts ? largest / kMost : finite ? 0.f : std::nanf("");
    inverse[m] = counts ? kMost / largest : 0.f;
  }
  for (int64_t s = 0; s < steps; ++s) {
    alignas(64) int8_t part[2][16][kStep] = {};
    for (int64_t m = 0; m < columns; ++m) {
      if (inverse[m] == 0.f) continue;
#pragma GCC unroll 4
      for (int64_t k = 0; k < kStep; k += 16) {
        const int64_t at = s * kStep + k;
        const __m512 value = _mm512_mul_ps(widened(x + m * in + std::min(at, in), there_of(in - at)), _mm512_set1_ps(inverse[m]));
        const __m512i whole = _mm512_cvtps_epi32(value);
        const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(kLow / 2)), 7);
        const __m512i low = _mm512_sub_epi32(whole, _mm512_slli_epi32(high, 7));
        _mm_store_si128(reinterpret_cast<__m128i*>(part[0][m] + k), _mm512_cvtepi32_epi8(high));
        _mm_store_si128(reinterpret_cast<__m128i*>(part[1][m] + k), _mm512_cvtepi32_epi8(low));
      }
    }
    for (int p = 0; p < 2; ++p) {
      __m512 v[16];
#pragma GCC unroll 16
      for (int m = 0; m < 16; ++m) v[m] = _mm512_castsi512_ps(_mm512_load_si512(part[p][m]));
      amx::transpose(v);
      int8_t* const to = bytes + (p * steps + s) * kTileBytes;
#pragma GCC unroll 16
      for (int k = 0; k < 16; ++k) _mm512_storeu_ps(to + 64 * k, v[k]);
    }
  }
}

template <bool SPARSE>
struct Block {
  static constexpr int64_t kBytes = SPARSE ? kStep / 2 : kStep;  // of values in a step
  const uint8_t *values[16], *mask[16];
  int64_t row_bytes, mask_bytes, steps, left;  // left: inputs in an incomplete last step
  bool as_it_is;                               // whole steps may be read where they are
  alignas(64) float scales[16];

  Block(const CodesJob& job, int64_t first, int64_t last) : row_bytes(job.row_bytes), mask_bytes(job.mask_bytes) {
    const int64_t padded = SPARSE ? 2 * row_bytes : row_bytes;
    steps = steps_of(padded);
    left = padded % kStep;
    // what an incomplete step reads of the next row meets zeros
    as_it_is = !SPARSE && first + 15 <= last && (!left || (last - first - 15) * row_bytes >= kStep);
    for (int r = 0; r < 16; ++r) {
      const int64_t row = std::min(first + r, last);  // beyond the last row: repeat it, the result is not stored
      values[r] = job.all.values + row * row_bytes;
      mask[r] = job.all.mask + row * mask_bytes;
      scales[r] = read<float>(job.all.scales + row * job.scale_bytes);
    }
  }

  // What the next sixteen rows have as far into their memory as this step is into ours.
  INLINE void prefetch(int64_t step) const {
    const uint8_t* const next = values[0] + 16 * (row_bytes + step * kBytes);
#pragma GCC unroll 16
    for (int64_t line = 0; line < kBytes / 4; ++line) PREFETCH_FAR(next + 64 * line);
    if (SPARSE) {
      PREFETCH_FAR(mask[0] + 16 * (mask_bytes + step * kStep / 8));
      PREFETCH_FAR(mask[0] + 16 * (mask_bytes + step * kStep / 8) + 64);
    }
  }

  INLINE void expand(int64_t step, int8_t (*out)[kStep]) const {
    if (left && step + 1 == steps) return expand_tail(out);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      const uint8_t* const v = values[r] + step * kBytes;
      __m512i codes;
      if constexpr (SPARSE) {
        const __m256i kept = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(v));
        codes = _mm512_maskz_expand_epi8(read<uint64_t>(mask[r] + step * 8), _mm512_castsi256_si512(kept));
      } else {
        codes = _mm512_loadu_si512(v);
      }
      _mm512_store_si512(out[r], codes);
    }
  }

  TARGET void expand_tail(int8_t (*out)[kStep]) const {
    const auto there = static_cast<__mmask64>((uint64_t{1} << (SPARSE ? left / 2 : left)) - 1);
    for (int r = 0; r < 16; ++r) {
      __m512i codes = _mm512_maskz_loadu_epi8(there, values[r] + (steps - 1) * kBytes);
      if constexpr (SPARSE) {
        uint64_t bits = 0;
        std::memcpy(&bits, mask[r] + (steps - 1) * 8, left / 8);
        codes = _mm512_maskz_expand_epi8(bits, codes);
      }
      _mm512_store_si512(out[r], codes);
    }
  }
};

// The same times their scales in bfloat16, half a step at a time, as amx.h expands.
template <bool SPARSE>
struct HalfBlock {
  Block<SPARSE> bytes;
  int64_t steps;
  alignas(64) int8_t w[16][kStep];

  HalfBlock(const CodesJob& job, int64_t first, int64_t last) : bytes(job, first, last), steps(2 * bytes.steps) {}

  INLINE void expand(int64_t step, bf16 (*out)[amx::kStep]) {
    if (step % 2 == 0) bytes.expand(step / 2, w);
#pragma GCC unroll 4
    for (int r = 0; r < 16; ++r) {
      const __m512 scale = _mm512_set1_ps(bytes.scales[r]);
      for (int64_t k = 0; k < amx::kStep; k += 16) {
        const __m128i codes = _mm_load_si128(reinterpret_cast<const __m128i*>(w[r] + step % 2 * amx::kStep + k));
        const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), scale);
        _mm256_store_si256(reinterpret_cast<__m256i*>(out[r] + k), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
      }
    }
  }
};

// GROUPS groups of sixteen rows of x, two accumulators for each.
template <int GROUPS, bool SPARSE>
TARGET void tile_of(const Block<SPARSE>& block, const int8_t* x, int64_t columns, float* out) {
  constexpr int64_t kRing = 4, kLag = 2;  // a tile load right behind the stores of the same memory waits for them
  alignas(64) int8_t w[kRing][16][kStep];
  alignas(64) int32_t sums[4][16][16];  // [accumulator][weight row][row of x]
  const int64_t steps = block.steps, part = steps * kTileBytes, group = 2 * part + 16 * static_cast<int64_t>(sizeof(float));
  const bool in_place = !SPARSE && block.as_it_is;
  const int64_t lag = in_place ? 0 : kLag;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps + lag; ++s) {
    if (s < steps) {
      block.prefetch(s);
      if (!in_place) block.expand(s, w[s % kRing]);
    }
    amx::fence();
    const int64_t at = s - lag;
    if (at < 0) continue;
    if (in_place) {
      _tile_loadd(4, block.values[0] + at * kStep, block.row_bytes);
    } else {
      _tile_loadd(4, w[at % kRing][0], kStep);
    }
    const int8_t* const from = x + at * kTileBytes;
    _tile_loadd(6, from, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, from + part, 64);
    _tile_dpbssd(1, 4, 7);
    if constexpr (GROUPS == 2) {
      _tile_loadd(6, from + group, 64);
      _tile_dpbssd(2, 4, 6);
      _tile_loadd(7, from + group + part, 64);
      _tile_dpbssd(3, 4, 7);
    }
    amx::fence();
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  if (GROUPS == 2) {
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
  }
  amx::fence();
  const __m512 scales = _mm512_load_ps(block.scales);
  for (int g = 0; g < GROUPS; ++g) {
    const auto* const of_x = reinterpret_cast<const float*>(x + g * group + 2 * part);
    __m512 v[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r)
      v[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[2 * g][r])), _mm512_set1_ps(kLow),
                             _mm512_cvtepi32_ps(_mm512_load_si512(sums[2 * g + 1][r])));
    amx::transpose(v);
#pragma GCC unroll 16
    for (int m = 0; m < 16; ++m)
      if (16 * g + m < columns)
        _mm512_storeu_ps(out + (16 * g + m) * kTileRows, _mm512_mul_ps(_mm512_mul_ps(v[m], scales), _mm512_set1_ps(of_x[m])));
  }
}

template <bool SPARSE>
void tile(const CodesJob& job, const void* x, int64_t columns, int64_t first, int64_t last, float* out) {
  const Block<SPARSE> block(job, first, last);
  const auto* const bytes = static_cast<const int8_t*>(x);
  if (columns <= 16) return tile_of<1>(block, bytes, columns, out);
  return tile_of<2>(block, bytes, columns, out);
}

template <class S>
TileKernel<S, CodesJob> kernel(bool sparse, decltype(TileKernel<S, CodesJob>::finish) finish, int64_t in) {
  return {sparse ? tile<true> : tile<false>, finish, prepare<S>, 16, row_bytes_of(in), kColumnsAtOnce, 4, true};
}
#undef TARGET
}  // namespace amx_bytes
#endif
