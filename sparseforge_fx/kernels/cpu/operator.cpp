// sparseforge::sparse_linear, sparse_experts and dense_weight on CPUs without Python: a call from a small model's decode
// step, or for one of many experts, takes longer in Python than in the kernel.
//
// sparse_linear.py and sparse_experts.py define the operators, implement them for any device, differentiate them, and
// word the errors.
// Here is only what is usual: a CPU's layouts, tensors that fit, no gradients. Everything else is handed to Python.

#include "attention_backward.h"
#include "codes_linear.h"
#include "decode_attention.h"
#include "multiply_in_tiles.h"
#include "pairs_linear.h"
#include "sparse_experts.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <atomic>

namespace sparseforge {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, c10::string_view, int64_t,
                          const OptionalTensor&, c10::string_view, const OptionalTensor&);
using Experts = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, c10::string_view, int64_t,
                           const OptionalTensor&, const OptionalTensor&, const OptionalTensor&);
using Dense = at::Tensor(const at::Tensor&, const at::Tensor&, c10::string_view, int64_t, const OptionalTensor&);

// What Python chose for this process (see cpu/__init__.py); until then every call goes there.
std::atomic<int> isa_in_use{-1};

void use(c10::string_view isa) { isa_in_use = isa.empty() ? -1 : static_cast<int>(isa_named(isa)); }

const auto& linear_operator() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("sparseforge::sparse_linear", "").typed<Linear>();
  return op;
}

const auto& experts_operator() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("sparseforge::sparse_experts", "").typed<Experts>();
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

bool serves(const at::Tensor& values, const at::Tensor& meta, c10::string_view layout, int64_t in_features,
            const OptionalTensor& scales) {
  const auto kept = layout_named(layout);
  if (isa_in_use < 0 || !kept || !values.is_cpu() || !meta.is_cpu()) return false;
  if (scales)
    return scales->is_cpu() && (kept == Layout::pairs ? is_pairs(values, meta, *scales, in_features)
                                                      : is_codes(values, meta, *scales, in_features));
  return kept == Layout::rows && (values.element_size() == 2 || values.element_size() == 4) && is_packed(values, meta, in_features);
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& meta, c10::string_view layout,
                  int64_t in_features, const OptionalTensor& bias, c10::string_view activation,
                  const OptionalTensor& scales) {
  const auto act = activation_named(activation);
  if (!act || !serves(values, meta, layout, in_features, scales) || !x.is_floating_point() ||
      !fits(x, values, in_features, bias, *act, scales.has_value()))
    return linear_operator().redispatch(kPython, x, values, meta, layout, in_features, bias, activation, scales);
  return sparse_linear(x, values, meta, *layout_named(layout), in_features, bias, *act, scales,
                       static_cast<Isa>(isa_in_use.load()));
}

at::Tensor dense(const at::Tensor& values, const at::Tensor& meta, c10::string_view layout, int64_t in_features,
                 const OptionalTensor& scales) {
  if (!serves(values, meta, layout, in_features, scales))
    return dense_operator().redispatch(kPython, values, meta, layout, in_features, scales);
  return dense_weight(values, meta, *layout_named(layout), in_features, scales);
}

at::Tensor linear_autograd(c10::DispatchKeySet keys, const at::Tensor& x, const at::Tensor& values,
                           const at::Tensor& meta, c10::string_view layout, int64_t in_features,
                           const OptionalTensor& bias, c10::string_view activation, const OptionalTensor& scales) {
  const auto below = keys & c10::after_autograd_keyset;
  const bool needed = at::GradMode::is_enabled() &&
                      (x.requires_grad() || values.requires_grad() || (bias && bias->requires_grad()));
  if (needed)
    return linear_operator().redispatch(below | kPythonAutograd, x, values, meta, layout, in_features, bias,
                                        activation, scales);
  at::AutoDispatchBelowAutograd guard;
  return linear_operator().redispatch(below, x, values, meta, layout, in_features, bias, activation, scales);
}

at::Tensor experts(const at::Tensor& x, const at::Tensor& values, const at::Tensor& meta, c10::string_view layout,
                   int64_t in_features, const OptionalTensor& offsets, const OptionalTensor& bias,
                   const OptionalTensor& scales) {
  const bool stacked = values.dim() == 3 && values.size(0) > 0 && meta.dim() == 3 && meta.size(0) == values.size(0) &&
                       (!scales || (scales->dim() == 3 && scales->size(0) == values.size(0)));
  if (!stacked || !serves(values[0], meta[0], layout, in_features, of_one(scales, 0)) || !x.is_floating_point() ||
      !fits(x, values[0], in_features, std::nullopt, Activation::none, scales.has_value()) ||
      !rows_of_experts(x, values.size(0), offsets))
    return experts_operator().redispatch(kPython, x, values, meta, layout, in_features, offsets, bias, scales);
  return sparse_experts(x, values, meta, *layout_named(layout), in_features, offsets, bias, scales,
                        static_cast<Isa>(isa_in_use.load()));
}

