"""``sparseforge::soft_masked_experts``: a stack of linears, each with rows of its own, while its mask is being learned.

The sister of ``soft_masked_linear`` for the experts of a mixture. How many rows an expert gets is data, so that the
operator is opaque to compilers. Experts go one by one: of the masked weight no more than one matrix exists at a time,
and those without a row are not read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparseforge_fx.kernels.soft_masked_linear import squared

_OPERANDS = "Tensor x, Tensor weight, Tensor mask, Tensor? offsets"


@torch.library.custom_op(
    "sparseforge::soft_masked_experts",
    mutates_args=(),
    schema=f"({_OPERANDS}, Tensor? bias=None, Tensor? probe=None, bool transposed=False, str plain='', "
    "Tensor? counter=None) -> Tensor",
)
def soft_masked_experts(
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    bias: Tensor | None = None,
    probe: Tensor | None = None,
    transposed: bool = False,
    plain: str = "",
    counter: Tensor | None = None,
) -> Tensor:
    """y_e = x_e (weight_e * mask_e)^T + bias for every expert e, in the weight's dtype.

    Args:
        x: [rows, in], the rows of one expert after those of another; without ``offsets`` [experts, rows, in].
        weight: [experts, out, in], or [experts, in, out] if ``transposed``.
        mask: the weight's shape and dtype, values in [0, 1]; gets no gradient.
        offsets: [experts] integers, where the rows of each expert end; rows beyond the last give zeros.
        bias: None, or what can be added to y.
        probe: as of ``soft_masked_linear``: of the weight's shape, or [experts, in]; each expert's is of its own rows.
        transposed: how the weight is stored.
        plain: the operator that this one stands for; hardening puts it back.
        counter: None, or a value [experts] that is not read and whose gradient is the number of each expert's rows.

    Gradients are those of ``soft_masked_linear``: straight-through for the weight.
    """
    del probe, plain, counter
    x = x.to(weight.dtype)
    y = x.new_zeros(*x.shape[:-1], weight.shape[2 if transposed else 1])
    for e, rows in experts_with_rows(x, offsets):
        torch.mm(x[rows], _oriented(weight[e] * mask[e], transposed), out=y[rows])
    return y if bias is None else y + bias


@soft_masked_experts.register_fake
def _(x, weight, mask, offsets, bias=None, probe=None, transposed=False, plain="", counter=None):
    return x.new_empty(*x.shape[:-1], weight.shape[2 if transposed else 1], dtype=weight.dtype)


@torch.library.custom_op(
    "sparseforge::soft_masked_experts_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_OPERANDS}, bool transposed, bool need_x, bool need_weight) -> (Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Tensor,
    offsets: Tensor | None,
    transposed: bool,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight; empty where they are not needed."""
    grad_x = torch.zeros_like(x) if need_x else x.new_empty(0)
    grad_weight = torch.zeros_like(weight) if need_weight else weight.new_empty(0)
    for e, rows in experts_with_rows(x, offsets):
        if need_x:
            grad_x[rows] = grad[rows] @ _oriented(weight[e] * mask[e], not transposed)
        if need_weight:  # straight-through: not masked
            a, b = (x[rows].to(grad.dtype), grad[rows]) if transposed else (grad[rows], x[rows].to(grad.dtype))
            torch.mm(a.t(), b, out=grad_weight[e])
    return grad_x, grad_weight


@_backward.register_fake
def _(grad, x, weight, mask, offsets, transposed, need_x, need_weight):
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
    )


@torch.library.custom_op(
    "sparseforge::expert_curvature",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor? offsets, SymInt[] shape, bool transposed) -> Tensor",
)
def _curvature(grad: Tensor, x: Tensor, offsets: Tensor | None, shape: list[int], transposed: bool) -> Tensor:
    """What the probe of that shape gets."""
    gradient_squared, input_squared = squared(grad), squared(x)
    total = gradient_squared.new_zeros(shape)
    for e, rows in experts_with_rows(x, offsets):
        if len(shape) == 2:
            total[e] = input_squared[rows].sum(0)
        else:
            g, h = gradient_squared[rows], input_squared[rows].to(gradient_squared.dtype)
            total[e] = h.t() @ g if transposed else g.t() @ h
    return total


@_curvature.register_fake
def _(grad, x, offsets, shape, transposed):
    return squared(grad).new_empty(shape)


def experts_with_rows(x: Tensor, offsets: Tensor | None) -> Iterator[tuple[int, slice | int]]:
    """Each expert that has rows, and what of x they are."""
    if offsets is None:
        yield from ((e, e) for e in range(x.shape[0]))
        return
    start = 0
    for e, end in enumerate(offsets.tolist()):
        if end > start:
            yield e, slice(start, end)
        start = max(start, end)


def _rows(x: Tensor, offsets: Tensor | None) -> Tensor:
    """How many rows each expert has; where each is given all tokens, those that are not zero."""
    return x.ne(0).any(-1).sum(-1) if offsets is None else offsets.diff(prepend=offsets.new_zeros(1))


def _oriented(weight: Tensor, transposed: bool) -> Tensor:
    """[in, out] of a matrix."""
    return weight if transposed else weight.t()


def _setup_context(ctx, inputs, output):
    x, weight, mask, offsets, bias, probe, transposed, _, counter = inputs
    ctx.save_for_backward(x, weight, mask, offsets)
    ctx.transposed = transposed
    ctx.bias = None if bias is None else bias.shape
    ctx.probe = None if probe is None else (list(probe.shape), probe.dtype)
    ctx.counter = None if counter is None else counter.dtype


def _gradients(ctx, grad):
    x, weight, mask, offsets = ctx.saved_tensors
    given = len(ctx.needs_input_grad)  # a caller may leave out last arguments
    need_x, need_weight, _, _, need_bias, need_probe, _, _, need_counter = (*ctx.needs_input_grad, *[False] * 5)[:9]
    grad_x = grad_weight = grad_bias = grad_probe = grad_counter = None
    if need_x or need_weight:
        found = _backward(grad.contiguous(), x, weight, mask, offsets, ctx.transposed, need_x, need_weight)
        grad_x, grad_weight = (g if need else None for g, need in zip(found, (need_x, need_weight), strict=True))
    if need_bias:
        grad_bias = grad.sum_to_size(ctx.bias)
    if need_probe:
        shape, dtype = ctx.probe
        grad_probe = _curvature(grad.contiguous(), x, offsets, shape, ctx.transposed).to(dtype)
    if need_counter:
        grad_counter = _rows(x, offsets).to(ctx.counter)
    return (grad_x, grad_weight, None, None, grad_bias, grad_probe, None, None, grad_counter)[:given]


soft_masked_experts.register_autograd(_gradients, setup_context=_setup_context)
EXPERTS_OP = torch.ops.sparseforge.soft_masked_experts.default
