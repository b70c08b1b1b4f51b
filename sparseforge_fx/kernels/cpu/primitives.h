// What differs between instruction sets: one namespace each, with the same few functions. Everything else (tile.h,
// finish.h) is written once and included into each namespace, because a function template carries only one target.
//
//   kLanes            inputs (places of a weight row) per step
//   kKept             the same of dot_kept
//   Elem              how x and expanded weights lie in scratch memory
//   Vec, Acc          kLanes Elems; float32 partial sums
//   expand            kLanes/2 survivors + kLanes/8 bytes of bitmask -> kLanes weights, zeros at the pruned places
//   Half, dot_kept    the opposite way, for one row of x: keep kKept/2 of kKept xs where the weight survives, then
//                     multiply by the values
#pragma once

#include "numbers.h"

namespace sparseforge {

namespace portable {
#define TARGET
constexpr int kLanes = 8;
constexpr int kKept = 8;
constexpr int kColumns = 2;
using Elem = float;
struct Vec {
  float lane[8];
};
using Acc = Vec;
struct Half {
  float lane[4];
};

INLINE Vec load(const float* p) {
  Vec out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}
INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
template <class V>
INLINE Vec expand(const V* values, const uint8_t* mask) {
  const uint8_t* from = places.value_of_place[*mask];
  const float kept[5] = {widen(values[0]), widen(values[1]), widen(values[2]), widen(values[3]), 0.f};
  Vec out;
  for (int i = 0; i < 8; ++i) out.lane[i] = kept[from[i]];
  return out;
}
INLINE Acc multiply_add(Acc acc, Vec w, Vec x) {
  for (int i = 0; i < 8; ++i) acc.lane[i] += w.lane[i] * x.lane[i];
  return acc;
}
template <class V>
INLINE Half dot_kept(Half acc, const V* values, const uint8_t* mask, const float* x) {
  const uint8_t* at = places.place_of_value[*mask];
  for (int i = 0; i < 4; ++i) acc.lane[i] += widen(values[i]) * x[at[i]];
  return acc;
}
INLINE float sum(Half a) { return (a.lane[0] + a.lane[1]) + (a.lane[2] + a.lane[3]); }
INLINE float sum(Acc a) {
  return ((a.lane[0] + a.lane[4]) + (a.lane[1] + a.lane[5])) + ((a.lane[2] + a.lane[6]) + (a.lane[3] + a.lane[7]));
}
#include "finish.h"
#include "tile.h"
#undef TARGET
}  // namespace portable

#ifdef SPARSEFORGE_X86
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma")))
constexpr int kLanes = 8;
constexpr int kKept = 64;
constexpr int kColumns = 2;  // sixteen registers: 4 weights, 2 x 4 sums
using Elem = float;
using Vec = __m256;
using Acc = __m256;
using Half = __m256;

INLINE __m128 four(const float* p) { return _mm_loadu_ps(p); }
INLINE __m128 four(const bf16* p) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 16));
}
INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
template <class V>
INLINE Vec expand(const V* values, const uint8_t* mask) {
  const __m128i from = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(places.value_of_place[*mask]));
  return _mm256_permutevar8x32_ps(_mm256_zextps128_ps256(four(values)), _mm256_cvtepu8_epi32(from));
}
INLINE Acc multiply_add(Acc acc, Vec w, Vec x) { return _mm256_fmadd_ps(w, x, acc); }