at::Tensor experts_autograd(c10::DispatchKeySet keys, const at::Tensor& x, const at::Tensor& values,
                            const at::Tensor& meta, c10::string_view layout, int64_t in_features,
                            const OptionalTensor& offsets, const OptionalTensor& bias, const OptionalTensor& scales) {
  const auto below = keys & c10::after_autograd_keyset;
  const bool needed = at::GradMode::is_enabled() &&
                      (x.requires_grad() || values.requires_grad() || (bias && bias->requires_grad()));
  if (needed)
    return experts_operator().redispatch(below | kPythonAutograd, x, values, meta, layout, in_features, offsets, bias,
                                         scales);
  at::AutoDispatchBelowAutograd guard;
  return experts_operator().redispatch(below, x, values, meta, layout, in_features, offsets, bias, scales);
}

at::Tensor rows_linear_named(const at::Tensor& x, const at::Tensor& values, const at::Tensor& mask,
                             int64_t in_features, const OptionalTensor& bias, c10::string_view activation,
                             const OptionalTensor& scales, c10::string_view isa) {
  const auto act = activation_named(activation);
  TORCH_CHECK(act, "unknown activation '", activation, "'");
  return scales ? codes_linear(x, values, mask, *scales, in_features, bias, *act, isa_named(isa))
                : rows_linear(x, values, mask, in_features, bias, *act, isa_named(isa));
}

at::Tensor pairs_linear_named(const at::Tensor& x, const at::Tensor& values, const at::Tensor& places,
                              const at::Tensor& scales, int64_t in_features, const OptionalTensor& bias,
                              c10::string_view activation, c10::string_view isa) {
  const auto act = activation_named(activation);
  TORCH_CHECK(act, "unknown activation '", activation, "'");
  return pairs_linear(x, values, places, scales, in_features, bias, *act, isa_named(isa));
}

at::Tensor decode_attention_named(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                  const OptionalTensor& mask, double scale, c10::string_view isa) {
  return decode_attention(query, key, value, mask, scale, isa_named(isa));
}

int64_t pairs_rows_named(c10::string_view isa) { return pairs_rows(isa_named(isa)); }

int64_t max_rows_named(at::ScalarType dtype, bool codes, int64_t in_features, c10::string_view isa) {
  return max_rows(dtype, codes, in_features, isa_named(isa));
}

bool vnni_named(c10::string_view isa) { return isa_named(isa) >= Isa::avx512 && has_vnni(); }

at::Tensor rows_dense_any(const at::Tensor& values, const at::Tensor& mask, int64_t in_features,
                          const OptionalTensor& scales) {
  return scales ? codes_dense(values, mask, *scales, in_features) : rows_dense(values, mask, in_features);
}

}  // namespace
}  // namespace sparseforge

TORCH_LIBRARY(sparseforge_cpu, m) {
  m.def(
      "rows_linear(Tensor x, Tensor values, Tensor bitmask, int in_features, Tensor? bias, str activation,"
      " Tensor? scales, str isa) -> Tensor");
  m.def("rows_dense(Tensor values, Tensor bitmask, int in_features, Tensor? scales) -> Tensor");
  m.def(
      "pairs_linear(Tensor x, Tensor values, Tensor places, Tensor scales, int in_features, Tensor? bias,"
      " str activation, str isa) -> Tensor");
  m.def("pairs_dense(Tensor values, Tensor places, Tensor scales, int in_features) -> Tensor");
  m.def(
      "attention_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor out,"
      " Tensor logsumexp, bool causal, float scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "decode_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, str isa) -> Tensor");
  m.def("multiplies_bf16_blocks() -> bool", &sparseforge::multiplies_bf16_blocks);
  m.def("pairs_rows(str isa) -> int", &sparseforge::pairs_rows_named);
  m.def("vnni(str isa) -> bool", &sparseforge::vnni_named);
  m.def("instruction_sets() -> str[]", &sparseforge::instruction_sets);
  m.def("max_rows(ScalarType dtype, bool codes, int in_features, str isa) -> int", &sparseforge::max_rows_named);
  m.def("use(str isa) -> ()", &sparseforge::use);
}

TORCH_LIBRARY_IMPL(sparseforge_cpu, CPU, m) {
  m.impl("rows_linear", &sparseforge::rows_linear_named);
  m.impl("rows_dense", &sparseforge::rows_dense_any);
  m.impl("pairs_linear", &sparseforge::pairs_linear_named);
  m.impl("pairs_dense", &sparseforge::pairs_dense);
  m.impl("attention_backward", &sparseforge::attention_backward);
  m.impl("decode_attention", &sparseforge::decode_attention_named);
}

TORCH_LIBRARY_IMPL(sparseforge, CPU, m) {
  m.impl("sparse_linear", &sparseforge::linear);
  m.impl("sparse_experts", &sparseforge::experts);
  m.impl("dense_weight", &sparseforge::dense);
}

TORCH_LIBRARY_IMPL(sparseforge, AutogradCPU, m) {
  m.impl("sparse_linear", &sparseforge::linear_autograd);
  m.impl("sparse_experts", &sparseforge::experts_autograd);
}
