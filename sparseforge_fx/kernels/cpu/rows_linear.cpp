// y = act(x W^T + b), W as packed.py writes it (values and bitmask, row by row).
//
// The instruction set is chosen at run time; one library serves every x86-64 machine, and the portable code any other.

#include "rows_linear.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <string>
#include <vector>

namespace sparseforge {

constexpr int64_t kTileRows = 16;    // weight rows (outputs) per task: one tile register, one cache line of float32
constexpr int64_t kMaxColumns = 64;  // rows of x per pass over the weight
constexpr int64_t kMinColumns = 32;  // the same where rows of x are long: fewer would not pay for expanding again
constexpr int64_t kChunk = 512;      // inputs that are expanded at a time
constexpr int64_t kAhead = 2048;     // bytes from the values in use to those that are prefetched
constexpr int64_t kMaskAhead = 256;  // the same of the bitmask
constexpr int64_t kPassBytes = 1 << 20;  // of x per pass, to stay in the second-level cache
constexpr int64_t kAmxColumns = 2;   // tile registers pay from so many rows of x

struct Job {
  const void* values;   // [out, padded / 2]
  const uint8_t* mask;  // [out, padded / 8]
  int64_t padded;       // `in` rounded up to a multiple of 8
  int64_t x_stride;     // `in` rounded up to whole steps of the kernel: length of a row of x in scratch
};

}  // namespace sparseforge

#include "primitives.h"
#include "amx.h"

