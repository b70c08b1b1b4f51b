// Tile matrix multiply of bfloat16: sixteen weight rows, expanded a chunk at a time, against 16 to 64 rows of x that
// were packed once per call (pairs of inputs side by side, as TDPBF16PS reads its second operand).
#pragma once

#include "primitives.h"

#ifdef SPARSEFORGE_X86
#include <sys/syscall.h>
#include <unistd.h>

namespace sparseforge::amx {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,amx-tile,amx-bf16")))

using avx512_bf16::expand_row;
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
    for (int64_t k = 0; k < in; ++k) out[k / 2 * 32 + m * 2 + k % 2] = row[k];
  }
}

// GROUPS groups of sixteen rows of x. Four accumulators whatever GROUPS is: one multiply takes 52 cycles, but a new
// one can start every 16. With one or two groups they take turns along the inputs.
template <int GROUPS>
TARGET void multiply(const bf16* w, const bf16* x, int64_t group_stride, int64_t steps) {
  static_assert(GROUPS >= 1 && GROUPS <= 4);
  for (int64_t s = 0; s < steps; s += (GROUPS == 1 ? 4 : GROUPS == 2 ? 2 : 1)) {
    const bf16* b = x + s * kTileElems;
    _tile_loadd(4, w + s * kStep, 2 * kChunk);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (GROUPS == 1) {
      if (s + 1 < steps) {
        _tile_loadd(5, w + (s + 1) * kStep, 2 * kChunk);
        _tile_loadd(7, b + kTileElems, 64);
        _tile_dpbf16ps(1, 5, 7);
      }
      if (s + 2 < steps) {
        _tile_loadd(4, w + (s + 2) * kStep, 2 * kChunk);
        _tile_loadd(6, b + 2 * kTileElems, 64);
        _tile_dpbf16ps(2, 4, 6);
      }
      if (s + 3 < steps) {
        _tile_loadd(5, w + (s + 3) * kStep, 2 * kChunk);
        _tile_loadd(7, b + 3 * kTileElems, 64);
        _tile_dpbf16ps(3, 5, 7);
      }
    } else {
      _tile_loadd(7, b + group_stride, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (GROUPS == 2) {
      if (s + 1 < steps) {
        _tile_loadd(5, w + (s + 1) * kStep, 2 * kChunk);
        _tile_loadd(6, b + kTileElems, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_loadd(7, b + kTileElems + group_stride, 64);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    if constexpr (GROUPS >= 3) {
      _tile_loadd(6, b + 2 * group_stride, 64);
      _tile_dpbf16ps(2, 4, 6);
    }
    if constexpr (GROUPS == 4) {
      _tile_loadd(7, b + 3 * group_stride, 64);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
}

template <int GROUPS>
TARGET void tile_of(const Job& job, const bf16* x, int64_t columns, int64_t first, int64_t last, float* out) {
  alignas(64) bf16 w[16 * kChunk];
  alignas(64) float sums[4][16][16];  // [accumulator][weight row][row of x]
  const int64_t steps = job.x_stride / kStep, group_stride = steps * kTileElems;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < job.x_stride; k += kChunk) {
    const int64_t to = std::min<int64_t>(k + kChunk, job.x_stride);
    for (int r = 0; r < 16; ++r) {
      const int64_t row = std::min(first + r, last);
      expand_row(job, row, k, to, avx512_bf16::Soon<bf16>(job, row, to, row + 16), w + r * kChunk);
    }
    fence();
    multiply<GROUPS>(w, x + k / kStep * kTileElems, group_stride, (to - k) / kStep);
  }
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  fence();
  for (int64_t m = 0; m < columns; ++m) {
    const int64_t g = m / 16, j = m % 16;
    for (int r = 0; r < 16; ++r) {
      if constexpr (GROUPS == 1) {
        out[m * 16 + r] = (sums[0][r][j] + sums[1][r][j]) + (sums[2][r][j] + sums[3][r][j]);
      } else if constexpr (GROUPS == 2) {
        out[m * 16 + r] = sums[g][r][j] + sums[g + 2][r][j];
      } else {
        out[m * 16 + r] = sums[g][r][j];
      }
    }
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
