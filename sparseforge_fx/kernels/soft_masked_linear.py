"""``sparseforge::soft_masked_linear``: the operator that a linear becomes while its mask is being learned.

One node to read in the graph. It is CompositeImplicitAutograd: under torch.compile it decomposes, so that the compiler
fuses the mask multiply and may recompute it instead of saving it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

torch.library.define(
    "sparseforge::soft_masked_linear",
    "(Tensor x, Tensor weight, Tensor mask, Tensor? bias=None, Tensor? probe=None, bool transposed=False, "
    "Tensor? real=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def squared(t: Tensor) -> Tensor:
    """Of the tensor's dtype, but float32 for float16."""
    # squares of float16 gradients underflow; bfloat16 has float32's exponent
    return (t.float() if t.dtype == torch.float16 else t).square()


class _SoftMaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, mask, bias, probe, transposed, real):
        ctx.save_for_backward(x, weight, mask, real)
        ctx.transposed = transposed
        ctx.probe = None if probe is None else (probe.dim(), probe.dtype)
        masked = weight * mask
        return F.linear(x, masked.t() if transposed else masked, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mask, real = ctx.saved_tensors
        need_x, need_weight, _, need_bias, need_probe, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = grad_probe = None
        masked = weight * mask  # recomputed: saving it would cost one more copy of every weight
        if need_x:
            grad_x = torch.matmul(grad, masked.t() if ctx.transposed else masked)
        grad2, x2 = grad.flatten(0, -2), x.flatten(0, -2)
        if need_weight:  # straight-through: not masked
            grad_weight = x2.t() @ grad2 if ctx.transposed else grad2.t() @ x2
        if need_bias:
            grad_bias = grad2.sum(0)
        if need_probe:
            dim, dtype = ctx.probe
            if dim == 2:
                gg, xx = squared(grad2), squared(x2)
                grad_probe = (xx.t() @ gg if ctx.transposed else gg.t() @ xx).to(dtype)
            else:
                seen = x2.to(dtype).square()
                grad_probe = (seen if real is None else seen * real.reshape(-1, 1).to(dtype)).sum(0)
        return grad_x, grad_weight, None, grad_bias, grad_probe, None, None


def soft_masked_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    probe: Tensor | None = None,
    transposed: bool = False,
    real: Tensor | None = None,
) -> Tensor:
    """y = x (weight * mask)^T + bias, with straight-through gradients and an optional curvature probe.

    Args:
        x: [..., in].
        weight: [out, in], or [in, out] if ``transposed`` (Hugging Face Conv1D).
        mask: the weight's shape and dtype, values in [0, 1]; gets no gradient (masks are driven by scores).
        bias: [out] or None.
        probe: None, or a tensor of zeros that takes no part in the value and whose "gradient" is a curvature estimate:
            of the weight's shape, the per-token Gauss-Newton factor (g^2)^T (x^2) summed over tokens, g the
            gradient at this output; of shape [in], the sum over real tokens of x^2. Either in the probe's dtype.
        transposed: the weight is stored [in, out].
        real: None, or 0 for every row of x that is padding, as many entries as x has rows. (Padding has no part in
            the loss, so that its gradient g is zero anyway.)

    Gradients: dL/dweight = g^T x, not masked (straight-through, arXiv 2605.06402 section 3); dL/dx goes through
    weight * mask. Under autocast everything is computed in its dtype, as a linear is.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)  # cast here: autocast does not reach an autograd.Function's backward
        x, weight, mask = x.to(dtype), weight.to(dtype), mask.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if x.dim() == 1:
        return _SoftMaskedLinear.apply(x[None], weight, mask, bias, probe, transposed, real)[0]
    return _SoftMaskedLinear.apply(x, weight, mask, bias, probe, transposed, real)


torch.library.impl("sparseforge::soft_masked_linear", "CompositeImplicitAutograd", soft_masked_linear)
OP = torch.ops.sparseforge.soft_masked_linear.default
