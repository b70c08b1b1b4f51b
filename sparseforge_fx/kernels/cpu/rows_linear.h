// The kernels on packed rows, for whoever calls them from C++.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace sparseforge {

enum class Activation { none, relu, gelu, gelu_tanh, silu, silu_mul };
enum class Isa { portable, avx2, avx512, avx512_bf16, amx };

std::optional<Activation> activation_named(std::string_view name);

// The best one if `name` is empty; throws if this machine does not have it.
Isa isa_named(std::string_view name);

// What this machine has, slowest first.
std::vector<std::string> instruction_sets();

// Whether this is a 2-D weight [out, in_features] as packed.py writes it. Reads no data: a damaged bitmask gives wrong
// numbers, but no access outside the tensors.
bool is_packed(const at::Tensor& values, const at::Tensor& mask, int64_t in_features);

// What the kernels ask of x, bias and activation, besides a packed weight; codes go with any floating x.
bool fits(const at::Tensor& x, const at::Tensor& values, int64_t in_features, const std::optional<at::Tensor>& bias,
          Activation activation, bool codes = false);

// act(x W^T + bias): [..., in_features] -> [..., out], or [..., out / 2] with silu_mul. bfloat16 or float32.
at::Tensor rows_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& mask, int64_t in_features,
                       const std::optional<at::Tensor>& bias, Activation activation, Isa isa);

// The dense weight [out, in_features]. Moves bits: any type of two or four bytes.
at::Tensor rows_dense(const at::Tensor& values, const at::Tensor& mask, int64_t in_features);

// Beyond so many rows of x, expanding the weight for torch's dense product is faster than rows_linear (measured with
// AMX and two threads, cpu_kernels.py); -1 for types that it does not take.
int64_t max_rows(at::ScalarType dtype, bool codes, int64_t in_features, Isa isa);

// How a weight is kept: as on disk, or as pairs.py has it.
enum class Layout { rows, pairs };

// Of the CPU's; none for others.
std::optional<Layout> layout_named(std::string_view name);

// The dense weight [out, in_features]: of codes in float32.
at::Tensor dense_weight(const at::Tensor& values, const at::Tensor& meta, Layout layout, int64_t in_features,
                        const std::optional<at::Tensor>& scales);

// The layout's kernel, or the expanded weight and a dense product: what is faster for so many rows. Any type that
// rows_dense takes.
at::Tensor sparse_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& meta, Layout layout,
                         int64_t in_features, const std::optional<at::Tensor>& bias, Activation activation,
                         const std::optional<at::Tensor>& scales, Isa isa);

}  // namespace sparseforge
