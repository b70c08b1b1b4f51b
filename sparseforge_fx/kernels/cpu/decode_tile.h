// One part of decode_attention.cpp: the heads of the queries that read the same keys, over at most kPart positions.
// Included into each namespace that has a TARGET and registers of kLanes float32; kQueries, kPositions and kVectors say
// how many sums there are registers for.

using Lanes = float __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));

#include "exp_of.h"

INLINE Lanes widened(const float* p) {
  Lanes out;
  std::memcpy(&out, p, sizeof(out));
  return out;
}

INLINE Lanes widened(const bf16* p) {
  Halves bits;
  std::memcpy(&bits, p, sizeof(bits));
  return reinterpret_cast<Lanes>(__builtin_convertvector(bits, Words) << 16);
}

INLINE Lanes widened(const half* p) {  // by integers: conversions of half need an extension of their own
  Halves bits;
  std::memcpy(&bits, p, sizeof(bits));
  const Words word = __builtin_convertvector(bits, Words) << 16, twice = word + word;
  const Lanes normal = reinterpret_cast<Lanes>((twice >> 4) + (0xe0u << 23)) * 0x1.0p-112f;
  const Lanes subnormal = reinterpret_cast<Lanes>((twice >> 17) | (126u << 23)) - 0.5f;
  const Words small = reinterpret_cast<Words>(twice < (1u << 27));
  const Words found = (reinterpret_cast<Words>(subnormal) & small) | (reinterpret_cast<Words>(normal) & ~small);
  return reinterpret_cast<Lanes>(found | (word & 0x80000000u));
}

// kLanes numbers, the first `count` of which are there, or, WHOLE, all.
template <bool WHOLE, class T>
INLINE Lanes loaded(const T* p, int64_t count) {
  if constexpr (WHOLE) return widened(p);
  T some[kLanes] = {};
  std::memcpy(some, p, count * sizeof(T));
  return widened(some);
}

template <int POSITIONS, int QUERIES, bool WHOLE, class T>
INLINE void multiply(const float* query, int64_t padded, const T* key, int64_t step, int64_t count,
                     Lanes (*sums)[POSITIONS]) {
  Lanes k[POSITIONS];
#pragma GCC unroll 4
  for (int p = 0; p < POSITIONS; ++p) k[p] = loaded<WHOLE>(key + p * step, count);
#pragma GCC unroll 4
  for (int g = 0; g < QUERIES; ++g) {
    const Lanes q = widened(query + g * padded);
#pragma GCC unroll 4
    for (int p = 0; p < POSITIONS; ++p) sums[g][p] += q * k[p];
  }
}

// Scores of QUERIES queries with POSITIONS keys.
template <int QUERIES, int POSITIONS, class T>
INLINE void score(const float* query, int64_t padded, int64_t size, const T* key, int64_t step, float* scores) {
  Lanes sums[QUERIES][POSITIONS] = {};
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes)
    multiply<POSITIONS, QUERIES, true>(query + d, padded, key + d, step, kLanes, sums);
  if (d < size) multiply<POSITIONS, QUERIES, false>(query + d, padded, key + d, step, size - d, sums);
#pragma GCC unroll 4
  for (int g = 0; g < QUERIES; ++g)
#pragma GCC unroll 4
    for (int p = 0; p < POSITIONS; ++p) scores[g * kPart + p] = sum(sums[g][p]);
}

// Rows that will be wanted soon.
template <class T>
INLINE void fetch(const T* row, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t d = 0; d < count; d += kLine) PREFETCH_FAR(row + d);
}

template <int QUERIES, class T>
TARGET void score_all(const Part<T>& part, const float* query, float* scores) {
  int64_t p = 0;
  for (; p + kPositions <= part.positions; p += kPositions) {
    for (int i = 0; i < kPositions; ++i) fetch(part.value + (p + i) * part.value_step, part.width);
    score<QUERIES, kPositions>(query, part.padded_size, part.size, part.key + p * part.key_step, part.key_step,
                               scores + p);
  }
  for (; p < part.positions; ++p)
    score<QUERIES, 1>(query, part.padded_size, part.size, part.key + p * part.key_step, part.key_step, scores + p);
}

