// What differs between instruction sets: one namespace each, with the same few functions. Everything else (tile.h,
// finish.h) is written once and included into each namespace, because a function template carries only one target.
//
//   kLanes            inputs (places of a weight row) per step
//   Elem              how x and expanded weights lie in scratch memory
//   Vec, Acc          kLanes Elems; float32 partial sums
//   expand            kLanes/2 survivors + kLanes/8 bytes of bitmask -> kLanes weights, zeros at the pruned places
//   Half, dot_kept    the opposite way, for one row of x: keep x where the weight survives, then multiply by the values
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define SPARSEFORGE_X86 1
#include <immintrin.h>
#define PREFETCH(p) _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0)
#else
#define PREFETCH(p)
#endif
#define INLINE TARGET inline __attribute__((always_inline))

namespace sparseforge {

struct bf16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline void round_to(float& out, float value) { out = value; }

inline void round_to(bf16& out, float value) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

template <class T>
inline T read(const uint8_t* bytes) {
  T out;
  std::memcpy(&out, bytes, sizeof(T));
  return out;
}

// For each byte of bitmask: which of its four values belongs at each of the eight places (4: none, a zero), and at
// which places the four values stand. Safe to index with for any byte, a damaged one too.
struct Places {
  alignas(64) uint8_t value_of_place[256][8];
  alignas(64) uint8_t place_of_value[256][4];

  Places() {
    for (int byte = 0; byte < 256; ++byte) {
      int count = 0;
      std::memset(place_of_value[byte], 0, 4);
      for (int place = 0; place < 8; ++place) {
        const bool kept = (byte >> place & 1) && count < 4;
        value_of_place[byte][place] = static_cast<uint8_t>(kept ? count : 4);
        if (kept) place_of_value[byte][count++] = static_cast<uint8_t>(place);
      }
    }
  }
};

inline const Places places;

namespace portable {
#define TARGET
constexpr int kLanes = 8;
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
constexpr int kColumns = 2;  // sixteen registers: 4 weights, 2 x 4 sums
using Elem = float;
using Vec = __m256;
using Acc = __m256;
using Half = __m128;

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
template <class V>
INLINE Half dot_kept(Half acc, const V* values, const uint8_t* mask, const float* x) {
  const __m128i at = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(read<int32_t>(places.place_of_value[*mask])));
  const __m256 kept = _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), _mm256_castsi128_si256(at));
  return _mm_fmadd_ps(four(values), _mm256_castps256_ps128(kept), acc);
}
INLINE float sum(Half a) {
  a = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}
INLINE float sum(Acc a) { return sum(_mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1))); }
#include "finish.h"
#include "tile.h"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx2,fma")))
constexpr int kLanes = 16;
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
