"""PEFT's LoRA beside packed linears: a layer of PEFT's own kind, registered when this module is imported.

Importing ``sparseforge_fx`` is enough (see ``transformers_hook``). Every LoraConfig gets the layer through PEFT's
extension point for custom modules, also the one that ``PeftModel.from_pretrained`` reads from a file.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners import tuners_utils
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear
from torch import nn

from sparseforge_fx.deploy.lowering.packed_embedding import TiedHead
from sparseforge_fx.deploy.lowering.sparse_modules import PackedWeight, SparseLinear
from sparseforge_fx.errors import SparseForgeError

# ways to initialise an adapter that leave the base weight as it is
INITS = (True, False, "gaussian", "orthogonal", "eva")


class SparseLoraLinear(Linear):
    """y = x W^T + b + scale * (x A^T) B^T with W packed and frozen; A [r, in] and B [out, r] train."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        return base_layer.weight_values.device, base_layer.dtype  # PEFT would unpack the weight to see

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Those of PEFT's variants that only read the base weight."""
        known = super().lora_variants
        return {k: known[k] for k in ((), ("use_dora",), ("alora_invocation_tokens",)) if k in known}

    def update_layer(self, adapter_name: str, *args: Any, config: LoraConfig, **options: Any) -> None:  # type: ignore[override]
        if config.init_lora_weights not in INITS:
            raise SparseForgeError(
                f"init_lora_weights={config.init_lora_weights!r} changes the base weight, and packed ones are frozen: "
                "choose True or 'gaussian'"
            )
        if self.get_base_layer().transposed:
            config.fan_in_fan_out = True  # what PEFT writes for a dense Conv1D, on which the adapter then loads, too
        self.fan_in_fan_out = False  # whatever it stands for, a packed weight is [out, in], and so is its update
        super().update_layer(adapter_name, *args, config=config, **options)  # type: ignore[misc]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise SparseForgeError(
            "an adapter cannot be added to a packed 2:4 weight, which would be dense then: merge with "
            "sf.merge_lora(peft_model, mode='masked'), or leave the adapter beside it"
        )


def _register(config: type[LoraConfig]) -> None:
    after = config.__post_init__

    @functools.wraps(after)
    def with_packed(self: LoraConfig) -> None:
        after(self)
        self._register_custom_module({SparseLinear: SparseLoraLinear})

    config.__post_init__ = with_packed  # type: ignore[method-assign]


def _refuse_copies(config: Any, model: nn.Module) -> None:
    """PEFT would copy a packed module to train it, and nothing of the copy trains."""
    names = tuple(getattr(config, "modules_to_save", None) or ())
    for path, module in model.named_modules():
        if path.endswith(names):  # PEFT's rule
            for inner, part in module.named_modules(prefix=path):
                if isinstance(part, PackedWeight | TiedHead):
                    raise SparseForgeError(
                        f"modules_to_save has '{inner}', which is packed in {part.format} and frozen: put its "
                        "to_dense() in its place first, or adapt it by target_modules"
                    )


def _register_search() -> None:
    """What PEFT does before it changes anything of a model: there ``modules_to_save`` is looked at, and
    ``target_modules="all-linear"`` looks for nn.Linear. It would pass over packed ones and say nothing."""
    find = getattr(tuners_utils, "_maybe_include_all_linear_layers", None)
    if find is None:
        return

    @functools.wraps(find)
    def with_packed(config: Any, model: nn.Module) -> Any:
        _refuse_copies(config, model)
        targets = getattr(config, "target_modules", None)
        found = find(config, model)
        if isinstance(targets, str) and targets.lower() == "all-linear" and isinstance(config, LoraConfig):
            head = getattr(model, "get_output_embeddings", lambda: None)()
            adapted = {n for n, m in model.named_modules() if isinstance(m, tuners_utils.BaseTunerLayer)}
            found.target_modules = set(found.target_modules) | {
                name
                for name, module in model.named_modules()
                if isinstance(module, SparseLinear) and module is not head and name.rpartition(".")[0] not in adapted
            }
        return found

    tuners_utils._maybe_include_all_linear_layers = with_packed  # type: ignore[assignment]


_register(LoraConfig)
_register_search()
