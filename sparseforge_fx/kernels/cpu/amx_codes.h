// Sixteen rows of int8 or int4 codes for amx.h, as they are on disk. Included by codes_linear.cpp behind CodesJob.
//
// Codes are exact in bfloat16, and x stays as it is; of int4 codes their products with the scales are rounded, those of
// int8 meet theirs in the sums.

#ifdef SPARSEFORGE_X86
namespace amx_codes {
#define TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")))
constexpr int64_t kAmxStep = amx::kStep;

template <bool SPARSE, int BITS>
struct Block {
  static constexpr int64_t kBytes = kAmxStep * BITS / 8 / (SPARSE ? 2 : 1);  // of values in a step
  const uint8_t *values[16], *mask[16];
  int64_t row_bytes, mask_bytes, scale_bytes, steps, left;  // left: inputs in an incomplete last step; of int8 alone
  amx::GroupScales scales;  // of int4
  alignas(64) float of_row[16];  // of int8

  Block(const CodesJob& job, int64_t first, int64_t last)
      : row_bytes(job.row_bytes), mask_bytes(job.mask_bytes), scale_bytes(job.scale_bytes) {
    const int64_t padded = row_bytes * kAmxStep / kBytes;
    steps = amx::steps_of(padded);
    left = padded % kAmxStep;
    scales.count = scale_bytes / 2;
    scales.shift = job.group == 4 * kAmxStep ? 2 : 0;
    for (int r = 0; r < 16; ++r) {
      const int64_t row = std::min(first + r, last);  // beyond the last row: repeat it, the result is not stored
      values[r] = job.all.values + row * row_bytes;
      mask[r] = job.all.mask + row * mask_bytes;
      scales.row[r] = job.all.scales + row * scale_bytes;
      if (BITS == 8) of_row[r] = read<float>(scales.row[r]);
    }
  }

  // What the next sixteen rows have as far into their memory as this step is into ours.
  INLINE void prefetch(int64_t step) const {
    const uint8_t* const next = values[0] + 16 * (row_bytes + step * kBytes);
#pragma GCC unroll 8
    for (int64_t line = 0; line < kBytes / 4; ++line) PREFETCH_FAR(next + 64 * line);
    if (SPARSE) PREFETCH_FAR(mask[0] + 16 * (mask_bytes + step * kAmxStep / 8));
    if (BITS == 4 && step % 2 == 0) PREFETCH_FAR(scales.row[0] + 16 * (scale_bytes + (step >> scales.shift) * 2));
  }

  INLINE __m512 finished(__m512 sums) const { return BITS == 8 ? _mm512_mul_ps(sums, _mm512_load_ps(of_row)) : sums; }

  INLINE static __m512i placed(__m256i kept, uint32_t mask) {
    return _mm512_maskz_expand_epi16(mask, _mm512_castsi256_si512(kept));
  }
  INLINE static __m512 floats(__m128i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)); }
  INLINE static __m256i rounded(__m512 values) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)); }
  INLINE static __m512i both(__m256i codes) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(floats(_mm256_extracti128_si256(codes, 1)),
                                                         floats(_mm256_castsi256_si128(codes))));
  }

  INLINE void expand(int64_t step, bf16 (*out)[kAmxStep]) {
    if constexpr (BITS == 8) {
      if (left && step + 1 == steps) return expand_tail(out);
    } else {
      scales.load(step);
    }
    prefetch(step);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      const uint8_t* const v = values[r] + step * kBytes;
      __m512i row;
      if constexpr (BITS == 8 && SPARSE) {
        row = placed(rounded(floats(_mm_loadu_si128(reinterpret_cast<const __m128i*>(v)))), read<uint32_t>(mask[r] + step * 4));
      } else if constexpr (BITS == 8) {
        row = both(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v)));
      } else if constexpr (SPARSE) {  // the low nibble of a byte is in the low four bits of a word, the high one of the next
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(v)));
        const __m256i from = _mm256_or_si256(wide, _mm256_slli_epi32(wide, 12));
        row = placed(_mm256_permutexvar_epi16(from, scales.table(r, step)), read<uint32_t>(mask[r] + step * 4));
      } else {
        const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(v)));
        constexpr int kOrAnd = 0xa8;  // (a | b) & c
        const __m512i from =
            _mm512_ternarylogic_epi32(wide, _mm512_slli_epi32(wide, 12), _mm512_set1_epi16(15), kOrAnd);
        row = _mm512_permutexvar_epi16(from, _mm512_castsi256_si512(scales.table(r, step)));
      }
      _mm512_store_si512(out[r], row);
    }
  }

  TARGET void expand_tail(bf16 (*out)[kAmxStep]) const {
    for (int r = 0; r < 16; ++r) {
      const uint8_t* const v = values[r] + (steps - 1) * kBytes;
      if constexpr (SPARSE) {
        uint32_t bits = 0;
        std::memcpy(&bits, mask[r] + (steps - 1) * 4, left / 8);
        const auto there = static_cast<__mmask16>((1u << left / 2) - 1);
        _mm512_store_si512(out[r], placed(rounded(floats(_mm_maskz_loadu_epi8(there, v))), bits));
      } else {
        const auto there = static_cast<__mmask32>((1u << left) - 1);
        _mm512_store_si512(out[r], both(_mm256_maskz_loadu_epi8(there, v)));
      }
    }
  }
};
#undef TARGET
}  // namespace amx_codes
#endif
