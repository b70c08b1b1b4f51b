"""``sparseforge::decode_attention``: scaled dot-product attention of the next token, for compiled graphs on a CPU.

torch's kernel there calls BLAS for every head of every sequence, which on some processors has no fast product of a
vector in 16 bits, and reads keys and values from copies, one for each head of the queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseforge_fx.kernels import cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.custom_op("sparseforge::decode_attention", mutates_args=())
def decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q K^T + mask) V.

    Args:
        query: [B, H, 1, D]; key: [B, heads, L, D]; value: [B, heads, L, V], in one of :data:`DTYPES`, H a multiple of
            ``heads``, each of which serves as many queries' heads in a row.
        mask: bool (true: is seen) or a floating dtype (is added), expandable to [B, H, 1, L], or None.

    Returns [B, H, 1, V], zeros where nothing is seen. Sums and scores are float32, in an order that depends on the
    sizes alone.
    """
    if all(t.device.type == "cpu" and t.dtype in DTYPES for t in (query, key, value)) and cpu.available():
        return cpu.decode_attention(query, key, value, mask, scale)
    found = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    return found.contiguous()


@decode_attention.register_fake
def _(query, key, value, mask, scale):
    return query.new_empty(*query.shape[:3], value.shape[3])


DECODE_ATTENTION_OP = torch.ops.sparseforge.decode_attention.default