// out[g] = the sum over positions of shares[g] times VECTORS vectors of value.
template <int QUERIES, int VECTORS, bool WHOLE, class T>
INLINE void gather(const float* shares, const T* value, int64_t step, int64_t positions, int64_t count, float* out,
                   int64_t padded) {
  Lanes sums[QUERIES][VECTORS] = {};
  for (int64_t p = 0; p < positions; ++p) {
    Lanes v[VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) v[i] = loaded<WHOLE>(value + p * step + i * kLanes, count);
#pragma GCC unroll 4
    for (int g = 0; g < QUERIES; ++g)
#pragma GCC unroll 4
      for (int i = 0; i < VECTORS; ++i) sums[g][i] += shares[g * kPart + p] * v[i];
  }
#pragma GCC unroll 4
  for (int g = 0; g < QUERIES; ++g)
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) std::memcpy(out + g * padded + i * kLanes, &sums[g][i], sizeof(Lanes));
}

template <int QUERIES, class T>
TARGET void gather_all(const Part<T>& part, const float* shares, float* out) {
  const auto [value, step, positions, width, padded] =
      std::tuple(part.value, part.value_step, part.positions, part.width, part.padded_width);
  for (int64_t p = 0; p < positions; ++p) fetch(part.key + (kPart + p) * part.key_step, part.size);
  int64_t d = 0;
  for (; d + kVectors * kLanes <= width; d += kVectors * kLanes)
    gather<QUERIES, kVectors, true>(shares, value + d, step, positions, kLanes, out + d, padded);
  for (; d + kLanes <= width; d += kLanes)
    gather<QUERIES, 1, true>(shares, value + d, step, positions, kLanes, out + d, padded);
  if (d < width) gather<QUERIES, 1, false>(shares, value + d, step, positions, width - d, out + d, padded);
}

// Scores [kPart] -> e to the power of what they are below the largest one, which is returned with their sum. Behind
// `count` they are kNever. Of a query that sees nothing all become zero.
TARGET inline std::pair<float, float> soften(float* scores, int64_t count) {
  std::fill(scores + count, scores + kPart, kNever);
  float lanes[16];
  std::fill(lanes, lanes + 16, kNever);
  for (int64_t p = 0; p < kPart; p += 16)
    for (int64_t i = 0; i < 16; ++i) lanes[i] = lanes[i] < scores[p + i] ? scores[p + i] : lanes[i];
  const float most = *std::max_element(lanes, lanes + 16);
  for (int64_t p = 0; p < kPart; ++p) {
    const float share = exp_of(scores[p] - most);
    scores[p] = scores[p] == kNever ? 0.f : share;
  }
  std::fill(lanes, lanes + 16, 0.f);
  for (int64_t p = 0; p < kPart; p += 16)
    for (int64_t i = 0; i < 16; ++i) lanes[i] += scores[p + i];
  float sum = 0.f;
  for (const float lane : lanes) sum += lane;
  return {most, sum};
}

template <int QUERIES, class T>
INLINE void some_queries(const Part<T>& part, int64_t first, float* scores) {
  score_all<QUERIES>(part, part.query + first * part.padded_size, scores);
  for (int g = 0; g < QUERIES; ++g) {
    float* const row = scores + g * kPart;
    part.mask.add_to(row, first + g, part.start, part.positions);
    std::tie(part.most[first + g], part.sum[first + g]) = soften(row, part.positions);
  }
  gather_all<QUERIES>(part, scores, part.out + first * part.padded_width);
}

template <class T>
TARGET void attend(const Part<T>& part) {
  alignas(64) float scores[kQueries * kPart];
  int64_t g = 0;
  for (; g + kQueries <= part.queries; g += kQueries) some_queries<kQueries>(part, g, scores);
  if constexpr (kQueries > 3)
    for (; g + 3 <= part.queries; g += 3) some_queries<3>(part, g, scores);
  if constexpr (kQueries > 2)
    for (; g + 2 <= part.queries; g += 2) some_queries<2>(part, g, scores);
  for (; g < part.queries; ++g) some_queries<1>(part, g, scores);
}
