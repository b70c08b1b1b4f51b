// A stack of packed weights, each multiplied with rows of its own (see sparse_experts.py).

#pragma once

#include "rows_linear.h"

#include <vector>

namespace sparseforge {

// One of a stack.
inline std::optional<at::Tensor> of_one(const std::optional<at::Tensor>& stack, int64_t expert) {
  return stack ? std::optional(stack->select(0, expert)) : std::nullopt;
}

// Where the rows of x [rows, in] end that belong to each expert, or without offsets those of x [experts, rows, in]
// flattened. Nothing where they are not in order, or not x's.
std::optional<std::vector<int64_t>> rows_of_experts(const at::Tensor& x, int64_t experts,
                                                    const std::optional<at::Tensor>& offsets);

// y_e = x_e W_e^T + bias; rows behind the last expert's give zeros. As sparse_linear for each.
at::Tensor sparse_experts(const at::Tensor& x, const at::Tensor& values, const at::Tensor& meta, Layout layout,
                          int64_t in_features, const std::optional<at::Tensor>& offsets,
                          const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& scales, Isa isa);

}  // namespace sparseforge
