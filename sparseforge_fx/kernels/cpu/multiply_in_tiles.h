// What all kernels share: x as they want it, once for all outputs, then sixteen outputs after sixteen, on all threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <optional>

#include "amx.h"
#include "levels.h"
#include "rows_linear.h"

namespace sparseforge {

constexpr int64_t kMaxColumns = 32;  // rows of x per pass over a weight of codes, if not in tile registers
constexpr int64_t kStep = 64;        // inputs that are multiplied at a time
constexpr int64_t kRun = 4;          // steps whose x shares a scale, and whose weight scales are read at a time
constexpr int64_t kXGroup = kRun * kStep;

// Rows of x per pass over a weight that is expanded for each: few enough to stay in the second-level cache, and where they
// are long still so many that expanding again pays.
inline int64_t pass_of(int64_t row_bytes) {
  constexpr int64_t kBytes = 1 << 20, kLeast = 32;
  return std::clamp(kBytes / row_bytes / 16 * 16, kLeast, kMostColumns);
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

// One instruction set's, for x of so many rows and inputs.
template <class S, class Job>
struct TileKernel {
  // sums [columns][kTileRows] of the outputs from `first` on, `last` being the last that there is
  void (*tile)(const Job&, const void* rows, int64_t columns, int64_t first, int64_t last, float* sums);
  void (*finish)(Activation, const float*, const float*, const S*, const S*, int64_t, S*);
  // Rows of x as `tile` wants them, so many at a time; null: as they are.
  void (*prepare)(const S* x, int64_t columns, int64_t in, void* rows);
  int64_t together;   // rows that are prepared together
  int64_t row_bytes;  // of a prepared row
  int64_t pass;       // rows of x per pass over the weight
  int64_t at_once;    // rows of x that cost no more than one
  bool amx = false;   // it needs tile registers
};

#ifdef SPARSEFORGE_X86
// In tile registers.
template <class Job>
TileKernel<bf16, Job> amx_kernel(decltype(TileKernel<bf16, Job>::tile) tile, decltype(TileKernel<bf16, Job>::finish) finish,
                                 int64_t in) {
  const int64_t row_bytes = amx::steps_of(in) * amx::kStep * static_cast<int64_t>(sizeof(bf16));
  return {tile, finish, amx::pack_x, 16, row_bytes, pass_of(row_bytes), 4, true};
}
#endif

#ifdef SPARSEFORGE_X86
// The dense weight in bfloat16, of what a kernel for tile registers expands.
template <class Block, class Job>
at::Tensor expanded(const Job& job, int64_t out, int64_t in) {
  at::Tensor dense = at::empty({out, in}, at::kBFloat16);
  auto* const to = static_cast<bf16*>(dense.mutable_data_ptr());
  at::parallel_for(0, (out + kTileRows - 1) / kTileRows, std::max<int64_t>(1, 32768 / (kTileRows * in)), [&](int64_t from, int64_t end) {
    for (int64_t first = from * kTileRows; first < std::min(out, end * kTileRows); first += kTileRows)
      amx::expand_rows<Block>(job, first, std::min(out, first + kTileRows) - 1, in, to);
  });
  return dense;
}
#endif

// For sums of codes: the scale of each output, a float32 every `stride` bytes. Without scales it changes nothing.
struct ScaleOfOutputs {
  const uint8_t* scales;
  int64_t stride = 4;

  void operator()(float* sums, int64_t columns, int64_t first, int64_t last) const {
    if (!scales) return;
    for (int64_t r = 0; r < kTileRows; ++r) {
      const float scale = read<float>(scales + std::min(first + r, last) * stride);
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
  at::Tensor memory;
  const auto* rows = reinterpret_cast<const char*>(x);
  if (kernel.prepare) {
    const int64_t groups = (columns + kernel.together - 1) / kernel.together, group_bytes = kernel.together * kernel.row_bytes;
    memory = at::empty({groups * group_bytes + 64}, at::kByte);
    auto* const to = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data_ptr()) + 63) / 64 * 64);
    at::parallel_for(0, groups, std::max<int64_t>(1, 16384 / (in * kernel.together)), [&](int64_t from, int64_t end) {
      for (int64_t g = from; g < end; ++g) {
        const int64_t m = g * kernel.together;
        kernel.prepare(x + m * in, std::min(kernel.together, columns - m), in, to + g * group_bytes);
      }
    });
    rows = to;
  }

  const int64_t tiles = (width + kTileRows - 1) / kTileRows;
  const int64_t work = kTileRows * in * (1 + columns / kernel.at_once) * (gated ? 2 : 1);
  at::parallel_for(0, tiles, std::max<int64_t>(1, 131072 / work), [&](int64_t from, int64_t to) {
#ifdef SPARSEFORGE_X86
    std::optional<amx::Tiles> registers;
    if (kernel.amx) registers.emplace();
#endif
    alignas(64) float sums[kMostColumns * kTileRows], second[kMostColumns * kTileRows];
    const auto sum = [&](const char* of, int64_t part, int64_t first, int64_t last, float* found) {
      kernel.tile(job, of, part, first, last, found);
      scaled(found, part, first, last);
    };
    // passes outside: their x stays in the cache for all tiles, and reading the packed weight again costs less
    for (int64_t m = 0; m < columns; m += kernel.pass) {
      const int64_t part = std::min(kernel.pass, columns - m);
      for (int64_t t = from; t < to; ++t) {
        const int64_t first = t * kTileRows, count = std::min(kTileRows, width - first);
        sum(rows + m * kernel.row_bytes, part, first, width - 1, sums);
        if (gated) sum(rows + m * kernel.row_bytes, part, width + first, 2 * width - 1, second);
        for (int64_t i = 0; i < part; ++i)
          kernel.finish(activation, sums + i * kTileRows, second + i * kTileRows, bias ? bias + first : nullptr,
                        bias && gated ? bias + width + first : nullptr, count, y + (m + i) * width + first);
      }
    }
  });
}

// The output of a linear: calls with x, bias and y as pointers to bfloat16 or float32. `x` is contiguous.
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
