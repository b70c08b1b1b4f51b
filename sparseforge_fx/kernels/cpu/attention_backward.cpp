// dQ, dK and dV of attention in blocks of kRows queries x kColumns keys, as in FlashAttention-2 (arXiv 2307.08691,
// algorithm 2), multiplied by torch's own block product (brgemm, oneDNN's): torch's kernel for CPUs calls BLAS for each
// block of each head instead, and computes blocks that a mask has ruled out, too.
//
// The second operand of a block product has the pairs of its rows side by side ("packed" below), as the instructions
// for bfloat16 want it.

#include "attention_backward.h"
#include "numbers.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty_like.h>

#include <limits>
#include <vector>

#ifdef SPARSEFORGE_X86
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#else
#define TARGET
#endif

namespace sparseforge {
namespace {

namespace blas = at::native::cpublas;

#include "exp_of.h"

constexpr int64_t kRows = 256;
constexpr int64_t kColumns = 128;
constexpr float kNever = -std::numeric_limits<float>::infinity();

const bf16* data(const at::Tensor& t) { return reinterpret_cast<const bf16*>(t.const_data_ptr<at::BFloat16>()); }

// Inner dimensions are even: behind an odd one stands a zero.
constexpr int64_t even(int64_t count) { return (count + 1) / 2 * 2; }

void multiply(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t lda, const uint32_t* packed, int64_t ldb,
              float* c, int64_t ldc, bool add) {
  blas::brgemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const at::BFloat16*>(a),
               reinterpret_cast<const at::BFloat16*>(packed), c);
}

// [rows, columns] -> [columns, rows]; Word: one number, or a pair of them.
template <class Word>
void transpose(const bf16* from, int64_t rows, int64_t columns, int64_t stride, Word* to, int64_t to_stride) {
  constexpr int64_t kBlock = 16, kNumbers = sizeof(Word) / sizeof(bf16);
  for (int64_t row = 0; row < rows; row += kBlock)
    for (int64_t column = 0; column < columns; ++column)
      for (int64_t r = row; r < std::min(rows, row + kBlock); ++r)
        std::memcpy(to + column * to_stride + r, from + r * stride + column * kNumbers, sizeof(Word));
}

// Two rows side by side; of an odd last one the other is null.
TARGET void pair_up(const bf16* first, const bf16* second, int64_t count, uint32_t* packed) {
  for (int64_t i = 0; i < count; ++i)
    packed[i] = first[i].bits | (second ? static_cast<uint32_t>(second[i].bits) << 16 : 0u);
}

TARGET float dot(const bf16* a, const bf16* b, int64_t count) {
  float lanes[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int64_t lane = 0; lane < 16; ++lane) lanes[lane] += widen(a[i + lane]) * widen(b[i + lane]);
  float sum = 0;
  for (; i < count; ++i) sum += widen(a[i]) * widen(b[i]);
  for (float lane : lanes) sum += lane;
  return sum;
}

// One query's row of a block: scores and dP = dO V^T -> P and dS / scale.
TARGET void soften(const float* scores, const float* d_shares, const float* mask, float logsumexp, float delta,
                   float scale, int64_t count, bf16* shares, bf16* d_scores) {
  for (int64_t j = 0; j < count; ++j) {
    const float score = scores[j] * scale + mask[j];  // lost where the mask is the least number, as in logsumexp
    const float share = mask[j] == kNever ? 0.f : exp_of(score - logsumexp);
    round_to(shares[j], share);
    round_to(d_scores[j], share * (d_shares[j] - delta));
  }
}

TARGET void scaled(const float* from, int64_t count, float scale, bf16* to) {
  for (int64_t i = 0; i < count; ++i) round_to(to[i], from[i] * scale);
}

TARGET bool sees_any(const bf16* mask, int64_t count) {
  constexpr uint16_t kNeverBits = 0xff80;
  int any = 0;
  for (int64_t j = 0; j < count; ++j) any |= mask[j].bits != kNeverBits;
  return any;
}

// A tensor [B, H, L, D] whose last dimension is dense; the mask repeats over dimensions of size 1.
struct Heads {
  const bf16* at;
  int64_t batch, head, row;

  explicit Heads(const at::Tensor& t)
      : at(data(t)),
        batch(t.size(0) == 1 ? 0 : t.stride(0)),
        head(t.size(1) == 1 ? 0 : t.stride(1)),
        row(t.stride(2)) {}
  const bf16* of(int64_t b, int64_t h) const { return at + b * batch + h * head; }
};

struct Attention {
  Heads gradient, query, key, value, out;
  std::optional<Heads> mask;
  const float* logsumexp;
  int64_t queries, keys, size;
  bool causal;
  float scale;

