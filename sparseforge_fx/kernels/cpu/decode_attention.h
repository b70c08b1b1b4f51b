// Attention of one query position, for whoever calls it from C++.
#pragma once

#include "rows_linear.h"

namespace sparseforge {

// softmax(scale q K^T + mask) V of query [B, H, 1, D] over key [B, heads, S, D] and value [B, heads, S, V], H a multiple
// of these heads: each serves as many queries' heads in a row. float, bfloat16 or half, all of them alike; the mask is bool
// (true: is seen) or a number of any floating type that is added, expandable to [B, H, 1, S], or none. A query that
// sees nothing gets zeros. Scores and sums are float32, in an order that depends on the sizes alone: the same bits for any
// number of threads. Keys and values that no query sees at the ends of S are not read.
at::Tensor decode_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                            const std::optional<at::Tensor>& mask, double scale, Isa isa);

}  // namespace sparseforge
