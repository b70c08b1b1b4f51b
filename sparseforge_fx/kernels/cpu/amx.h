// Tile matrix multiply of bfloat16: sixteen weight rows, expanded a step at a time, against up to 64 rows of x that were
// packed once per call (pairs of inputs side by side, as TDPBF16PS reads its second operand).
#pragma once

#include "numbers.h"

#ifdef SPARSEFORGE_X86
#include <sys/syscall.h>
#include <unistd.h>

#define AMX_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16,amx-int8")))

namespace sparseforge::amx {
#define TARGET AMX_TARGET

constexpr int64_t kStep = 32;                  // inputs per tile multiply
constexpr int64_t kTileElems = 16 * kStep;     // 1 KiB

inline int64_t steps_of(int64_t in) { return (in + kStep - 1) / kStep; }

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

// Sixteen times sixteen words of 32 bits, rows to columns.
INLINE void transpose(__m512 (&v)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
  }
  const auto low = [](__m512 a, __m512 b) TARGET __attribute__((always_inline)) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto high = [](__m512 a, __m512 b) TARGET __attribute__((always_inline)) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    v[i] = low(t[i], t[i + 2]);
    v[i + 1] = high(t[i], t[i + 2]);
    v[i + 2] = low(t[i + 1], t[i + 3]);
    v[i + 3] = high(t[i + 1], t[i + 3]);
  }
  constexpr int kEven = 0x88, kOdd = 0xdd;  // of the four lanes of 128 bits of each
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // v[4 b + c] has in lane l column 4 l + c of rows 4 b to 4 b + 3
    const __m512 even = _mm512_shuffle_f32x4(v[c], v[4 + c], kEven), odd = _mm512_shuffle_f32x4(v[c], v[4 + c], kOdd);
    const __m512 even2 = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], kEven);
    const __m512 odd2 = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], kOdd);
    t[c] = _mm512_shuffle_f32x4(even, even2, kEven);
    t[4 + c] = _mm512_shuffle_f32x4(odd, odd2, kEven);
    t[8 + c] = _mm512_shuffle_f32x4(even, even2, kOdd);
    t[12 + c] = _mm512_shuffle_f32x4(odd, odd2, kOdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i] = t[i];
}

// Up to sixteen rows of x [columns, in] -> [steps][16 pairs of inputs][16 rows of x], zeros outside.
TARGET inline void pack_x(const bf16* x, int64_t columns, int64_t in, void* rows) {
  for (int64_t s = 0; s < steps_of(in); ++s) {
    const int64_t count = std::min(kStep, in - s * kStep);
    const __mmask32 there = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    __m512 v[16];
#pragma GCC unroll 16
    for (int m = 0; m < 16; ++m)
      v[m] = m < columns ? _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(there, x + m * in + s * kStep)) : _mm512_setzero_ps();
    transpose(v);
    float* const to = static_cast<float*>(rows) + s * 256;
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) _mm512_storeu_ps(to + 16 * k, v[k]);
  }
}

// A step of sixteen weight rows times GROUPS groups of sixteen rows of x, an accumulator for each.
template <int GROUPS>
INLINE void multiply(const bf16* w, const bf16* x, int64_t group_stride) {
  static_assert(GROUPS >= 1 && GROUPS <= 4);
  _tile_loadd(4, w, 64);
  _tile_loadd(6, x, 64);
  _tile_dpbf16ps(0, 4, 6);
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

// A Block is sixteen weight rows: `steps` of them there are, and `expand` writes one. That happens while the tile unit
// works on an earlier one, and asks memory for what comes later, evenly over time: expanding a long piece first leaves
// memory idle during its products.
template <int GROUPS, class Block>
TARGET void tile_of(Block& block, const bf16* x, int64_t columns, float* out) {
  constexpr int64_t kRing = 4, kLag = 2;  // a tile load right behind the stores of the same memory waits for them
  alignas(64) bf16 w[kRing][16][kStep];
  alignas(64) float sums[4][16][16];  // [accumulator][weight row][row of x]
  const int64_t steps = block.steps, group_stride = steps * kTileElems;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps + kLag; ++s) {
    if (s < steps) block.expand(s, w[s % kRing]);
    fence();
    if (s >= kLag) multiply<GROUPS>(w[(s - kLag) % kRing][0], x + (s - kLag) * kTileElems, group_stride);
    fence();
  }
  _tile_stored(0, sums[0], 64);
  if (GROUPS > 1) _tile_stored(1, sums[1], 64);
  if (GROUPS > 2) _tile_stored(2, sums[2], 64);
  if (GROUPS > 3) _tile_stored(3, sums[3], 64);
  fence();
  for (int g = 0; g < GROUPS; ++g) {
    __m512 v[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) v[r] = _mm512_load_ps(sums[g][r]);
    transpose(v);
#pragma GCC unroll 16
    for (int m = 0; m < 16; ++m)
      if (16 * g + m < columns) _mm512_storeu_ps(out + (16 * g + m) * kTileRows, v[m]);
  }
}

template <class Block, class Job>
void tile(const Job& job, const void* x, int64_t columns, int64_t first, int64_t last, float* out) {
  Block block(job, first, last);
  const bf16* packed = static_cast<const bf16*>(x);
  switch ((columns + 15) / 16) {
    case 1:
      return tile_of<1>(block, packed, columns, out);
    case 2:
      return tile_of<2>(block, packed, columns, out);
    case 3:
      return tile_of<3>(block, packed, columns, out);
    default:
      return tile_of<4>(block, packed, columns, out);
  }
}

// Rows `first` to `last`, no more than sixteen, where they stand in the dense weight [out, in].
template <class Block, class Job>
TARGET void expand_rows(const Job& job, int64_t first, int64_t last, int64_t in, bf16* dense) {
  Block block(job, first, last);
  alignas(64) bf16 w[16][kStep];
  for (int64_t s = 0; s * kStep < in; ++s) {
    block.expand(s, w);
    const auto there = static_cast<__mmask32>((uint64_t{1} << std::min(kStep, in - s * kStep)) - 1);
    for (int64_t n = first; n <= last; ++n)
      _mm512_mask_storeu_epi16(dense + n * in + s * kStep, there, _mm512_load_si512(w[n - first]));
  }
}

// The scales of sixteen rows of int4 codes, of eight groups of inputs at a time.
struct GroupScales {
  const uint8_t* row[16];
  int64_t count, shift;  // of a row; how many steps share one, as a power of two
  alignas(32) float some[16][8];

  INLINE void load(int64_t step) {
    const int64_t group = step >> shift;
    if (step != group << shift || group % 8) return;
    const auto there = static_cast<__mmask8>((1 << std::min<int64_t>(8, count - group)) - 1);
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r)
      _mm256_store_ps(some[r], _mm256_cvtph_ps(_mm_maskz_loadu_epi16(there, row[r] + group * 2)));
  }

  // The sixteen codes times the scale of row r, in the order of their bits.
  INLINE __m256i table(int r, int64_t step) const {
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_mul_ps(codes, _mm512_set1_ps(some[r][(step >> shift) % 8]))));
  }
};
#undef TARGET
}  // namespace sparseforge::amx
#endif