  // The mask's rows of a block as float32, in `to`; false where no query sees a key.
  bool mask_of(int64_t b, int64_t h, int64_t i0, int64_t rows, int64_t j0, int64_t columns, float* to) const {
    if (causal && j0 >= i0 + rows) return false;
    const bf16* from = mask ? mask->of(b, h) + i0 * mask->row + j0 : nullptr;
    if (from) {
      bool any = false;
      for (int64_t i = 0; i < rows && !any; ++i) any = sees_any(from + i * mask->row, columns);
      if (!any) return false;
    }
    for (int64_t i = 0; i < rows; ++i) {
      float* row = to + i * kColumns;
      for (int64_t j = 0; j < columns; ++j) row[j] = from ? widen(from[i * mask->row + j]) : 0.f;
      if (causal)
        for (int64_t j = std::max<int64_t>(0, i0 + i + 1 - j0); j < columns; ++j) row[j] = kNever;
    }
    return true;
  }
};

// What one thread works with, for one head at a time.
class Head {
 public:
  explicit Head(const Attention& a)
      : a_(a),
        key_pairs_(a.size / 2 * a.keys), value_pairs_(a.size / 2 * a.keys), packed_key_(even(a.keys) / 2 * a.size),
        query_t_(a.size * even(a.queries)), gradient_t_(a.size * even(a.queries)),
        d_key_t_(a.size * a.keys), d_value_t_(a.size * a.keys), d_query_(kRows * a.size),
        scores_(kRows * kColumns), d_shares_(kRows * kColumns), mask_(kRows * kColumns),
        shares_(kRows * kColumns), d_scores_(kRows * kColumns),
        packed_shares_(kRows / 2 * kColumns), packed_d_scores_(kRows / 2 * kColumns) {}

  void compute(int64_t b, int64_t h, int64_t heads, at::Tensor& d_query, at::Tensor& d_key, at::Tensor& d_value) {
    const bf16 *query = a_.query.of(b, h), *gradient = a_.gradient.of(b, h), *key = a_.key.of(b, h);
    transpose(key, a_.keys, a_.size / 2, a_.key.row, key_pairs_.data(), a_.keys);
    transpose(a_.value.of(b, h), a_.keys, a_.size / 2, a_.value.row, value_pairs_.data(), a_.keys);
    transpose(query, a_.queries, a_.size, a_.query.row, query_t_.data(), even(a_.queries));
    transpose(gradient, a_.queries, a_.size, a_.gradient.row, gradient_t_.data(), even(a_.queries));
    pack(key, a_.keys, a_.key.row, a_.size, a_.size, packed_key_.data());
    std::fill(d_key_t_.begin(), d_key_t_.end(), 0.f);
    std::fill(d_value_t_.begin(), d_value_t_.end(), 0.f);
    for (int64_t i0 = 0; i0 < a_.queries; i0 += kRows) {
      const int64_t rows = std::min(kRows, a_.queries - i0);
      rows_of(b, h, heads, i0, rows);
      bf16* to = written(d_query, b, h) + i0 * d_query.stride(2);
      for (int64_t i = 0; i < rows; ++i)
        scaled(d_query_.data() + i * a_.size, a_.size, a_.scale, to + i * d_query.stride(2));
    }
    turn_back(d_key_t_, a_.scale, written(d_key, b, h), d_key.stride(2));
    turn_back(d_value_t_, 1.f, written(d_value, b, h), d_value.stride(2));
  }

 private:
  void rows_of(int64_t b, int64_t h, int64_t heads, int64_t i0, int64_t rows) {
    const bf16* query = a_.query.of(b, h) + i0 * a_.query.row;
    const bf16* gradient = a_.gradient.of(b, h) + i0 * a_.gradient.row;
    const bf16* out = a_.out.of(b, h) + i0 * a_.out.row;
    const float* logsumexp = a_.logsumexp + (b * heads + h) * a_.queries + i0;
    float delta[kRows];
    for (int64_t i = 0; i < rows; ++i) delta[i] = dot(gradient + i * a_.gradient.row, out + i * a_.out.row, a_.size);
    std::fill(d_query_.begin(), d_query_.end(), 0.f);
    for (int64_t j0 = 0; j0 < a_.keys; j0 += kColumns) {
      const int64_t columns = std::min(kColumns, a_.keys - j0);
      if (!a_.mask_of(b, h, i0, rows, j0, columns, mask_.data())) continue;
      multiply(rows, columns, a_.size, query, a_.query.row, key_pairs_.data() + j0, a_.keys, scores_.data(), kColumns,
               false);
      multiply(rows, columns, a_.size, gradient, a_.gradient.row, value_pairs_.data() + j0, a_.keys, d_shares_.data(),
               kColumns, false);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = i * kColumns;
        soften(scores_.data() + at, d_shares_.data() + at, mask_.data() + at, logsumexp[i], delta[i], a_.scale, columns,
               shares_.data() + at, d_scores_.data() + at);
        if (columns % 2) d_scores_[at + columns] = {};
      }
      pack(shares_.data(), rows, kColumns, columns, kColumns, packed_shares_.data());
      pack(d_scores_.data(), rows, kColumns, columns, kColumns, packed_d_scores_.data());
      multiply(rows, a_.size, even(columns), d_scores_.data(), kColumns, packed_key_.data() + j0 / 2 * a_.size, a_.size,
               d_query_.data(), a_.size, true);
      multiply(a_.size, columns, even(rows), gradient_t_.data() + i0, even(a_.queries), packed_shares_.data(), kColumns,
               d_value_t_.data() + j0, a_.keys, true);
      multiply(a_.size, columns, even(rows), query_t_.data() + i0, even(a_.queries), packed_d_scores_.data(), kColumns,
               d_key_t_.data() + j0, a_.keys, true);
    }
  }

