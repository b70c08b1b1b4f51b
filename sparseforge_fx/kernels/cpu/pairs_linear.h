// The kernel on 2:4 weights of int8 and int4 codes in the layout of pairs.py, for whoever calls it from C++.
#pragma once

#include "rows_linear.h"

namespace sparseforge {

// Whether this is a weight [out, in_features] as pairs.py writes it. Reads no data.
bool is_pairs(const at::Tensor& values, const at::Tensor& places, const at::Tensor& scales, int64_t in_features);

// act(x W^T + bias), x bfloat16 or float32 and rounded to 8 bits in groups of inputs; where pairs_rows(isa) is above zero.
at::Tensor pairs_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& places,
                        const at::Tensor& scales, int64_t in_features, const std::optional<at::Tensor>& bias,
                        Activation activation, Isa isa);

// The dense weight [out, in_features], float32.
at::Tensor pairs_dense(const at::Tensor& values, const at::Tensor& places, const at::Tensor& scales,
                       int64_t in_features);

// The same in bfloat16, with AMX.
at::Tensor pairs_half(const at::Tensor& values, const at::Tensor& places, const at::Tensor& scales, int64_t in_features);

// Beyond so many rows of x the expanded weight and a dense product serve; 0: always, on this instruction set.
int64_t pairs_rows(Isa isa);

}  // namespace sparseforge
