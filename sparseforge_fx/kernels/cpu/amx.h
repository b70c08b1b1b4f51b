// Tile matrix multiply of bfloat16: sixteen weight rows, expanded a step at a time, against 16 to 64 rows of x that
// were packed once per call (pairs of inputs side by side, as TDPBF16PS reads its second operand).
#pragma once

#include "primitives.h"

#ifdef SPARSEFORGE_X86
#include <sys/syscall.h>
#include <unistd.h>

namespace sparseforge::amx {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,amx-tile,amx-bf16")))

constexpr int64_t kStep = 32;                  // inputs per tile multiply
constexpr int64_t kTileElems = 16 * kStep;     // 1 KiB

inline bool request_permission() {  // the kernel gives tile registers only to processes that ask
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// GCC's tile intrinsics do not tell the optimiser that they touch memory: a constant needs no telling, and scratch
// memory is fenced.
inline const Config config;
inline void fence() { asm volatile("" ::: "memory"); }

// Tile registers of this thread while it lives.
struct Tiles {
  TARGET Tiles() { _tile_loadconfig(&config); }
  TARGET ~Tiles() { _tile_release(); }
};

// x [columns, in] -> [columns / 16][steps][16 pairs of inputs][16 rows of x], zeros outside.
inline void pack_x(const bf16* x, int64_t columns, int64_t in, int64_t steps, int64_t group, bf16* out) {
  std::memset(out, 0, steps * kTileElems * sizeof(bf16));
  const int64_t first = group * 16, count = std::min<int64_t>(16, columns - first);
  for (int64_t m = 0; m < count; ++m) {
    const bf16* row = x + (first + m) * in;
    for (int64_t k = 0; k < in / 2; ++k) std::memcpy(out + k * 32 + m * 2, row + k * 2, 2 * sizeof(bf16));
    if (in % 2) out[in / 2 * 32 + m * 2] = row[in - 1];
  }
}

// Sixteen weight rows, read side by side. A step of them is expanded while the tile unit works on an earlier one, and
// memory is asked for what comes kAhead bytes later, evenly over time: expanding a long piece first leaves memory idle
// during its products.
struct Block {
  static constexpr int64_t kAhead = 512, kMaskAhead = 64;  // bytes
  const char* values[16];  // of rows of padded / 2 bfloat16: as many bytes as `padded`
  const uint8_t* mask[16];
  int64_t row_bytes, mask_bytes;

  Block(const Job& job, int64_t first, int64_t last) : row_bytes(job.padded), mask_bytes(job.padded / 8) {
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
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      const auto* v = reinterpret_cast<const bf16*>(values[r] + step * 32);
      avx512_bf16::store(out[r], avx512_bf16::expand(v, mask[r] + step * 4));
    }
  }

  TARGET void expand_tail(int64_t padded, bf16 (*out)[kStep]) const {
    for (int r = 0; r < 16; ++r) {
      const auto* v = reinterpret_cast<const bf16*>(values[r]);
      const avx512_bf16::Tail<bf16> tail(v, mask[r], padded / kStep * kStep, padded);
      avx512_bf16::store(out[r], avx512_bf16::expand(tail.values, tail.mask));
    }
  }
};

// GROUPS groups of sixteen rows of x, an accumulator for each; with one group, two take turns along the inputs, because
// a multiply takes 52 cycles, but a new one can start every 16.
template <int GROUPS>
INLINE void multiply(const bf16* w, const bf16* x, int64_t group_stride, bool odd) {
  static_assert(GROUPS >= 1 && GROUPS <= 4);
  _tile_loadd(4, w, 64);
  _tile_loadd(6, x, 64);
  if (GROUPS == 1 && odd) {
    _tile_dpbf16ps(1, 4, 6);
  } else {
    _tile_dpbf16ps(0, 4, 6);
  }
  if constexpr (GROUPS >= 2) {
    _tile_loadd(7, x + group_stride, 64);
    _tile_dpbf16ps(1, 4, 7);
  }
  if constexpr (GROUPS >= 3) {
    _tile_loadd(6, x + 2 * group_stride, 64);
    _tile_dpbf16ps(2, 4, 6);
  }
  if constexpr (GROUPS == 4) {
    _tile_loadd(7, x + 3 * group_stride, 64);
    _tile_dpbf16ps(3, 4, 7);
  }
}

template <int GROUPS>
TARGET void tile_of(const Job& job, const bf16* x, int64_t columns, int64_t first, int64_t last, float* out) {
  constexpr int64_t kRing = 4, kLag = 2;  // a tile load right behind the stores of the same memory waits for them
  alignas(64) bf16 w[kRing][16][kStep];
  alignas(64) float sums[4][16][16];  // [accumulator][weight row][row of x]
  const int64_t steps = job.x_stride / kStep, whole = job.padded / kStep, group_stride = steps * kTileElems;
  const Block block(job, first, last);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps + kLag; ++s) {
    if (s < whole) {
      block.prefetch(s);
      block.expand(s, w[s % kRing]);
    } else if (s < steps) {
      block.expand_tail(job.padded, w[s % kRing]);
    }
    fence();
    if (s >= kLag)
      multiply<GROUPS>(w[(s - kLag) % kRing][0], x + (s - kLag) * kTileElems, group_stride, (s - kLag) % 2 != 0);
    fence();
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  fence();
  for (int64_t m = 0; m < columns; ++m) {
    const int64_t g = m / 16, j = m % 16;
    for (int r = 0; r < 16; ++r)
      out[m * 16 + r] = GROUPS == 1 ? sums[0][r][j] + sums[1][r][j] : sums[g][r][j];
  }
}

inline void tile(const Job& job, const void* x, int64_t columns, int64_t first, int64_t last, float* out) {
  const bf16* packed = static_cast<const bf16*>(x);
  switch ((columns + 15) / 16) {
    case 1:
      return tile_of<1>(job, packed, columns, first, last, out);
    case 2:
      return tile_of<2>(job, packed, columns, first, last, out);
    case 3:
      return tile_of<3>(job, packed, columns, first, last, out);
    default:
      return tile_of<4>(job, packed, columns, first, last, out);
  }
}
#undef TARGET
}  // namespace sparseforge::amx
#endif
