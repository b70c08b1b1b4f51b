"""``sparseforge::sparse_experts``: a stack of packed weights, each multiplied with rows of its own.

What it reads of the stack are the experts that have a row: at decode those that the router chose. Which they are is
data, so that the operator is opaque to compilers. Once the C++ library for CPUs is in use, usual calls skip this file:
``cpu/sparse_experts.cpp`` does the same.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.soft_masked_experts import experts_with_rows
from sparseforge_fx.kernels.sparse_linear import DENSE_OP, OP

_PACKED = "Tensor values, Tensor meta, str layout, int in_features, Tensor? offsets"


@torch.library.custom_op(
    "sparseforge::sparse_experts",
    mutates_args=(),
    schema=f"(Tensor x, {_PACKED}, Tensor? bias=None, Tensor? scales=None) -> Tensor",
)
def sparse_experts(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    layout: str,
    in_features: int,
    offsets: Tensor | None,
    bias: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """y_e = x_e W_e^T + bias for every expert e.

    Args:
        x: [rows, in], the rows of one expert after those of another; without ``offsets`` [experts, rows, in].
        values, meta: [experts, ...]: those of each packed weight [out, in] in that layout, as ``sparse_linear`` takes
            them.
        offsets: [experts] integers in order, where the rows of each expert end; rows beyond the last give zeros.
        bias: None, or what can be added to y.
        scales: [experts, ...]: those of the packed weights, if ``values`` are int8 or int4 codes.

    Returns [rows, out], or [experts, rows, out]. Raises SparseForgeError as ``sparse_linear`` does.
    """
    _check(x, len(values), offsets)
    y = x.new_zeros(*x.shape[:-1], values.shape[1])
    for e, rows in experts_with_rows(x, offsets):
        y[rows] = OP(x[rows], values[e], meta[e], layout, in_features, None, "none", _of_one(scales, e))
    return y if bias is None else y + bias


@sparse_experts.register_fake
def _(x, values, meta, layout, in_features, offsets, bias=None, scales=None):
    return x.new_empty(*x.shape[:-1], values.shape[1])


def _check(x: Tensor, experts: int, offsets: Tensor | None) -> None:
    """Every expert has rows of its own, and they are x's: what fits no row would otherwise be passed over."""
    if offsets is None:
        if x.dim() != 3 or len(x) != experts:
            raise SparseForgeError(f"x of shape {[*x.shape]} without offsets has no rows for each of {experts} experts")
        return
    if x.dim() != 2 or offsets.dim() != 1 or len(offsets) != experts or offsets.is_floating_point():
        told = f"{offsets.dtype} {[*offsets.shape]} for x of shape {[*x.shape]}"
        raise SparseForgeError(
            f"offsets say for each of {experts} experts where its rows of x [rows, in] end, not {told}"
        )
    ends = [0, *offsets.tolist(), len(x)]
    if any(end < start for start, end in itertools.pairwise(ends)):
        raise SparseForgeError(f"offsets {ends[1:5]}... are not in order or end beyond x's {len(x)} rows")


def _of_one(scales: Tensor | None, expert: int) -> Tensor | None:
    return None if scales is None else scales[expert]


@torch.library.custom_op(
    "sparseforge::sparse_experts_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_PACKED}, Tensor? scales=None) -> Tensor",
)
def _backward(
    grad: Tensor,
    values: Tensor,
    meta: Tensor,
    layout: str,
    in_features: int,
    offsets: Tensor | None,
    scales: Tensor | None = None,
) -> Tensor:
    """The gradient of x."""
    grad_x = grad.new_zeros(*grad.shape[:-1], in_features)
    for e, rows in experts_with_rows(grad, offsets):
        weight = DENSE_OP(values[e], meta[e], layout, in_features, _of_one(scales, e))
        grad_x[rows] = grad[rows] @ weight.to(grad.dtype)
    return grad_x


@_backward.register_fake
def _(grad, values, meta, layout, in_features, offsets, scales=None):
    return grad.new_empty(*grad.shape[:-1], in_features)


def _setup_context(ctx, inputs, output):
    _, values, meta, layout, in_features, offsets, bias, scales = inputs
    ctx.save_for_backward(values, meta, offsets, scales)
    ctx.options = layout, in_features
    ctx.bias = None if bias is None else bias.shape


def _gradients(ctx, grad):
    values, meta, offsets, scales = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        grad_x = _backward(grad.contiguous(), values, meta, *ctx.options, offsets, scales)
    given = len(ctx.needs_input_grad)  # a caller may leave out last arguments
    grad_bias = grad.sum_to_size(ctx.bias) if ctx.bias is not None and ctx.needs_input_grad[6] else None
    return (grad_x, None, None, None, None, None, grad_bias, None)[:given]


sparse_experts.register_autograd(_gradients, setup_context=_setup_context)
PACKED_EXPERTS_OP = torch.ops.sparseforge.sparse_experts.default
