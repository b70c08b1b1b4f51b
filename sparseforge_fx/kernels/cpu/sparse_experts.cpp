// Expert by expert; those without a row are not read. Where there are enough of them each thread has some for itself: one
// product after the other would wake all threads for each.

#include "sparse_experts.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/add.h>
#include <ATen/ops/zeros.h>

namespace sparseforge {

std::optional<std::vector<int64_t>> rows_of_experts(const at::Tensor& x, int64_t experts,
                                                    const std::optional<at::Tensor>& offsets) {
  std::vector<int64_t> ends(experts);
  if (!offsets) {
    if (x.dim() != 3 || x.size(0) != experts) return {};
    for (int64_t e = 0; e < experts; ++e) ends[e] = (e + 1) * x.size(1);
    return ends;
  }
  const auto type = offsets->scalar_type();
  if (x.dim() != 2 || !offsets->is_cpu() || offsets->dim() != 1 || offsets->size(0) != experts ||
      (type != at::kInt && type != at::kLong))
    return {};
  const auto* first = static_cast<const char*>(offsets->const_data_ptr());
  int64_t last = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const char* const at = first + e * offsets->stride(0) * offsets->element_size();
    ends[e] = type == at::kInt ? *reinterpret_cast<const int32_t*>(at) : *reinterpret_cast<const int64_t*>(at);
    if (ends[e] < last || ends[e] > x.size(0)) return {};
    last = ends[e];
  }
  return ends;
}

at::Tensor sparse_experts(const at::Tensor& x, const at::Tensor& values, const at::Tensor& meta, Layout layout,
                          int64_t in_features, const std::optional<at::Tensor>& offsets,
                          const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& scales, Isa isa) {
  const int64_t experts = values.size(0);
  const auto ends = rows_of_experts(x, experts, offsets);
  TORCH_CHECK(ends, "the rows of the experts are not in order, or not x's");
  auto sizes = x.sizes().vec();
  sizes.back() = values.size(1);
  const at::Tensor rows = x.reshape({-1, in_features}), y = at::zeros(sizes, x.options());
  const at::Tensor to = y.view({-1, values.size(1)});
  std::vector<int64_t> active;
  for (int64_t e = 0; e < experts; ++e)
    if ((*ends)[e] > (e ? (*ends)[e - 1] : 0)) active.push_back(e);
  const auto multiply = [&](int64_t first, int64_t last) {
    // a pool's threads know nothing of the caller's modes: inference, no_grad, autocast. In all of them the same happens
    const at::AutoDispatchBelowADInplaceOrView plain;
    const c10::impl::ExcludeDispatchKeyGuard uncast(c10::autocast_dispatch_keyset);
    for (int64_t i = first; i < last; ++i) {
      const int64_t e = active[i], from = e ? (*ends)[e - 1] : 0, count = (*ends)[e] - from;
      to.narrow(0, from, count)
          .copy_(sparse_linear(rows.narrow(0, from, count), values.select(0, e), meta.select(0, e), layout, in_features,
                               std::nullopt, Activation::none, of_one(scales, e), isa));
    }
  };
  const int64_t count = active.size(), threads = at::get_num_threads();
  if (count % threads == 0 || count >= 4 * threads) {
    at::parallel_for(0, count, 1, multiply);
  } else {
    multiply(0, count);
  }
  return bias ? at::add(y, *bias) : y;
}

}  // namespace sparseforge
