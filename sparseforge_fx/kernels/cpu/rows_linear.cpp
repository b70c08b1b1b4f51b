// y = act(x W^T + b), W as packed.py writes it (values and bitmask, row by row).
//
// The instruction set is chosen at run time; one library serves every x86-64 machine, and the portable code any other.

#include "rows_linear.h"

#include "multiply_in_tiles.h"

#include <string>
#include <vector>

namespace sparseforge {

constexpr int64_t kChunk = 512;      // inputs that are expanded at a time
constexpr int64_t kAhead = 2048;     // bytes from the values in use to those that are prefetched
constexpr int64_t kMaskAhead = 256;  // the same of the bitmask
constexpr int64_t kAmxColumns = 2;   // tile registers pay from so many rows of x

struct Job {
  const void* values;   // [out, padded / 2]
  const uint8_t* mask;  // [out, padded / 8]
  int64_t padded;       // `in` rounded up to a multiple of 8
  int64_t x_stride;     // `in` rounded up to whole steps of the kernel: length of a row of x in scratch
};

}  // namespace sparseforge

#include "primitives.h"
#include "amx_rows.h"

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
                          __builtin_cpu_supports("amx-int8") && amx::request_permission();
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

// A row of x in the kernel's type, zeros up to a whole step. Places of the weight beyond `in` meet these zeros, never x.
template <int STEP, class Elem, class S>
void prepare(const S* x, int64_t, int64_t in, void* rows) {
  auto* const row = static_cast<Elem*>(rows);
  if constexpr (std::is_same_v<Elem, S>) {
    std::memcpy(row, x, in * sizeof(S));
  } else {
    for (int64_t k = 0; k < in; ++k) row[k] = widen(x[k]);
  }
  std::memset(row + in, 0, ((in + STEP - 1) / STEP * STEP - in) * sizeof(Elem));
}

// A kernel, and the length of a row of x as it wants it.
template <class S>
using Stepped = std::pair<TileKernel<S, Job>, int64_t>;

template <int STEP, class Elem, class S>
Stepped<S> by_rows(decltype(TileKernel<S, Job>::tile) tile, decltype(TileKernel<S, Job>::finish) finish, int64_t in) {
  const bool ready = std::is_same_v<Elem, S> && in % STEP == 0;
  const int64_t stride = (in + STEP - 1) / STEP * STEP, row_bytes = stride * static_cast<int64_t>(sizeof(Elem));
  return {{tile, finish, ready ? nullptr : prepare<STEP, Elem, S>, 1, row_bytes, pass_of(row_bytes), 4}, stride};
}

template <class S>
Stepped<S> kernel_of(Isa isa, int64_t columns, int64_t in) {
#ifdef SPARSEFORGE_X86
  if constexpr (std::is_same_v<S, bf16>) {
    if (isa == Isa::amx && columns >= kAmxColumns)
      return {amx_kernel<Job>(amx::tile<amx::RowsBlock, Job>, avx512_bf16::finish<S>, in), amx::steps_of(in) * amx::kStep};
    if (isa >= Isa::avx512_bf16) return by_rows<32, bf16, S>(avx512_bf16::tile<S>, avx512_bf16::finish<S>, in);
  }
  // for one row of bfloat16, permuting is faster than compressing with masks
  const bool narrow = std::is_same_v<S, bf16> && columns == 1;
  if (isa >= Isa::avx512 && !narrow) return by_rows<16, float, S>(avx512::tile<S>, avx512::finish<S>, in);
  if (isa >= Isa::avx2 && columns == 1) return by_rows<avx2::kKept, float, S>(avx2::tile<S>, avx2::finish<S>, in);
  if (isa >= Isa::avx2) return by_rows<8, float, S>(avx2::tile<S>, avx2::finish<S>, in);
#endif
  return by_rows<8, float, S>(portable::tile<S>, portable::finish<S>, in);
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
  const int64_t out_features = values.size(0), columns = x.numel() / in_features;
  const at::Tensor xc = x.contiguous(), vc = values.contiguous(), mc = mask.contiguous();
  return with_output(xc, out_features, bias, act, [&](const auto* from, const auto* added, auto* y) {
    using S = std::remove_pointer_t<decltype(y)>;
    const auto [kernel, stride] = kernel_of<S>(isa, columns, in_features);
    const Job job{vc.const_data_ptr(), mc.const_data_ptr<uint8_t>(), (in_features + 7) / 8 * 8, stride};
    multiply_in_tiles(kernel, job, from, columns, in_features, out_features, added, act, y, ScaleOfOutputs{nullptr});
  });
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