namespace sparseforge {
namespace {

const std::vector<std::string> kIsaNames = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

bool supported(Isa isa) {
#ifdef SPARSEFORGE_X86
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f");
  static const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                                  __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16");
  static const bool amx = avx512_bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                          amx::request_permission();
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_bf16:
      return avx512_bf16;
    case Isa::amx:
      return amx;
  }
#endif
  return isa == Isa::portable;
}

// One instruction set's functions for weights of type S.
template <class S>
struct Kernel {
  int64_t step;                 // inputs per step
  int64_t elem_bytes;           // of x in scratch
  bool needs_tiles, packs_x;
  void (*tile)(const Job&, const void* x, int64_t columns, int64_t first, int64_t last, float* out);
  void (*finish)(Activation, const float*, const float*, const S*, const S*, int64_t, S*);
};

template <class S>
Kernel<S> kernel_of(Isa isa, int64_t columns) {
#ifdef SPARSEFORGE_X86
  if constexpr (std::is_same_v<S, bf16>) {
    if (isa == Isa::amx && columns >= kAmxColumns) return {32, 2, true, true, amx::tile, avx512_bf16::finish<S>};
    if (isa >= Isa::avx512_bf16) return {32, 2, false, false, avx512_bf16::tile<S>, avx512_bf16::finish<S>};
  }
  // for one row of bfloat16, permuting is faster than compressing with masks
  const bool narrow = std::is_same_v<S, bf16> && columns == 1;
  if (isa >= Isa::avx512 && !narrow) return {16, 4, false, false, avx512::tile<S>, avx512::finish<S>};
  if (isa >= Isa::avx2) return {columns > 1 ? 8 : avx2::kKept, 4, false, false, avx2::tile<S>, avx2::finish<S>};
#endif
  return {8, 4, false, false, portable::tile<S>, portable::finish<S>};
}

// x in the kernel's type, zeros up to a whole step. Places of the weight beyond `in` meet these zeros, never x.
template <class S>
void prepare_x(const Kernel<S>& kernel, const S* x, int64_t columns, int64_t in, int64_t stride, void* scratch) {
#ifdef SPARSEFORGE_X86
  if constexpr (std::is_same_v<S, bf16>) {
    if (kernel.packs_x) {
      const int64_t groups = (columns + 15) / 16;
      at::parallel_for(0, groups, 1, [&](int64_t from, int64_t to) {
        for (int64_t g = from; g < to; ++g)
          amx::pack_x(x, columns, in, stride / 32, g, static_cast<bf16*>(scratch) + g * stride * 16);
      });
      return;
    }
  }
#endif
  at::parallel_for(0, columns, std::max<int64_t>(1, 65536 / stride), [&](int64_t from, int64_t to) {
    for (int64_t m = from; m < to; ++m) {
      if (kernel.elem_bytes == static_cast<int64_t>(sizeof(S))) {
        S* row = static_cast<S*>(scratch) + m * stride;
        std::memcpy(row, x + m * in, in * sizeof(S));
        std::memset(row + in, 0, (stride - in) * sizeof(S));
      } else {
        float* row = static_cast<float*>(scratch) + m * stride;
        for (int64_t k = 0; k < in; ++k) row[k] = widen(x[m * in + k]);
        std::memset(row + in, 0, (stride - in) * sizeof(float));
      }
    }
  });
}

template <class S>
void run(const S* x, int64_t columns, int64_t in, const S* values, const uint8_t* mask, int64_t out_features,
         const S* bias, Activation activation, Isa isa, S* y) {
  const Kernel<S> kernel = kernel_of<S>(isa, columns);
  const int64_t padded = (in + 7) / 8 * 8, stride = (in + kernel.step - 1) / kernel.step * kernel.step;
  const bool gated = activation == Activation::silu_mul;
  const int64_t width = gated ? out_features / 2 : out_features;
  const Job job{values, mask, padded, stride};

  at::Tensor scratch;
  const void* prepared = x;
  if (stride != in || kernel.packs_x || kernel.elem_bytes != static_cast<int64_t>(sizeof(S))) {
    const int64_t rows = kernel.packs_x ? (columns + 15) / 16 * 16 : columns;
    scratch = at::empty({rows * stride * kernel.elem_bytes}, at::kByte);
    prepare_x(kernel, x, columns, in, stride, scratch.data_ptr());
    prepared = scratch.data_ptr();
  }

  const int64_t tiles = (width + kTileRows - 1) / kTileRows;
  const int64_t pass = std::clamp(kPassBytes / (stride * kernel.elem_bytes) / 16 * 16, kMinColumns, kMaxColumns);
  const int64_t work = kTileRows * padded * (1 + columns / 4) * (gated ? 2 : 1);
  at::parallel_for(0, tiles, std::max<int64_t>(1, 131072 / std::max<int64_t>(1, work)), [&](int64_t from, int64_t to) {
#ifdef SPARSEFORGE_X86
    std::optional<amx::Tiles> registers;
    if (kernel.needs_tiles) registers.emplace();
#endif
    alignas(64) float sums[kMaxColumns * kTileRows], second[kMaxColumns * kTileRows];
    // passes outside: their x stays in the cache for all tiles, and reading the packed weight again costs less
    for (int64_t m = 0; m < columns; m += pass) {
      const int64_t part = std::min(pass, columns - m);
      const char* rows = static_cast<const char*>(prepared) + m * stride * kernel.elem_bytes;
      for (int64_t t = from; t < to; ++t) {
        const int64_t first = t * kTileRows, count = std::min(kTileRows, width - first);
        kernel.tile(job, rows, part, first, width - 1, sums);
        if (gated) kernel.tile(job, rows, part, width + first, 2 * width - 1, second);
        for (int64_t i = 0; i < part; ++i)
          kernel.finish(activation, sums + i * kTileRows, second + i * kTileRows, bias ? bias + first : nullptr,
                        bias && gated ? bias + width + first : nullptr, count, y + (m + i) * width + first);
      }
    }
  });
}

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (size_t i = 0; i < kIsaNames.size(); ++i)
    if (supported(static_cast<Isa>(i))) names.push_back(kIsaNames[i]);
  return names;
}

Isa isa_named(std::string_view name) {
  for (size_t i = kIsaNames.size(); i-- > 0;)
    if ((name.empty() || name == kIsaNames[i]) && supported(static_cast<Isa>(i))) return static_cast<Isa>(i);
  TORCH_CHECK(false, "this machine has no instruction set '", name, "'");
}

std::optional<Activation> activation_named(std::string_view name) {
  static constexpr std::string_view names[] = {"none", "relu", "gelu", "gelu_tanh", "silu", "silu_mul"};
  for (size_t i = 0; i < std::size(names); ++i)
    if (names[i] == name) return static_cast<Activation>(i);
  return std::nullopt;
}

bool is_packed(const at::Tensor& values, const at::Tensor& mask, int64_t in_features) {
  const int64_t padded = (in_features + 7) / 8 * 8;
  return in_features > 0 && values.dim() == 2 && mask.dim() == 2 && values.size(1) * 2 == padded &&
         mask.size(1) * 8 == padded && mask.size(0) == values.size(0) && mask.scalar_type() == at::kByte;
}

