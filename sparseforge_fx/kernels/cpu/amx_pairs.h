// Eight pairs of rows of int4 codes for amx.h, in the layout of pairs.py. Included by pairs_linear.cpp behind PairsJob.

#ifdef SPARSEFORGE_X86
namespace amx_pairs {
#define TARGET AMX_TARGET

struct Block {
  const uint8_t *values[kPairs], *places[kPairs];
  int64_t steps, pair_steps;  // of 32 inputs; of kStep
  uint64_t mask[2 * kPairs];  // of each row, for the kStep inputs at hand
  amx::GroupScales scales;

  Block(const PairsJob& job, int64_t first, int64_t last) : steps(2 * job.steps), pair_steps(job.steps) {
    scales.count = job.scale_bytes / 2;
    scales.shift = job.group == 4 * amx::kStep ? 2 : 0;
    for (int p = 0; p < kPairs; ++p) {
      const int64_t pair = std::min(first / 2 + p, last / 2);  // beyond the last: not stored
      values[p] = job.values + pair * pair_steps * kPairValues<4>;
      places[p] = job.places + pair * pair_steps * kPairPlaces;
      for (int row = 0; row < 2; ++row) scales.row[2 * p + row] = job.scales + (2 * pair + row) * job.scale_bytes;
    }
  }

  // Places of survivors in their groups to a bitmask of the inputs, for both rows of each pair; and a prefetch of what the
  // next eight pairs have as far into their memory.
  INLINE void find_masks(int64_t k) {
    const __m512i to_low = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
    const __m512i bit_of_place = _mm512_set1_epi32(0x08040201);
    const __m128i row_by_row = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
#pragma GCC unroll 8
    for (int p = 0; p < kPairs; ++p) {
      PREFETCH_FAR(values[0] + kPairs * (pair_steps * kPairValues<4> + k * kPairValues<4>) + 32 * p);
      if (p % 4 == 0) PREFETCH_FAR(places[0] + kPairs * (pair_steps * kPairPlaces + k * kPairPlaces) + 16 * p);
      const __m128i fields = _mm_loadu_si128(reinterpret_cast<const __m128i*>(places[p] + k * kPairPlaces));
      const __m512i place =
          _mm512_and_si512(_mm512_srlv_epi32(_mm512_broadcast_i32x4(fields), to_low), _mm512_set1_epi8(3));
      const __m512i group = _mm512_maddubs_epi16(_mm512_shuffle_epi8(bit_of_place, place), _mm512_set1_epi8(1));
      const __m128i eight = _mm512_cvtepi32_epi8(_mm512_madd_epi16(group, _mm512_set1_epi32(0x00100001)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(mask + 2 * p), _mm_shuffle_epi8(eight, row_by_row));
    }
  }

  INLINE void expand(int64_t step, bf16 (*out)[amx::kStep]) {
    const int64_t k = step / 2, half = step % 2;
    if (half == 0) find_masks(k);
    scales.load(step);
#pragma GCC unroll 8
    for (int p = 0; p < kPairs; ++p) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values[p] + k * kPairValues<4>));
      const __m256i nibbles = _mm256_srl_epi16(bytes, _mm_cvtsi32_si128(static_cast<int>(4 * half)));  // low four bits
      const __m256i rows = _mm256_permute4x64_epi64(nibbles, 0b11011000);
#pragma GCC unroll 2
      for (int row = 0; row < 2; ++row) {
        const int r = 2 * p + row;
        const __m256i from = _mm256_cvtepu8_epi16(row ? _mm256_extracti128_si256(rows, 1) : _mm256_castsi256_si128(rows));
        const __m256i kept = _mm256_permutexvar_epi16(from, scales.table(r, step));
        const auto bits = static_cast<uint32_t>(mask[r] >> 32 * half);
        _mm512_store_si512(out[r], _mm512_maskz_expand_epi16(bits, _mm512_castsi256_si512(kept)));
      }
    }
  }
};
#undef TARGET
}  // namespace amx_pairs
#endif
