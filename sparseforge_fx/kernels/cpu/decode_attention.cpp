// One query position attends to many: every key and value is read once, for all heads of the queries that share it, in
// parts of the positions that threads take in turn, as in FlashDecoding (arXiv 2311.01282); the parts' sums are put
// together afterwards.

#include "decode_attention.h"
#include "numbers.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <limits>
#include <tuple>
#include <utility>
#include <vector>

namespace sparseforge {

struct half {
  uint16_t bits;
};

inline float widen(half value) { return at::Half(value.bits, at::Half::from_bits()); }

inline void round_to(half& out, float value) { out.bits = at::Half(value).x; }

namespace {

constexpr int64_t kPart = 32;  // positions
constexpr int64_t kPadding = 16;  // rows of float32 end at a multiple of it
constexpr float kNever = -std::numeric_limits<float>::infinity();

int64_t padded(int64_t count) { return (count + kPadding - 1) / kPadding * kPadding; }

// What is added to scores: bytes that say what is seen, or float32, at strides of which any may be 0.
struct Mask {
  const uint8_t* seen = nullptr;
  const float* added = nullptr;
  int64_t batch = 0, head = 0, position = 0;

  Mask at(int64_t b, int64_t h) const {
    Mask here = *this;
    const int64_t to = b * batch + h * head;
    if (seen) here.seen += to;
    if (added) here.added += to;
    return here;
  }
  bool sees(int64_t h, int64_t p) const {
    const int64_t to = h * head + p * position;
    return seen ? seen[to] != 0 : added ? added[to] != kNever : true;
  }
  void add_to(float* scores, int64_t h, int64_t start, int64_t count) const {
    if (seen) {
      const uint8_t* const from = seen + h * head + start * position;
      for (int64_t p = 0; p < count; ++p) scores[p] = from[p * position] ? scores[p] : kNever;
    } else if (added) {
      const float* const from = added + h * head + start * position;
      for (int64_t p = 0; p < count; ++p) scores[p] += from[p * position];
    }
  }
};

// `queries` heads, from the mask's first one on, over `positions` positions from `start` on.
template <class T>
struct Part {
  const float* query;  // [queries, padded_size], scaled, zeros behind `size`
  const T *key, *value;
  Mask mask;
  int64_t queries, start, positions, size, padded_size, width, padded_width, key_step, value_step;
  float *most, *sum, *out;  // [queries], [queries], [queries, padded_width]
};

namespace portable {
#define TARGET
constexpr int kLanes = 4, kQueries = 2, kPositions = 2, kVectors = 2;
INLINE float sum(float __attribute__((vector_size(16))) v) { return (v[0] + v[2]) + (v[1] + v[3]); }
#include "decode_tile.h"
#undef TARGET
}  // namespace portable

#ifdef SPARSEFORGE_X86
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma")))
constexpr int kLanes = 8, kQueries = 2, kPositions = 4, kVectors = 4;
INLINE float sum(__m256 v) {
  const __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 b = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}
#include "decode_tile.h"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx2,fma")))
constexpr int kLanes = 16, kQueries = 4, kPositions = 4, kVectors = 4;
INLINE float sum(__m512 v) { return _mm512_reduce_add_ps(v); }
#include "decode_tile.h"
#undef TARGET
}  // namespace avx512
#endif

template <class T>
void attend(const Part<T>& part, Isa isa) {
#ifdef SPARSEFORGE_X86
  if (isa >= Isa::avx512) return avx512::attend(part);
  if (isa == Isa::avx2) return avx2::attend(part);
#endif
  portable::attend(part);
}

// The parts of one head's result -> itself. Parts in which it sees nothing have kNever and zeros.
template <class T>
void put_together(const float* parts, int64_t count, int64_t step, int64_t queries, int64_t query, int64_t width,
                  int64_t padded, T* to) {
  float most = kNever;
  for (int64_t c = 0; c < count; ++c) most = std::max(most, parts[c * step + query]);
  std::vector<float> row(width, 0.f);
  float sum = 0.f;
  for (int64_t c = 0; c < count; ++c) {
    const float* const part = parts + c * step;
    if (part[query] == kNever && part[queries + query] == 0.f) continue;
    const float share = std::exp(part[query] - most);
    sum += share * part[queries + query];
    const float* const from = part + 2 * queries + query * padded;
    for (int64_t d = 0; d < width; ++d) row[d] += share * from[d];
  }
  const float factor = sum == 0.f ? 0.f : 1.f / sum;
  for (int64_t d = 0; d < width; ++d) round_to(to[d], row[d] * factor);
}

// The positions from the first to the last that any query of a key's head sees.
std::pair<int64_t, int64_t> seen_by_any(const Mask& mask, int64_t queries, int64_t from, int64_t to) {
  const auto any = [&](int64_t p) {
    for (int64_t g = 0; g < (mask.head ? queries : 1); ++g)
      if (mask.sees(g, p)) return true;
    return false;
  };
  while (from < to && !any(from)) ++from;
  while (from < to && !any(to - 1)) --to;
  return {from, to};
}

template <class T>
void run(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const Mask& mask, float scale, Isa isa,
         at::Tensor& out) {
  const int64_t batch = query.size(0), heads = key.size(1), queries = query.size(1) / heads, size = query.size(3);
  const int64_t positions = key.size(2), width = value.size(3), parts = (positions + kPart - 1) / kPart;
  const int64_t padded_size = padded(size), padded_width = padded(width);
  const int64_t step = queries * (2 + padded_width);  // of a part: largest scores, sums, results
  const at::Tensor scratch = at::empty({batch * heads * parts * step}, at::kFloat);
  float* const found = scratch.mutable_data_ptr<float>();
  const auto data = [](const at::Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
  const T *q = data(query), *k = data(key), *v = data(value);
  at::parallel_for(0, batch * parts, 1, [&](int64_t first, int64_t last) {
    std::vector<float> scaled(queries * padded_size, 0.f);
    for (int64_t each = first; each < last; ++each) {
      const int64_t c = each % parts, b = each / parts, start = c * kPart, end = std::min(positions, start + kPart);
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t g = 0; g < queries; ++g) {
          const T* const row = q + b * query.stride(0) + (h * queries + g) * query.stride(1);
          for (int64_t d = 0; d < size; ++d) scaled[g * padded_size + d] = widen(row[d]) * scale;
        }
        const Mask here = mask.at(b, h * queries);
        const auto [from, to] = seen_by_any(here, queries, start, end);
        float* const at = found + ((b * heads + h) * parts + c) * step;
        const Part<T> part{scaled.data(),
                           k + b * key.stride(0) + h * key.stride(1) + from * key.stride(2),
                           v + b * value.stride(0) + h * value.stride(1) + from * value.stride(2),
                           here, queries, from, to - from, size, padded_size, width, padded_width,
                           key.stride(2), value.stride(2), at, at + queries, at + 2 * queries};
        attend(part, isa);
      }
    }
  });
  T* const to = static_cast<T*>(out.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / (parts * padded_width + 1));
  at::parallel_for(0, batch * heads * queries, grain, [&](int64_t first, int64_t last) {
    for (int64_t each = first; each < last; ++each)
      put_together(found + each / queries * parts * step, parts, step, queries, each % queries, width, padded_width,
                   to + each * width);
  });
}

