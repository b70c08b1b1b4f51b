"""``sparseforge::attention``: scaled dot-product attention with a backward pass of its own, in bfloat16 on CPUs.

torch's own forward pass, and our gradients (``cpu/attention_backward.cpp``), which are sooner there
(docs/measurements.md). CompositeImplicitAutograd, like the masked linear: it decomposes under torch.compile.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseforge_fx.kernels import cpu

torch.library.define(
    "sparseforge::attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, bool is_causal=False, *, "
    "float? scale=None, bool enable_gqa=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, mask, causal, scale):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, logsumexp = flash(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        ctx.save_for_backward(query, key, value, mask, out, logsumexp)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled():  # as under create_graph: a second derivative would lack what goes through here
            raise RuntimeError("sparseforge::attention differentiates once: take torch's attention for more")
        found = cpu.attention_backward(gradient, *ctx.saved_tensors, causal=ctx.causal, scale=ctx.scale)
        return *found, None, None, None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As ``torch.nn.functional.scaled_dot_product_attention``, and its values to the bit.

    Gradients, where a bfloat16 call on a CPU asks for them, are no farther from those in float64 than torch's (sums
    and scores are float32), and differentiate no second time.
    """
    if not _served(query, key, value, attn_mask, dropout_p):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -math.inf)
        rows = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape[:-2])
        attn_mask = attn_mask.expand(*rows, query.shape[2], key.shape[2])
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _Attention.apply(query, key, value, attn_mask, is_causal, factor)


def _served(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Are there gradients to be had, by our kernel, of what torch would compute by its fused one?"""
    tensors = (query, key, value)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors) or dropout:
        return False
    if any(t.device.type != "cpu" or t.dtype != torch.bfloat16 or t.dim() != 4 for t in tensors):
        return False
    if any(t.stride(3) != 1 or t.shape[2] == 0 for t in tensors) or not torch.backends.cuda.flash_sdp_enabled():
        return False
    batch, heads, _, size = query.shape
    if key.shape != value.shape or (key.shape[0], key.shape[3]) != (batch, size) or heads % key.shape[1] or size % 2:
        return False
    plain = mask is None or (
        not mask.requires_grad and mask.dtype in (torch.bool, query.dtype) and mask.dim() in (2, 4)
    )
    return plain and not torch.is_autocast_enabled("cpu") and cpu.differentiates_attention()


torch.library.impl("sparseforge::attention", "CompositeImplicitAutograd", attention)
OP = torch.ops.sparseforge.attention.default
