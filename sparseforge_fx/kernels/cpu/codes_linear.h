// The kernels on int8 and int4 codes, for whoever calls them from C++.
#pragma once

#include "rows_linear.h"

namespace sparseforge {

// Whether this is a 2-D weight of codes [out, in_features] as packed.py writes it. Reads no data.
bool is_codes(const at::Tensor& values, const at::Tensor& mask, const at::Tensor& scales, int64_t in_features);

// act(x W^T + bias), x bfloat16 or float32 and rounded to 8 bits in groups of inputs.
at::Tensor codes_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& mask,
                        const at::Tensor& scales, int64_t in_features, const std::optional<at::Tensor>& bias,
                        Activation activation, Isa isa);

// The dense weight [out, in_features], float32.
at::Tensor codes_dense(const at::Tensor& values, const at::Tensor& mask, const at::Tensor& scales,
                       int64_t in_features);

// The same in bfloat16, with AMX.
at::Tensor codes_half(const at::Tensor& values, const at::Tensor& mask, const at::Tensor& scales, int64_t in_features);

// Beyond so many rows of x the expanded weight and a dense product are faster.
int64_t max_codes_rows(at::ScalarType dtype, int64_t in_features, Isa isa);

}  // namespace sparseforge