at::Tensor with_rows(const at::Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); }

}  // namespace

at::Tensor decode_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const std::optional<at::Tensor>& mask, double scale, Isa isa) {
  const auto type = query.scalar_type();
  TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4 && query.size(2) == 1 &&
                  key.size(0) == query.size(0) && value.size(0) == query.size(0) && key.size(3) == query.size(3) &&
                  value.size(1) == key.size(1) && value.size(2) == key.size(2) && key.size(1) > 0 &&
                  query.size(1) % key.size(1) == 0,
              "decode_attention: query ", query.sizes(), " does not fit key ", key.sizes(), " and value ", value.sizes());
  TORCH_CHECK(key.scalar_type() == type && value.scalar_type() == type && query.is_cpu() && key.is_cpu() && value.is_cpu(),
              "decode_attention: query, key and value are of one type, on the CPU");
  // copies, where there are any, have to outlive what points into them
  const at::Tensor q = with_rows(query), k = with_rows(key), v = with_rows(value);
  at::Tensor given;
  Mask seen;
  if (mask) {
    TORCH_CHECK(mask->is_cpu() && (mask->scalar_type() == at::kBool || mask->is_floating_point()),
                "decode_attention: the mask is of numbers or bool, on the CPU");
    const bool adds = mask->is_floating_point();
    given = (adds ? mask->to(at::kFloat) : *mask).expand({q.size(0), q.size(1), 1, k.size(2)});
    if (adds) {
      seen.added = given.const_data_ptr<float>();
    } else {
      seen.seen = reinterpret_cast<const uint8_t*>(given.const_data_ptr<bool>());
    }
    std::tie(seen.batch, seen.head, seen.position) = std::tuple(given.stride(0), given.stride(1), given.stride(3));
  }
  at::Tensor out = at::empty({q.size(0), q.size(1), 1, v.size(3)}, q.options());
  const float factor = static_cast<float>(scale);
  if (type == at::kFloat) {
    run<float>(q, k, v, seen, factor, isa, out);
  } else if (type == at::kBFloat16) {
    run<bf16>(q, k, v, seen, factor, isa, out);
  } else {
    TORCH_CHECK(type == at::kHalf, "decode_attention: there is no kernel for ", type);
    run<half>(q, k, v, seen, factor, isa, out);
  }
  return out;
}

}  // namespace sparseforge
