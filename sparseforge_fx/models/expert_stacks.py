"""Stacks of experts in transformers' models: 3-D parameters that its experts interface multiplies, one matrix for each.

Which modules those are is asked of what the interface's decorator gives them, not of an architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

NAMES = ("gate_up_proj", "up_proj", "down_proj")
#: what the interface's decorator says of a module
_SAYS = ("has_gate", "has_bias", "is_transposed", "config")


@dataclass
class ExpertStack:
    """One of them, as a linear is looked at: it has a weight, no bias of its own, and a place in a model.

    Attributes:
        owner: the module of experts.
        weight: [experts, out, in], or [experts, in, out] if ``transposed``; it is known here when another module has
            taken its place, too.
    """

    owner: nn.Module
    weight: nn.Parameter
    bias: None = None

    @property
    def transposed(self) -> bool:
        return bool(self.owner.is_transposed)

    @property
    def training(self) -> bool:
        return self.owner.training

    @property
    def oriented(self) -> Tensor:
        """[experts, out, in]"""
        return self.weight.detach().mT if self.transposed else self.weight.detach()


def has_experts(module: nn.Module) -> bool:
    """Does the experts interface compute this module?"""
    return all(hasattr(module, name) for name in _SAYS)


def find_expert_stacks(model: nn.Module) -> tuple[dict[str, ExpertStack], dict[str, str]]:
    """Those of the interface by the weight's name, and the model's other stacks with a reason."""
    found: dict[str, ExpertStack] = {}
    others: dict[str, str] = {}
    owners = [id(p) for module in model.modules() for p in module._parameters.values() if p is not None]
    for name, parameter in stacks_of(model):
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if leaf not in NAMES or not has_experts(owner):
            others[name] = "a stack that its module multiplies in a way of its own"
        elif owners.count(id(parameter)) > 1:
            others[name] = "its weight belongs to another module, too"
        else:
            found[name] = ExpertStack(owner, parameter)
    return found, others


def stacks_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All 3-D parameters but those of convolutions."""
    convolutions = {id(p) for m in model.modules() if isinstance(m, _ConvNd) for p in m.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and id(parameter) not in convolutions and type(parameter) is nn.Parameter:
            yield name, parameter
