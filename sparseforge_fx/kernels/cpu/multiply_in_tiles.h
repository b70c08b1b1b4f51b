// What the kernels on codes share: x in 8 bits once for all outputs, then sixteen outputs after sixteen, on all threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "numbers.h"
#include "rows_linear.h"

namespace sparseforge {

constexpr int64_t kTileRows = 16;    // weight rows (outputs) per task, as finish.h has them
constexpr int64_t kMaxColumns = 32;  // rows of x per pass over the weight
constexpr int64_t kStep = 64;        // inputs that are multiplied at a time
constexpr int64_t kRun = 4;          // steps whose x shares a scale, and whose weight scales are read at a time
constexpr int64_t kXGroup = kRun * kStep;

inline float half_of(const uint8_t* bytes) {
  const uint16_t bits = read<uint16_t>(bytes);
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
  return bits >> 15 ? -size : size;
}

inline bool has_vnni() {
#ifdef SPARSEFORGE_X86
  static const bool known = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
                            __builtin_cpu_supports("avx512vnni") &&
                            __builtin_cpu_supports("f16c");
  return known;
#else
  return false;
#endif
}

// One instruction set's. `rows`: rows of x as `quantize` wrote them, `run_bytes` for every kXGroup inputs.
template <class S, class Job>
struct TileKernel {
  void (*tile)(const Job&, const void* rows, int64_t columns, int64_t first, int64_t last, float* sums);
  void (*finish)(Activation, const float*, const float*, const S*, const S*, int64_t, S*);
  void (*quantize)(const S* x, int64_t in, int64_t runs, void* rows);
  size_t run_bytes;
};

// For sums of int8 codes: the scale of each output. Without scales it changes nothing.
struct ScaleOfOutputs {
  const uint8_t* scales;

  void operator()(float* sums, int64_t columns, int64_t first, int64_t last) const {
    if (!scales) return;
    for (int64_t r = 0; r < kTileRows; ++r) {
      const float scale = read<float>(scales + std::min(first + r, last) * 4);
      for (int64_t m = 0; m < columns; ++m) sums[m * kTileRows + r] *= scale;
    }
  }
};

// y = act(x W^T + b).
template <class S, class Job>
void multiply_in_tiles(const TileKernel<S, Job>& kernel, const Job& job, const S* x, int64_t columns, int64_t in,
                       int64_t out_features, const S* bias, Activation activation, S* y, const ScaleOfOutputs& scaled) {
  const bool gated = activation == Activation::silu_mul;
  const int64_t width = gated ? out_features / 2 : out_features;
  const int64_t runs = (in + kXGroup - 1) / kXGroup, row_bytes = runs * static_cast<int64_t>(kernel.run_bytes);
  const at::Tensor memory = at::empty({columns * row_bytes + 64}, at::kByte);
  auto* rows = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data_ptr()) + 63) / 64 * 64);
  at::parallel_for(0, columns, std::max<int64_t>(1, 16384 / in), [&](int64_t from, int64_t to) {
    for (int64_t m = from; m < to; ++m) kernel.quantize(x + m * in, in, runs, rows + m * row_bytes);
  });

  const int64_t tiles = (width + kTileRows - 1) / kTileRows;
  const int64_t work = kTileRows * in * (1 + columns) * (gated ? 2 : 1);
  at::parallel_for(0, tiles, std::max<int64_t>(1, 262144 / std::max<int64_t>(1, work)), [&](int64_t from, int64_t to) {
    alignas(64) float sums[kMaxColumns * kTileRows], second[kMaxColumns * kTileRows];
    for (int64_t m = 0; m < columns; m += kMaxColumns) {
      const int64_t part = std::min(kMaxColumns, columns - m);
      for (int64_t t = from; t < to; ++t) {
        const int64_t first = t * kTileRows, count = std::min(kTileRows, width - first);
        kernel.tile(job, rows + m * row_bytes, part, first, width - 1, sums);
        scaled(sums, part, first, width - 1);
        if (gated) {
          kernel.tile(job, rows + m * row_bytes, part, width + first, 2 * width - 1, second);
          scaled(second, part, width + first, 2 * width - 1);
        }
        for (int64_t i = 0; i < part; ++i)
          kernel.finish(activation, sums + i * kTileRows, second + i * kTileRows, bias ? bias + first : nullptr,
                        bias && gated ? bias + width + first : nullptr, count, y + (m + i) * width + first);
      }
    }
  });
}

// The output of a linear on codes: calls with x, bias and y as pointers to bfloat16 or float32. `x` is contiguous.
template <class Call>
at::Tensor with_output(const at::Tensor& x, int64_t out_features, const std::optional<at::Tensor>& bias,
                       Activation activation, const Call& call) {
  auto sizes = x.sizes().vec();
  sizes.back() = activation == Activation::silu_mul ? out_features / 2 : out_features;
  at::Tensor y = at::empty(sizes, x.options());
  if (y.numel() == 0) return y;
  const at::Tensor b = bias ? bias->contiguous() : at::Tensor();
  const auto typed = [&](auto zero) {
    using S = decltype(zero);
    call(static_cast<const S*>(x.const_data_ptr()), bias ? static_cast<const S*>(b.const_data_ptr()) : nullptr,
         static_cast<S*>(y.mutable_data_ptr()));
  };
  if (x.scalar_type() == at::kBFloat16) {
    typed(bf16{});
  } else {
    TORCH_CHECK(x.scalar_type() == at::kFloat, "bfloat16 or float32 only");
    typed(0.f);
  }
  return y;
}

}  // namespace sparseforge
