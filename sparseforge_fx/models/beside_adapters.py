"""A model that carries PEFT adapters, written in two parts: the base model under its own names, as if it
had none, and the adapters. ``save_pretrained`` writes the adapters alone, without the weights that became sparse."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn

FOLDER = "adapter"
_FLAG = "_hf_peft_config_loaded"  # transformers' own, of a model with adapters: it then saves these alone


def has_adapters(model: Any) -> bool:
    """Whether a model is PEFT's, or has layers of PEFT's in it."""
    if "peft" not in sys.modules or not isinstance(model, nn.Module):
        return False
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return any(isinstance(m, PeftModel | BaseTunerLayer | AuxiliaryTrainingWrapper) for m in model.modules())


def save_both(model: Any, folder: Path) -> None:
    """The base model into ``folder``, and every adapter into ``folder/adapter``, where
    ``PeftModel.from_pretrained(base, folder/adapter)`` finds it."""
    from peft import PeftModel

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    state = dict(_own_tensors(base))
    flag = base.__dict__.pop(_FLAG, None)
    try:
        if hasattr(base, "save_pretrained"):
            base.save_pretrained(folder, state_dict=state)
        else:
            save_torch_state_dict(state, folder)
    finally:
        if flag is not None:
            setattr(base, _FLAG, flag)
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder / FOLDER))
    elif flag:  # transformers writes the active one of them
        for name in base.peft_config:
            with _active(base, name):
                base.save_pretrained(folder / FOLDER / ("" if name == "default" else name))


def _own_tensors(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The state of a model without its adapters: what they wrap has the wrapper's name."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside: dict[str, str] = {}  # where a wrapper's own module is, by the wrapper
    for name, module in base.named_modules():
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        if isinstance(module, BaseTunerLayer):
            wrapped = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            wrapped = module.original_module
        else:
            continue
        inside[name] = next(f"{name}.{path}" for path, found in module.named_modules() if found is wrapped)
    for key, value in base.state_dict().items():
        outer = next((name for name in inside if key.startswith(f"{name}.")), None)
        if outer is None:
            yield key, value
        elif key.startswith(f"{inside[outer]}."):
            yield outer + key.removeprefix(inside[outer]), value


@contextmanager
def _active(base: Any, name: str) -> Iterator[None]:
    before = base.active_adapters()
    learns = {n: p.requires_grad for n, p in base.named_parameters()}
    base.set_adapter(name)
    try:
        yield
    finally:
        base.set_adapter(before)
        for n, p in base.named_parameters():
            p.requires_grad_(learns[n])