bool fits(const at::Tensor& x, const at::Tensor& values, int64_t in_features, const std::optional<at::Tensor>& bias,
          Activation activation, bool codes) {
  const int64_t out_features = values.size(0);
  const auto dtype = codes ? x.scalar_type() : values.scalar_type();
  const auto same = [&](const at::Tensor& t) { return t.is_cpu() && t.scalar_type() == dtype; };
  return x.dim() > 0 && x.size(-1) == in_features && same(x) &&
         (!bias || (bias->dim() == 1 && bias->size(0) == out_features && same(*bias))) &&
         (activation != Activation::silu_mul || out_features % 2 == 0);
}

at::Tensor rows_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& mask, int64_t in_features,
                       const std::optional<at::Tensor>& bias, Activation act, Isa isa) {
  TORCH_CHECK(is_packed(values, mask, in_features), "not a packed weight");
  TORCH_CHECK(fits(x, values, in_features, bias, act), "x, bias or activation does not fit the packed weight");
  const int64_t out_features = values.size(0);
  const at::Tensor xc = x.contiguous(), vc = values.contiguous(), mc = mask.contiguous();
  const at::Tensor bc = bias ? bias->contiguous() : at::Tensor();
  auto sizes = x.sizes().vec();
  sizes.back() = act == Activation::silu_mul ? out_features / 2 : out_features;
  at::Tensor y = at::empty(sizes, x.options());
  if (y.numel() == 0) return y;
  const auto call = [&](auto zero) {
    using S = decltype(zero);
    run<S>(static_cast<const S*>(xc.const_data_ptr()), x.numel() / in_features, in_features,
           static_cast<const S*>(vc.const_data_ptr()), mc.const_data_ptr<uint8_t>(), out_features,
           bias ? static_cast<const S*>(bc.const_data_ptr()) : nullptr, act, isa,
           static_cast<S*>(y.mutable_data_ptr()));
  };
  if (x.scalar_type() == at::kBFloat16) {
    call(bf16{});
  } else {
    TORCH_CHECK(x.scalar_type() == at::kFloat, "bfloat16 or float32 only");
    call(0.f);
  }
  return y;
}

namespace {

template <class T>
void expand_all(const T* values, const uint8_t* mask, int64_t out_features, int64_t in, T* dense) {
  const int64_t padded = (in + 7) / 8 * 8;
  at::parallel_for(0, out_features, std::max<int64_t>(1, 32768 / padded), [&](int64_t from, int64_t to) {
    for (int64_t n = from; n < to; ++n) {
      const T* v = values + n * (padded / 2);
      const uint8_t* m = mask + n * (padded / 8);
      for (int64_t k = 0; k < in; k += 8, v += 4, ++m) {
        const T kept[5] = {v[0], v[1], v[2], v[3], 0};
        T eight[8];
        for (int i = 0; i < 8; ++i) eight[i] = kept[places.value_of_place[*m][i]];
        std::memcpy(dense + n * in + k, eight, std::min<int64_t>(8, in - k) * sizeof(T));
      }
    }
  });
}

}  // namespace

at::Tensor rows_dense(const at::Tensor& values, const at::Tensor& mask, int64_t in_features) {
  TORCH_CHECK(is_packed(values, mask, in_features), "not a packed weight");
  const at::Tensor vc = values.contiguous(), mc = mask.contiguous();
  at::Tensor dense = at::empty({values.size(0), in_features}, values.options());
  const auto* bits = mc.const_data_ptr<uint8_t>();
  if (values.element_size() == 2) {
    expand_all(static_cast<const uint16_t*>(vc.const_data_ptr()), bits, values.size(0), in_features,
               static_cast<uint16_t*>(dense.mutable_data_ptr()));
  } else {
    TORCH_CHECK(values.element_size() == 4, "types of two or four bytes only");
    expand_all(static_cast<const uint32_t*>(vc.const_data_ptr()), bits, values.size(0), in_features,
               static_cast<uint32_t*>(dense.mutable_data_ptr()));
  }
  return dense;
}

}  // namespace sparseforge
