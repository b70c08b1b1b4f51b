// What all kernels share: number types and their conversions, prefetches, and the table of places of a byte of bitmask.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define SPARSEFORGE_X86 1
#include <immintrin.h>
#define PREFETCH(p) _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0)
#define PREFETCH_FAR(p) _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1)
#else
#define PREFETCH(p)
#define PREFETCH_FAR(p)
#endif
#define INLINE TARGET inline __attribute__((always_inline))

namespace sparseforge {

constexpr int64_t kTileRows = 16;     // weight rows (outputs) per task: one tile register, one cache line of float32
constexpr int64_t kMostColumns = 64;  // rows of x per pass over a weight, at most

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

// For each byte of bitmask: which of its four values belongs at each of the eight places (4: none, a zero), at which
// places the four values stand, and where in its group of four each of a group's two stands, twice for each group.
// Safe to index with for any byte, a damaged one too.
struct Places {
  alignas(64) uint8_t value_of_place[256][8];
  alignas(64) uint8_t place_of_value[256][4];
  alignas(64) int32_t place_in_group[256][8];

  Places() {
    for (int byte = 0; byte < 256; ++byte) {
      int count = 0;
      std::memset(place_of_value[byte], 0, 4);
      for (int place = 0; place < 8; ++place) {
        const bool kept = (byte >> place & 1) && count < 4;
        value_of_place[byte][place] = static_cast<uint8_t>(kept ? count : 4);
        if (kept) place_of_value[byte][count++] = static_cast<uint8_t>(place);
      }
      for (int lane = 0; lane < 8; ++lane)
        place_in_group[byte][lane] = place_of_value[byte][lane / 4 * 2 + lane % 2] % 4;
    }
  }
};

inline const Places places;

}  // namespace sparseforge
