"""The activations that a packed linear may end in, in plain torch, with their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def _silu_mul(y: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def _silu_mul_backward(grad: Tensor, y: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return torch.cat([aten.silu_backward(grad * up, gate), grad * F.silu(gate)], -1)


class Activation(NamedTuple):
    """An activation on the outputs, and its backward: (gradient, value before the activation) -> gradient."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "none": Activation(lambda y: y, lambda grad, y: grad),
    "relu": Activation(F.relu, lambda grad, y: aten.threshold_backward(grad, y, 0)),
    "gelu": Activation(F.gelu, lambda grad, y: aten.gelu_backward(grad, y)),
    "gelu_tanh": Activation(
        lambda y: F.gelu(y, approximate="tanh"), lambda grad, y: aten.gelu_backward(grad, y, approximate="tanh")
    ),
    "silu": Activation(F.silu, lambda grad, y: aten.silu_backward(grad, y)),
    "silu_mul": Activation(_silu_mul, _silu_mul_backward),
}
