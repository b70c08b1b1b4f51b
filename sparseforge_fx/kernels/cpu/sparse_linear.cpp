// The faster of the two ways to multiply with a packed weight, for so many rows of x.

#include "codes_linear.h"
#include "pairs_linear.h"

#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>

namespace sparseforge {
namespace {

at::Tensor activate(const at::Tensor& y, Activation activation) {
  switch (activation) {
    case Activation::none:
      return y;
    case Activation::relu:
      return at::relu(y);
    case Activation::gelu:
      return at::gelu(y);
    case Activation::gelu_tanh:
      return at::gelu(y, "tanh");
    case Activation::silu:
      return at::silu(y);
    case Activation::silu_mul: {
      const auto halves = y.chunk(2, -1);
      return at::silu(halves[0]).mul(halves[1]);
    }
  }
  TORCH_INTERNAL_ASSERT(false, "not an activation");
}

}  // namespace

int64_t max_rows(at::ScalarType dtype, bool codes, int64_t in_features, Isa isa) {
  if (codes) return dtype == at::kBFloat16 || dtype == at::kFloat ? max_codes_rows(dtype, in_features, isa) : -1;
  return dtype == at::kBFloat16 ? 512 : dtype == at::kFloat ? 128 : -1;
}

std::optional<Layout> layout_named(std::string_view name) {
  if (name == "rows") return Layout::rows;
  if (name == "pairs") return Layout::pairs;
  return {};
}

at::Tensor dense_weight(const at::Tensor& values, const at::Tensor& meta, Layout layout, int64_t in_features,
                        const std::optional<at::Tensor>& scales) {
  if (layout == Layout::pairs) return pairs_dense(values, meta, scales.value(), in_features);
  return scales ? codes_dense(values, meta, *scales, in_features) : rows_dense(values, meta, in_features);
}

namespace {

// As dense_weight, in the type of x.
at::Tensor expanded_for(const at::Tensor& x, const at::Tensor& values, const at::Tensor& meta, Layout layout,
                        int64_t in_features, const std::optional<at::Tensor>& scales, Isa isa) {
  if (scales && isa >= Isa::amx && x.scalar_type() == at::kBFloat16)
    return layout == Layout::pairs ? pairs_half(values, meta, *scales, in_features)
                                   : codes_half(values, meta, *scales, in_features);
  return dense_weight(values, meta, layout, in_features, scales).to(x.scalar_type());
}

}  // namespace

at::Tensor sparse_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& meta, Layout layout,
                         int64_t in_features, const std::optional<at::Tensor>& bias, Activation activation,
                         const std::optional<at::Tensor>& scales, Isa isa) {
  const int64_t most = max_rows(x.scalar_type(), scales.has_value(), in_features, isa);
  if (x.numel() / in_features <= (layout == Layout::pairs ? std::min(most, pairs_rows(isa)) : most)) {
    if (layout == Layout::pairs) return pairs_linear(x, values, meta, scales.value(), in_features, bias, activation, isa);
    return scales ? codes_linear(x, values, meta, *scales, in_features, bias, activation, isa)
                  : rows_linear(x, values, meta, in_features, bias, activation, isa);
  }
  // as rows: at::linear of three dimensions may take another path, with other bits
  const auto rows = x.reshape({-1, in_features});
  const auto weight = expanded_for(x, values, meta, layout, in_features, scales, isa);
  const auto y = activate(at::linear(rows, weight, bias), activation);
  auto sizes = x.sizes().vec();
  sizes.back() = y.size(1);
  return at::_unsafe_view(y, sizes);  // no view: autograd forbids writing into one of an operator's
}

}  // namespace sparseforge