// Eight values, those of the third group of four places before those of the second: in that order x comes out of
// permutations within groups of four, the cheapest there are.
INLINE __m256 eight(const float* p) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_loadu_pd(reinterpret_cast<const double*>(p)), 0b11011000));
}
INLINE __m256 eight(const bf16* p) {  // one shuffle: to the upper half of each float32, and into order
  const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i from = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 8, 9, -1, -1, 10, 11,  //
                                        -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 12, 13, -1, -1, 14, 15);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, from));
}
INLINE __m256 kept_of(const float* x, uint64_t mask_times_32) {
  const char* const table = reinterpret_cast<const char*>(places.place_in_group);
  const auto from = _mm256_load_si256(reinterpret_cast<const __m256i*>(table + (mask_times_32 & 255 * 32)));
  return _mm256_permutevar_ps(_mm256_loadu_ps(x), from);
}
template <class V>
INLINE Half dot_kept(Half acc, const V* values, const uint8_t* mask, const float* x) {
  const uint64_t bits = read<uint64_t>(mask);
#pragma GCC unroll 4
  for (int k = 0; k < kKept; k += 16) {
    const __m256 low = kept_of(x + k, k > 0 ? bits >> (k - 5) : bits << 5), high = kept_of(x + k + 8, bits >> (k + 3));
    acc = _mm256_fmadd_ps(eight(values + k / 2), _mm256_blend_ps(low, high, 0b11001100), acc);
  }
  return acc;
}
INLINE float sum(Acc a) {
  __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  b = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
#include "finish.h"
#include "tile.h"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx2,fma")))
constexpr int kLanes = 16;
constexpr int kKept = 16;
constexpr int kColumns = 4;
using Elem = float;
using Vec = __m512;
using Acc = __m512;
using Half = __m256;

INLINE __m256 eight(const float* p) { return _mm256_loadu_ps(p); }
INLINE __m256 eight(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
template <class V>
INLINE Vec expand(const V* values, const uint8_t* mask) {
  return _mm512_maskz_expand_ps(read<uint16_t>(mask), _mm512_castps256_ps512(eight(values)));
}
INLINE Acc multiply_add(Acc acc, Vec w, Vec x) { return _mm512_fmadd_ps(w, x, acc); }
template <class V>
INLINE Half dot_kept(Half acc, const V* values, const uint8_t* mask, const float* x) {
  const __m512 kept = _mm512_maskz_compress_ps(read<uint16_t>(mask), _mm512_loadu_ps(x));
  return _mm256_fmadd_ps(eight(values), _mm512_castps512_ps256(kept), acc);
}
INLINE float sum(Half a) {
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
INLINE float sum(Acc a) { return _mm512_reduce_add_ps(a); }
#include "finish.h"
#include "tile.h"
#undef TARGET
}  // namespace avx512

namespace avx512_bf16 {  // pairs of bfloat16 products are summed in float32; subnormal bfloat16 count as zero
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,avx2,fma")))
constexpr int kLanes = 32;
constexpr int kKept = 32;
constexpr int kColumns = 4;
using Elem = bf16;
using Vec = __m512i;
using Acc = __m512;
using Half = __m256;

INLINE Vec load(const bf16* p) { return _mm512_loadu_si512(p); }
INLINE void store(bf16* p, Vec v) { _mm512_storeu_si512(p, v); }
INLINE Vec expand(const bf16* values, const uint8_t* mask) {
  const __m256i kept = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  return _mm512_maskz_expand_epi16(read<uint32_t>(mask), _mm512_castsi256_si512(kept));
}
INLINE Acc multiply_add(Acc acc, Vec w, Vec x) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
}
INLINE Half dot_kept(Half acc, const bf16* values, const uint8_t* mask, const bf16* x) {
  const __m512i kept = _mm512_maskz_compress_epi16(read<uint32_t>(mask), _mm512_loadu_si512(x));
  const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  const __m256i low = _mm512_castsi512_si256(kept);
  return _mm256_dpbf16_ps(acc, reinterpret_cast<__m256bh>(w), reinterpret_cast<__m256bh>(low));
}
INLINE float sum(Half a) {
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
INLINE float sum(Acc a) { return _mm512_reduce_add_ps(a); }
#include "finish.h"
#include "tile.h"
#undef TARGET
}  // namespace avx512_bf16
#endif

}  // namespace sparseforge
