"""AdamW with moments in 8 bits, torchao's (arXiv 2110.02861): two bytes a weight in the place of eight, and a float32
scale of each for every 256. Vectors, and tensors of other sizes, keep float32 moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.optimizers import decay_groups
from sparseforge_fx.methods.part import Part, local

Optimizer = Literal["adamw", "adamw8bit"]

BLOCK = 256  # values that share a scale; torchao's default
LEAST = 4096  # values of the smallest tensor whose moments are rounded; torchao's
SIGNED = {"exp_avg": True, "exp_avg_sq": False}


def check_optimizer(name: Any) -> None:
    """Raise a SparseForgeError unless it is one of :data:`Optimizer`, and there."""
    if name not in get_args(Optimizer):
        raise SparseForgeError(f"optimizer is {name!r}: choose one of {', '.join(get_args(Optimizer))}")
    if name != "adamw" and find_spec("torchao") is None:
        raise SparseForgeError(f"optimizer {name} needs torchao: pip install torchao, or leave out the optimizer")


def check_method(name: str, config: TrainedConfig, method: str) -> None:
    """Raise a SparseForgeError if the method, as users call it, has an optimizer, or parameters, of its own."""
    if name != "adamw" and (config.own_optimizer or not config.trains_weights):
        raise SparseForgeError(f"optimizer {name}: the method {method} has one of its own: leave out the optimizer")


def adamw_8bit(parameters: Iterable[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """The optimizer; vectors get no weight decay. ``options`` are AdamW's ``lr``, ``betas`` and ``weight_decay``."""
    from torchao.optim import AdamW8bit

    return AdamW8bit(decay_groups(list(parameters), **options), block_size=BLOCK, **options)


def set_rate(group: dict[str, Any], lr: float) -> None:
    """Give a group of parameters its learning rate, which is a tensor where the step is compiled."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def plain_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its ``state_dict()`` in plain tensors and numbers: of a rounded moment the codes and the scales, or its values in
    float32 where processes share it, for their parts cut through the blocks that share a scale."""
    state = optimizer.state_dict()
    groups = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
    moments = {i: {n: _plain(v) for n, v in entries.items()} for i, entries in state["state"].items()}
    return {"state": moments, "param_groups": groups}


def load_plain_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Put back what :func:`plain_state` gave, on this number of processes or another. What was saved as values is
    rounded once more."""
    rounded = any(isinstance(group["lr"], Tensor) for group in optimizer.param_groups)
    groups = [group | {"lr": torch.tensor(group["lr"]) if rounded else group["lr"]} for group in saved["param_groups"]]
    of = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    moments = saved["state"]
    if rounded:
        moments = {i: {n: _rounded(n, v, of[i]) for n, v in entries.items()} for i, entries in moments.items()}
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def moment_like(optimizer: torch.optim.Optimizer, parameter: Tensor, saved: Any) -> Any:
    """What :func:`plain_state` holds of a moment of this parameter, in form; ``saved`` says which of its two forms, as
    far as it may."""
    if not isinstance(saved, Mapping) or not hasattr(optimizer, "block_size") or not _takes(parameter):
        return parameter
    return {
        "codes": torch.empty(parameter.shape, dtype=torch.uint8, device="meta"),
        "scale": torch.empty(parameter.numel() // BLOCK, device="meta"),
    }


def _takes(tensor: Tensor) -> bool:
    """Are the moments of a tensor of this size rounded?"""
    return tensor.numel() >= LEAST and tensor.numel() % BLOCK == 0


def _plain(moment: Any) -> Any:
    here: Any = local(moment) if isinstance(moment, Tensor) else moment
    if not hasattr(here, "codes"):
        return moment
    if isinstance(moment, DTensor):
        return Part.of(moment).whole(here.dequantize())
    return {"codes": here.codes, "scale": here.scale}


def _rounded(name: str, saved: Any, parameter: Tensor) -> Any:
    """A moment of this parameter as the optimizer holds it."""
    if name not in SIGNED:
        return saved
    from torchao.optim.subclass_8bit import OptimState8bit

    part = Part.of(parameter) if isinstance(parameter, DTensor) else None
    if isinstance(saved, Mapping):
        codes, scale = saved["codes"], saved["scale"]
        empty = OptimState8bit.zeros((BLOCK,), SIGNED[name], BLOCK, codes.device, torch.float32)
        whole = OptimState8bit(codes, scale, empty.qmap, SIGNED[name], torch.float32)
        if part is None:
            return whole
        saved = whole.dequantize().narrow(part.dim, part.start, part.length)
    values = local(saved)
    if _takes(values):
        moment = OptimState8bit.zeros(values.shape, SIGNED[name], BLOCK, values.device, torch.float32)
        values = moment.copy_(values)
    return values if part is None else part.whole(values)
