// The faster of the two ways to multiply with a packed weight, for so many rows of x.

#include "codes_linear.h"

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

int64_t max_rows(at::ScalarType dtype, bool codes) {
  if (codes) return dtype == at::kBFloat16 || dtype == at::kFloat ? max_codes_rows() : -1;
  return dtype == at::kBFloat16 ? 512 : dtype == at::kFloat ? 128 : -1;
}

at::Tensor sparse_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& mask, int64_t in_features,
                         const std::optional<at::Tensor>& bias, Activation activation,
                         const std::optional<at::Tensor>& scales, Isa isa) {
  if (x.numel() / in_features <= max_rows(x.scalar_type(), scales.has_value()))
    return scales ? codes_linear(x, values, mask, *scales, in_features, bias, activation, isa)
                  : rows_linear(x, values, mask, in_features, bias, activation, isa);
  // as rows: at::linear of three dimensions may take another path, with other bits
  const auto rows = x.reshape({-1, in_features});
  const auto weight = scales ? codes_dense(values, mask, *scales, in_features).to(x.scalar_type())
                             : rows_dense(values, mask, in_features);
  const auto y = activate(at::linear(rows, weight, bias), activation);
  auto sizes = x.sizes().vec();
  sizes.back() = y.size(1);
  return at::_unsafe_view(y, sizes);  // no view: autograd forbids writing into one of an operator's
}

}  // namespace sparseforge
