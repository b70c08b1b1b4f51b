"""``sparseforge::sparse_linear``: a linear whose weight stays packed: 2:4, or in few bits, or both.

A plain operator: it exports, compiles with any batch size in one graph, and trains what lies around it (gradients to x
and bias, none to the packed weight). What runs is chosen by device and by the weight's layout: see ``layouts.py``. Once
the C++ library for CPUs is in use, usual calls on packed rows skip this file: ``cpu/operator.cpp`` does the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.activations import ACTIVATIONS
from sparseforge_fx.kernels.layouts import kernel_of
from sparseforge_fx.kernels.packed import Packed, unpack

aten = torch.ops.aten


def reference(x: Tensor, packed: Packed, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """The operator in plain torch, any floating dtype: unpack, ``F.linear``, activation in x's dtype.

    Every kernel is tested against this one function.
    """
    weight = unpack(packed)
    return ACTIVATIONS[activation].forward(F.linear(x, weight if packed.scales is None else weight.to(x.dtype), bias))


_ARGUMENTS = "Tensor values, Tensor meta, str layout, int in_features"
torch.library.define(
    "sparseforge::sparse_linear",
    f"(Tensor x, {_ARGUMENTS}, Tensor? bias=None, str activation='none', Tensor? scales=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "sparseforge::dense_weight",
    f"({_ARGUMENTS}, Tensor? scales=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
OP = torch.ops.sparseforge.sparse_linear.default
DENSE_OP = torch.ops.sparseforge.dense_weight.default


def sparse_linear(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    layout: str,
    in_features: int,
    bias: Tensor | None = None,
    activation: str = "none",
    scales: Tensor | None = None,
) -> Tensor:
    """act(x W^T + bias), W [out, in] packed.

    Args:
        x: [..., in], of the dtype of ``values`` (any floating one, if these are codes); any strides, any number of
            rows, zero too.
        values, meta, layout: the packed weight. "rows" is the format on disk: ``Packed.values`` and ``Packed.bitmask``.
        in_features: ``in``. Places of a packed weight beyond it are never multiplied with x.
        bias: [out] in x's dtype, or None.
        activation: "none", "relu", "gelu", "gelu_tanh", "silu", or "silu_mul": silu of the first half of the outputs
            times the second half, [..., out / 2].
        scales: those of ``Packed``, if ``values`` are int8 or int4 codes. A CPU's kernels then round x to 8 bits, one
            scale for 16 (AVX-512 with VNNI), 32 (AVX2, "pairs") or 128 inputs: an error of at most 1/254 of their
            largest.

    Sums are float32 or better and rounded once, after the activation (plain torch also rounds before it). A row of x
    that holds inf or NaN spoils its own outputs only; whether a pruned place makes NaN of them (0 * inf, as in a dense
    weight) or is passed over is left to the kernel. Gradients go to x and bias; ``values`` is frozen. Under autocast
    everything is computed in its dtype, as a linear is.

    Raises SparseForgeError if shapes, dtypes or devices do not fit, or the layout or activation is unknown.
    """
    return OP(x, values, meta, layout, in_features, bias, activation, scales)


def _check(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    in_features: int,
    bias: Tensor | None,
    activation: str,
    scales: Tensor | None,
) -> int:
    """The width of the output."""
    out_features = values.shape[0]
    if activation not in ACTIVATIONS:
        raise SparseForgeError(f"activation '{activation}' is not one of {', '.join(ACTIVATIONS)}")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise SparseForgeError(f"x of shape {list(x.shape)} does not end in the packed weight's {in_features} inputs")
    if not x.is_floating_point() or (scales is None and x.dtype != values.dtype):
        raise SparseForgeError(f"x is {x.dtype} but the packed weight is {values.dtype}: cast one of them")
    if x.device != values.device or meta.device != values.device:
        raise SparseForgeError(f"x is on {x.device}, the packed weight on {values.device} and {meta.device}: move one")
    if scales is not None and scales.device != values.device:
        raise SparseForgeError(f"the scales are on {scales.device}, the packed weight on {values.device}: move one")
    if bias is not None and (bias.shape != (out_features,) or bias.dtype != x.dtype or bias.device != x.device):
        raise SparseForgeError(f"the bias must be [{out_features}] {x.dtype} on {x.device}, as x and the weight are")
    if activation == "silu_mul":
        if out_features % 2:
            raise SparseForgeError(f"silu_mul halves the outputs, but this weight has {out_features} of them")
        return out_features // 2
    return out_features


@torch.library.impl("sparseforge::sparse_linear", "CompositeExplicitAutograd")
def _linear(x, values, meta, layout, in_features, bias=None, activation="none", scales=None):
    width = _check(x, values, meta, in_features, bias, activation, scales)
    kernel = kernel_of(layout, x.device)
    rows = x.reshape(-1, in_features)
    y = kernel.linear(rows, values, meta, in_features, bias, activation, scales)
    if y is None:
        weight = kernel.dense(values, meta, in_features, scales).to(x.dtype)
        y = ACTIVATIONS[activation].forward(F.linear(rows, weight, bias))
    return aten._unsafe_view(y, [*x.shape[:-1], width])  # no view: autograd forbids writing into one of an operator's


@torch.library.impl("sparseforge::dense_weight", "CompositeExplicitAutograd")
def _dense(values, meta, layout, in_features, scales=None):
    return kernel_of(layout, values.device).dense(values, meta, in_features, scales)


@torch.library.register_fake("sparseforge::sparse_linear")
def _fake_linear(x, values, meta, layout, in_features, bias=None, activation="none", scales=None):
    return x.new_empty(*x.shape[:-1], _check(x, values, meta, in_features, bias, activation, scales))


@torch.library.register_fake("sparseforge::dense_weight")
def _fake_dense(values, meta, layout, in_features, scales=None):
    dtype = values.dtype if scales is None else torch.float32
    return values.new_empty(values.shape[0], in_features, dtype=dtype)


def _setup_context(ctx, inputs, output):
    x, values, meta, layout, in_features, bias, activation, scales = inputs
    needed = activation != "none"  # to compute the value before the activation once more: cheaper than keeping it
    ctx.save_for_backward(x if needed else None, values, meta, bias if needed else None, scales)
    ctx.options = layout, in_features, activation


def _backward(ctx, grad):
    x, values, meta, bias, scales = ctx.saved_tensors
    layout, in_features, activation = ctx.options
    if activation != "none":
        grad = ACTIVATIONS[activation].backward(grad, OP(x, values, meta, layout, in_features, bias, "none", scales))
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ DENSE_OP(values.detach(), meta, layout, in_features, scales).to(grad.dtype)
    if ctx.needs_input_grad[5:6] == (True,):  # the dispatcher drops trailing arguments that equal their defaults
        grad_bias = grad.sum_to_size(grad.shape[-1])
    return grad_x, None, None, None, None, grad_bias, None, None


torch.library.register_autograd("sparseforge::sparse_linear", _backward, setup_context=_setup_context)


def _under_autocast(device: str) -> Callable[..., Tensor]:
    def linear(x, values, meta, layout, in_features, bias=None, activation="none", scales=None):
        dtype = torch.get_autocast_dtype(device)
        x, bias = (t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, bias))
        if scales is None and values.dtype != torch.float64:
            values = values.to(dtype)
        with torch.autocast(device, enabled=False):
            return OP(x, values, meta, layout, in_features, bias, activation, scales)

    return linear


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    torch.library.impl("sparseforge::sparse_linear", _key, _under_autocast(_device))
