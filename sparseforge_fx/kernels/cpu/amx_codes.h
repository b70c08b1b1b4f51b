// Sixteen rows of int4 codes for amx.h, as they are on disk. Included by codes_linear.cpp behind CodesJob. x stays as it
// is; the products of codes and scales are rounded to bfloat16.

#ifdef SPARSEFORGE_X86
namespace amx_codes {
#define TARGET AMX_TARGET

template <bool SPARSE>
struct Block {
  static constexpr int64_t kBytes = amx::kStep / (SPARSE ? 4 : 2);  // of values in a step
  const uint8_t *values[16], *mask[16];
  int64_t row_bytes, mask_bytes, scale_bytes, steps;
  amx::GroupScales scales;

  Block(const CodesJob& job, int64_t first, int64_t last)
      : row_bytes(job.row_bytes), mask_bytes(job.mask_bytes), scale_bytes(job.scale_bytes), steps(row_bytes / kBytes) {
    scales.count = scale_bytes / 2;
    scales.shift = job.group == 4 * amx::kStep ? 2 : 0;
    for (int r = 0; r < 16; ++r) {
      const int64_t row = std::min(first + r, last);  // beyond the last row: repeat it, the result is not stored
      values[r] = job.all.values + row * row_bytes;
      mask[r] = job.all.mask + row * mask_bytes;
      scales.row[r] = job.all.scales + row * scale_bytes;
    }
  }

  // What the next sixteen rows have as far into their memory as this step is into ours.
  INLINE void prefetch(int64_t step) const {
    const uint8_t* const next = values[0] + 16 * (row_bytes + step * kBytes);
#pragma GCC unroll 4
    for (int64_t line = 0; line < kBytes / 4; ++line) PREFETCH_FAR(next + 64 * line);
    if (SPARSE) PREFETCH_FAR(mask[0] + 16 * (mask_bytes + step * amx::kStep / 8));
    if (step % 2 == 0) PREFETCH_FAR(scales.row[0] + 16 * (scale_bytes + (step >> scales.shift) * 2));
  }

  INLINE void expand(int64_t step, bf16 (*out)[amx::kStep]) {
    scales.load(step);
    prefetch(step);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {  // the low nibble of a byte is in the low four bits of a word, the high one of the next
      const uint8_t* const v = values[r] + step * kBytes;
      __m512i row;
      if constexpr (SPARSE) {
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(v)));
        const __m256i from = _mm256_or_si256(wide, _mm256_slli_epi32(wide, 12));
        const __m256i kept = _mm256_permutexvar_epi16(from, scales.table(r, step));
        row = _mm512_maskz_expand_epi16(read<uint32_t>(mask[r] + step * 4), _mm512_castsi256_si512(kept));
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
};
#undef TARGET
}  // namespace amx_codes
#endif
