// What the codes of int4 stand for, and the scales of its groups (formats.py, scales.py).
#pragma once

#include <ATen/core/Tensor.h>

#include "numbers.h"

namespace sparseforge {

constexpr int64_t kFine = 16;      // inputs of a group whose scale has 8 bits, times that of its row
constexpr int64_t kRowBytes = 4;   // behind the scales of such groups
constexpr int kAbove = 72;         // makes every level unsigned, within 127; of a code of four bits it changes bits alone

// Of templates that are told the bits of a code: four bits, which stand for levels.
constexpr int kLevels = -4;
constexpr int bits_of(int bits) { return bits == kLevels ? 4 : bits; }

// By the four bits of a code, which are in two's complement; four times over, for shuffles that look at six bits.
struct alignas(64) Levels {
  int8_t of[64];
  uint8_t above[64];  // plus kAbove

  explicit Levels(const int8_t (&least_first)[16]) {
    for (int i = 0; i < 64; ++i) {
      of[i] = least_first[i % 16 ^ 8];
      above[i] = static_cast<uint8_t>(of[i] + kAbove);
    }
  }
};

inline const Levels& levels_of(int64_t group, bool sparse) {
  static const Levels themselves({-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7});
  static const Levels dense({-63, -49, -38, -29, -22, -16, -10, -5, 0, 5, 10, 16, 23, 30, 40, 53});
  static const Levels two_four({-63, -53, -41, -33, -26, -19, -13, -7, 0, 9, 15, 21, 27, 35, 43, 55});
  return group != kFine ? themselves : sparse ? two_four : dense;
}

inline float half_of(const uint8_t* bytes) {
  const uint16_t bits = read<uint16_t>(bytes);
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
  return bits >> 15 ? -size : size;
}

// Of the group that input k is in, by where the scales of its row are; without that of the row.
inline float group_scale(const uint8_t* scales, int64_t k, int64_t group) {
  return group == kFine ? static_cast<float>(static_cast<int8_t>(scales[k / kFine])) : half_of(scales + k / group * 2);
}

// Inputs that share a scale of int4, of so many columns; and whether there are kernels for such.
inline int64_t group_of(const at::Tensor& scales, int64_t in) {
  if (scales.scalar_type() == at::kChar) return kFine;
  return scales.size(1) > 0 && in % scales.size(1) == 0 ? in / scales.size(1) : 0;
}
inline bool has_groups(const at::Tensor& scales, int64_t in) {
  const int64_t group = group_of(scales, in);
  if (group == kFine) return in % kFine == 0 && scales.scalar_type() == at::kChar && scales.size(1) == in / kFine + kRowBytes;
  return scales.scalar_type() == at::kHalf && (group == 32 || group == 128);
}

// Where the scales of the groups from `step` on, a multiple of four, lie in those of a row.
inline int64_t scales_at(int64_t step, int64_t group) { return group == 128 ? step / 2 * 2 : step * 4; }

#ifdef SPARSEFORGE_X86
// The scales of 256 inputs as sixteen floats, one for each sixteen inputs, of the bytes where these begin.
struct Sixteen {
  __m256 low, high;
};

__attribute__((always_inline, target("avx2,f16c"))) inline Sixteen sixteen_of(__m128i bytes, int64_t group) {
  if (group == kFine)
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes)))};
  const __m256 found = _mm256_cvtph_ps(bytes);
  if (group == 32)
    return {_mm256_permutevar8x32_ps(found, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)),
            _mm256_permutevar8x32_ps(found, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7))};
  return {_mm256_permutevar8x32_ps(found, _mm256_setzero_si256()), _mm256_permutevar8x32_ps(found, _mm256_set1_epi32(1))};
}
#endif

}  // namespace sparseforge
