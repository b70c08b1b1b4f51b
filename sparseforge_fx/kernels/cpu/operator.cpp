// sparseforge::sparse_linear and dense_weight on CPUs without Python: a call from a small model's decode step takes
// longer in Python than in the kernel.
//
// sparse_linear.py defines both operators, implements them for any device, differentiates them, and words the errors.
// Here is only what is usual: packed rows, tensors that fit, no gradients. Everything else is handed to Python.

#include "rows_linear.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/silu.h>
#include <torch/library.h>

#include <atomic>

namespace sparseforge {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, c10::string_view, int64_t,
                          const OptionalTensor&, c10::string_view);
using Dense = at::Tensor(const at::Tensor&, const at::Tensor&, c10::string_view, int64_t);

// What Python chose for this process (see cpu/__init__.py); until then every call goes there.
std::atomic<int> isa_in_use{-1};
std::atomic<int64_t> max_rows_bfloat16{0}, max_rows_float32{0};

void use(c10::string_view isa, int64_t bfloat16_rows, int64_t float32_rows) {
  max_rows_bfloat16 = bfloat16_rows;
  max_rows_float32 = float32_rows;
  isa_in_use = isa.empty() ? -1 : static_cast<int>(isa_named(isa));
}

int64_t max_rows(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? max_rows_bfloat16.load() : dtype == at::kFloat ? max_rows_float32.load() : -1;
}

const auto& linear_operator() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("sparseforge::sparse_linear", "").typed<Linear>();
  return op;
}

const auto& dense_operator() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("sparseforge::dense_weight", "").typed<Dense>();
  return op;
}

// Python's implementation is registered for every device (CompositeExplicitAutograd); a call with no dispatch key at
// all finds it behind the one below.
constexpr c10::DispatchKeySet kPython{};

// Likewise Python's gradient, registered for every Autograd key, behind AutogradCPU.
constexpr c10::DispatchKeySet kPythonAutograd{c10::DispatchKey::AutogradOther};

bool serves(const at::Tensor& values, const at::Tensor& meta, c10::string_view layout, int64_t in_features) {
  return isa_in_use >= 0 && layout == "rows" && values.is_cpu() && meta.is_cpu() &&
         (values.element_size() == 2 || values.element_size() == 4) && is_packed(values, meta, in_features);
}

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

at::Tensor linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& meta, c10::string_view layout,
                  int64_t in_features, const OptionalTensor& bias, c10::string_view activation) {
  const auto act = activation_named(activation);
  if (!act || !serves(values, meta, layout, in_features) || !x.is_floating_point() ||
      !fits(x, values, in_features, bias, *act))
    return linear_operator().redispatch(kPython, x, values, meta, layout, in_features, bias, activation);
  if (x.numel() / in_features <= max_rows(x.scalar_type()))
    return rows_linear(x, values, meta, in_features, bias, *act, static_cast<Isa>(isa_in_use.load()));
  // as rows: at::linear of three dimensions may take another path, with other bits
  const auto rows = x.reshape({-1, in_features});
  const auto y = activate(at::linear(rows, rows_dense(values, meta, in_features), bias), *act);
  auto sizes = x.sizes().vec();
  sizes.back() = y.size(1);
  return at::_unsafe_view(y, sizes);  // no view: autograd forbids writing into one of an operator's
}

at::Tensor dense(const at::Tensor& values, const at::Tensor& meta, c10::string_view layout, int64_t in_features) {
  if (!serves(values, meta, layout, in_features))
    return dense_operator().redispatch(kPython, values, meta, layout, in_features);
  return rows_dense(values, meta, in_features);
}

at::Tensor linear_autograd(c10::DispatchKeySet keys, const at::Tensor& x, const at::Tensor& values,
                           const at::Tensor& meta, c10::string_view layout, int64_t in_features,
                           const OptionalTensor& bias, c10::string_view activation) {
  const auto below = keys & c10::after_autograd_keyset;
  const bool needed = at::GradMode::is_enabled() &&
                      (x.requires_grad() || values.requires_grad() || (bias && bias->requires_grad()));
  if (needed)
    return linear_operator().redispatch(below | kPythonAutograd, x, values, meta, layout, in_features, bias,
                                        activation);
  at::AutoDispatchBelowAutograd guard;
  return linear_operator().redispatch(below, x, values, meta, layout, in_features, bias, activation);
}

}  // namespace
}  // namespace sparseforge

TORCH_LIBRARY_FRAGMENT(sparseforge_cpu, m) {
  m.def("use(str isa, int bfloat16_rows, int float32_rows) -> ()", &sparseforge::use);
}

TORCH_LIBRARY_IMPL(sparseforge, CPU, m) {
  m.impl("sparse_linear", &sparseforge::linear);
  m.impl("dense_weight", &sparseforge::dense);
}

TORCH_LIBRARY_IMPL(sparseforge, AutogradCPU, m) { m.impl("sparse_linear", &sparseforge::linear_autograd); }
