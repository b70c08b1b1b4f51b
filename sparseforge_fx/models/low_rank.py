"""SLoRB's branch y + (x X^T) S^T beside a linear of a model, and how a checkpoint keeps it.

A branch is a child ``slorb`` of its linear, added by a forward hook: X [rank, in], S [out, rank], rank = in / block. In
a checkpoint it is two more tensors, ``<linear>.slorb.x`` and ``<linear>.slorb.s``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparseforge_fx.errors import SparseForgeError

CHILD = "slorb"
_NAME = re.compile(rf"(.+)\.{CHILD}\.([xs])")


class LowRankBranch(nn.Module):
    """X [rank, in] and S [out, rank] of one linear."""

    def __init__(self, x: Tensor, s: Tensor):
        super().__init__()
        self.x, self.s = nn.Parameter(x.detach()), nn.Parameter(s.detach())

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(inputs, self.x), self.s)

    @staticmethod
    def add(owner: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Forward hook of the linear that owns a branch."""
        return output + owner.get_submodule(CHILD)(args[0])


# -- at a model's linears --------------------------------------------------------------------------------------------
def attach(owner: nn.Module, branch: LowRankBranch) -> None:
    """Let ``owner`` add the branch to what it answers."""
    owner.add_module(CHILD, branch)
    owner.register_forward_hook(LowRankBranch.add)


def detach(owner: nn.Module) -> LowRankBranch | None:
    """Take the branch off; None where there is none."""
    branch = owner._modules.get(CHILD)
    if not isinstance(branch, LowRankBranch):
        return None
    del owner._modules[CHILD]
    for key in [k for k, hook in owner._forward_hooks.items() if hook is LowRankBranch.add]:
        del owner._forward_hooks[key]
    return branch


def hand_on(old: nn.Module, new: nn.Module) -> None:
    """Move the branch, if there is one, to the module that takes the place of ``old``."""
    branch = detach(old)
    if branch is not None:
        attach(new, branch)


def branches(model: nn.Module) -> dict[str, LowRankBranch]:
    """The branches of a model by the names of their linears."""
    found = ((name, module._modules.get(CHILD)) for name, module in model.named_modules())
    return {name: branch for name, branch in found if isinstance(branch, LowRankBranch)}


def has_other_hooks(module: nn.Module) -> bool:
    """Does something else than a branch see what the module takes or gives, or has its ``forward`` been replaced?"""
    others = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    replaced = "forward" in module.__dict__  # as accelerate's hooks do
    return bool(others) or replaced or any(h is not LowRankBranch.add for h in module._forward_hooks.values())


def branch_names(names: Iterable[str]) -> dict[str, str]:
    """Of names in a checkpoint those of branches -> the linear's name."""
    return {name: match[1] for name in names if (match := _NAME.fullmatch(name))}


def rebuild(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Attach the branches whose tensors a checkpoint holds. Raises SparseForgeError for tensors that fit no linear."""
    linears = dict(model.named_modules())
    for name in sorted(set(branch_names(tensors).values())):
        x, s = (tensors.get(f"{name}.{CHILD}.{leaf}") for leaf in "xs")
        owner = linears.get(name)
        sizes = ("nf", "nx") if isinstance(owner, Conv1D) else ("out_features", "in_features")
        wide = tuple(getattr(owner, size, None) for size in sizes)
        fits = x is not None and s is not None and x.dim() == s.dim() == 2 and x.shape[0] == s.shape[1]
        if not fits or wide != (s.shape[0], x.shape[1]):  # type: ignore[union-attr]
            raise SparseForgeError(f"the low-rank branch of {name} fits no linear here: copy the checkpoint anew")
        like = owner.weight  # type: ignore[union-attr]
        attach(owner, LowRankBranch(*(t.to(like.device, like.dtype) for t in (x, s))))  # type: ignore[arg-type,union-attr]