  static void pack(const bf16* from, int64_t rows, int64_t stride, int64_t count, int64_t packed_stride, uint32_t* to) {
    for (int64_t i = 0; i < rows; i += 2)
      pair_up(from + i * stride, i + 1 < rows ? from + (i + 1) * stride : nullptr, count, to + i / 2 * packed_stride);
  }

  static bf16* written(at::Tensor& t, int64_t b, int64_t h) {
    return reinterpret_cast<bf16*>(t.mutable_data_ptr<at::BFloat16>()) + b * t.stride(0) + h * t.stride(1);
  }

  // [size, keys] -> [keys, size]
  void turn_back(const std::vector<float>& from, float scale, bf16* to, int64_t stride) const {
    constexpr int64_t kBlock = 16;
    for (int64_t j0 = 0; j0 < a_.keys; j0 += kBlock)
      for (int64_t d = 0; d < a_.size; ++d)
        for (int64_t j = j0; j < std::min(a_.keys, j0 + kBlock); ++j)
          round_to(to[j * stride + d], from[d * a_.keys + j] * scale);
  }

  const Attention& a_;
  std::vector<uint32_t> key_pairs_, value_pairs_, packed_key_;
  std::vector<bf16> query_t_, gradient_t_;
  std::vector<float> d_key_t_, d_value_t_, d_query_, scores_, d_shares_, mask_;
  std::vector<bf16> shares_, d_scores_;
  std::vector<uint32_t> packed_shares_, packed_d_scores_;
};

// Rows that a block product can step over: dense, and each behind the one before (an expanded gradient's are not).
at::Tensor with_rows(const at::Tensor& t) {
  return t.stride(3) == 1 && t.stride(2) >= t.size(3) ? t : t.contiguous();
}

}  // namespace

bool multiplies_bf16_blocks() { return blas::could_pack(at::kBFloat16); }

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& gradient, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const std::optional<at::Tensor>& mask, const at::Tensor& out, const at::Tensor& logsumexp, bool causal,
    double scale) {
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), size = query.size(3);
  TORCH_CHECK(size % 2 == 0 && key.sizes() == value.sizes() && key.size(0) == batch && key.size(1) == heads &&
                  key.size(3) == size && gradient.sizes() == query.sizes() && out.sizes() == query.sizes() &&
                  logsumexp.numel() == batch * heads * queries && logsumexp.scalar_type() == at::kFloat,
              "attention_backward: sizes do not fit");
  std::optional<at::Tensor> seen;
  if (mask) {
    TORCH_CHECK(mask->dim() == 4 && (mask->size(0) == 1 || mask->size(0) == batch) &&
                    (mask->size(1) == 1 || mask->size(1) == heads) && mask->size(2) == queries &&
                    mask->size(3) == key.size(2),
                "attention_backward: a mask has a place for each query and key");
    seen = mask->stride(3) == 1 ? *mask : mask->contiguous();
  }
  // copies, where there are any, have to outlive what points into them
  const at::Tensor kept[] = {with_rows(gradient), with_rows(query), with_rows(key), with_rows(value),
                             with_rows(out), logsumexp.contiguous()};
  const Attention attention{Heads(kept[0]), Heads(kept[1]), Heads(kept[2]), Heads(kept[3]), Heads(kept[4]),
                            seen ? std::optional<Heads>(Heads(*seen)) : std::nullopt, kept[5].const_data_ptr<float>(),
                            queries, key.size(2), size, causal, static_cast<float>(scale)};
  auto d_query = at::empty_like(kept[1]), d_key = at::empty_like(kept[2]), d_value = at::empty_like(kept[3]);
  at::parallel_for(0, batch * heads, 1, [&](int64_t first, int64_t last) {
    Head head(attention);
    for (int64_t each = first; each < last; ++each)
      head.compute(each / heads, each % heads, heads, d_query, d_key, d_value);
    blas::brgemm_release();
  });
  return {d_query, d_key, d_value};
}

}  // namespace sparseforge
