// The gradients of scaled dot-product attention in bfloat16, for whoever calls them from C++.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace sparseforge {

// Whether torch multiplies blocks of bfloat16 on this machine by instructions of its own.
bool multiplies_bf16_blocks();

// dQ, dK and dV of softmax(scale Q K^T + mask) V. All bfloat16 but logsumexp: query [B, H, L, D], key and value
// [B, H, S, D], mask [1 or B, 1 or H, L, S] or none, out and its gradient [B, H, L, D], logsumexp of the forward pass
// [B, H, L] float32. causal: position i sees those up to i. Sums and scores are float32. Every head is computed by one
// thread: the same bits on every run and for any number of threads.
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& gradient, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const std::optional<at::Tensor>& mask, const at::Tensor& out, const at::Tensor& logsumexp, bool causal,
    double scale);

}  // namespace sparseforge
