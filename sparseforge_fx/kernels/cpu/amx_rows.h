// Sixteen rows of packed bfloat16 for amx.h, read side by side.
#pragma once

#include "amx.h"
#include "primitives.h"

#ifdef SPARSEFORGE_X86
namespace sparseforge::amx {
#define TARGET AMX_TARGET

struct RowsBlock {
  static constexpr int64_t kAhead = 512, kMaskAhead = 64;  // bytes
  const char* values[16];  // of rows of padded / 2 bfloat16: as many bytes as `padded`
  const uint8_t* mask[16];
  int64_t row_bytes, mask_bytes, steps;

  RowsBlock(const Job& job, int64_t first, int64_t last)
      : row_bytes(job.padded), mask_bytes(job.padded / 8), steps(steps_of(job.padded)) {
    for (int r = 0; r < 16; ++r) {
      const int64_t row = std::min(first + r, last);  // beyond the last row: repeat it, the result is not stored
      values[r] = static_cast<const char*>(job.values) + row * row_bytes;
      mask[r] = job.mask + row * mask_bytes;
    }
  }

  INLINE void prefetch(int64_t step) const {
    if (step % 2 == 0) {  // a cache line of values is two steps, one of bitmask sixteen
      const int64_t at = step * 32 + kAhead, beyond = at < row_bytes ? 0 : 15 * row_bytes;  // in the next block
#pragma GCC unroll 16
      for (int r = 0; r < 16; ++r) PREFETCH(values[r] + at + beyond);
    }
    if (step % 16 == 0) {
      const int64_t at = step * 4 + kMaskAhead, beyond = at < mask_bytes ? 0 : 15 * mask_bytes;
      for (int r = 0; r < 16; ++r) PREFETCH(mask[r] + at + beyond);
    }
  }

  INLINE void expand(int64_t step, bf16 (*out)[kStep]) const {
    if ((step + 1) * kStep > row_bytes) return expand_tail(out);
    prefetch(step);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      const auto* v = reinterpret_cast<const bf16*>(values[r] + step * 32);
      avx512_bf16::store(out[r], avx512_bf16::expand(v, mask[r] + step * 4));
    }
  }

  TARGET void expand_tail(bf16 (*out)[kStep]) const {
    for (int r = 0; r < 16; ++r) {
      const auto* v = reinterpret_cast<const bf16*>(values[r]);
      const avx512_bf16::Tail<bf16> tail(v, mask[r], row_bytes / kStep * kStep, row_bytes);
      avx512_bf16::store(out[r], avx512_bf16::expand(tail.values, tail.mask));
    }
  }
};
#undef TARGET
}  // namespace sparseforge::amx
#endif
