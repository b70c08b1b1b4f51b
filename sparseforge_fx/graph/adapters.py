"""Which parts of a model are adapters: PEFT says it, where it is in use.

PEFT trains adapters beside base layers that it freezes. So adapters are nobody's weights to prune, and a frozen base
layer is no wish of the user's that it stay as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor, nn


class Adapters(NamedTuple):
    """Parameters by identity (``id``).

    Attributes:
        own: adapters' own, copies of whole modules that are trained with them included.
        merged: base weights that an adapter is added to in place: taking it out again would fill their zeros.
        bases: base weights beside which adapters are computed.
    """

    own: frozenset[int] = frozenset()
    merged: frozenset[int] = frozenset()
    bases: frozenset[int] = frozenset()


def find_adapters(model: nn.Module | None) -> Adapters:
    """The adapters of ``model``; none where PEFT is not even imported."""
    if model is None or "peft" not in sys.modules:
        return Adapters()
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    own: set[int] = set()
    merged: set[int] = set()
    bases: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = set(_ids(module.get_base_layer()))
            bases |= base
            merged |= base if module.merged else set()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            base = set(_ids(module.original_module))
        elif isinstance(module, PeftModel):  # prompts, and the networks that make them
            own |= set(_ids(getattr(module, "prompt_encoder", None)))
            continue
        else:
            continue
        own |= set(_ids(module)) - base
    return Adapters(frozenset(own), frozenset(merged), frozenset(bases - own))


def adapter_notes(model: nn.Module, pruned: Iterable[Tensor]) -> list[str]:
    """What a report must say of a run on a model with adapters; ``pruned`` are its sites' weights."""
    adapters = find_adapters(model)
    if not adapters.own:
        return []
    frozen = sum(not weight.requires_grad for weight in pruned)
    notes = ["the model carries PEFT adapters: they stay as they are, and the base weights are pruned under them"]
    if frozen:
        notes[0] += f" ({frozen} of them frozen, which beside adapters is not taken for a wish)"
    notes[0] += "; saving the result writes them into a folder adapter of their own"
    if adapters.merged:
        notes.append("weights that an adapter is merged into stay dense: call merge_and_unload() first to prune them")
    return notes


def _ids(module: nn.Module | None) -> Iterator[int]:
    return iter(()) if module is None else (id(p) for p in module.parameters())
