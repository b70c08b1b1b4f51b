"""A model whose weights stay on disk: its shapes, its computed buffers, and each weight when it is asked for."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import without_values
from sparseforge_fx.models.compute_dtype import cast
from sparseforge_fx.models.dense import (
    explained,
    is_packed,
    load_config,
    load_tokenizer,
    locate,
    make_skeleton,
)
from sparseforge_fx.models.low_rank import branch_names
from sparseforge_fx.models.shards import Shards


class StreamedModel:
    """``skeleton`` is the model with shapes alone; :meth:`fetch` gives its tensors by name, on the CPU.

    Args:
        name: a folder with safetensors files, or a hub id, which is fetched.
        device: what ``skeleton`` is captured for.

    Buffers that a model computes are its own, made without its weights. Names and shapes in the files need not be the
    model's: transformers' conversions (experts that are stacked, prefixes that came and went) are followed both ways.
    Raises SparseForgeError where a weight is missing, and for checkpoints that hold no dense safetensors.
    """

    def __init__(self, name: str | Path, device: torch.device | str = "cpu"):
        where = locate(name)
        config = load_config(where)
        if where.gguf or is_packed(config) or getattr(config, "quantization_config", None) is not None:
            raise SparseForgeError(f"{name} is no dense safetensors checkpoint: only such can stay on disk")
        self.tokenizer = load_tokenizer(where, config)
        self.folder = _download(where.name, where.options)
        self.shards = Shards(self.folder)
        if branch_names(self.shards.places):
            raise SparseForgeError(
                f"{name} has low-rank branches (slorb_block), which would be left out from disk: load the model whole"
            )
        if getattr(config, "dtype", None) is None:  # as from_pretrained(dtype="auto") finds it
            config.dtype = next((p.dtype for p in self.shards.places.values() if p.dtype.is_floating_point), None)
        model = make_skeleton(config, name)
        with explained(f"cannot build the model of {name}"):
            _compute_buffers(model)
        model.tie_weights()  # what was made without values came apart
        self._computed = dict(model.named_buffers())
        self.device = torch.device(device)
        self.skeleton: Any = model.eval()  # of transformers
        without_values(model, device)
        self._conversions = get_model_conversion_mapping(model)
        self._keys = self._find_keys()
        self._ties = self._find_ties()
        for name, value in self._computed.items():
            if name not in self._keys and _unfilled(value):
                raise SparseForgeError(
                    f"the buffer {name} is neither in the files of {self.folder} nor filled by initialize_weights(), "
                    "as from_pretrained does it: sparsify the model in memory"
                )
        self.own = {n: p.dtype for n, p in model.named_parameters(remove_duplicate=False)}
        if absent := sorted(n for n in self.own if not self._keys.get(self._ties.get(n, n))):
            raise SparseForgeError(
                f"the checkpoint {name} lacks {len(absent)} weights of its model, {absent[0]} the first of them"
            )

    def compute_in(self, dtype: torch.dtype) -> None:
        """From now on, as :func:`~sparseforge_fx.models.compute_dtype.cast` would."""
        cast(self.skeleton, dtype)

    def fetch(self, name: str, shards: Shards | None = None) -> Tensor:
        """A parameter or buffer in the dtype of the computation, from other ``shards`` of the same names."""
        stored = self._ties.get(name, name)
        if stored in self._computed and not self._keys.get(stored):
            return self._computed[stored]
        value = self._load(stored, shards or self.shards)
        if name in self.own:
            value = value.to(self.own[name]).to(self.skeleton.get_parameter(name).dtype)
        return value

    def write(self, name: str, value: Tensor, to: Shards) -> None:
        """A parameter into the files, as they keep it."""
        stored = self._ties.get(name, name)
        keys = self._keys[stored]
        if keys[0][1] is None:
            to.write(keys[0][0], value.to(self.own[name]))
            return
        for key, part in revert_weight_conversion(self.skeleton, {stored: value.to(self.own[name])}).items():
            to.write(key, part)

    # -- names -------------------------------------------------------------------------------------------------------
    def _find_keys(self) -> dict[str, list[tuple[str, str | None]]]:
        """Name in the model -> (name in the files, pattern of its conversion) of all that it is made of."""
        renamings = [c for c in self._conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in self._conversions if isinstance(c, WeightConverter)]
        prefix, meta = getattr(self.skeleton, "base_model_prefix", None), self.skeleton.state_dict()
        found: dict[str, list[tuple[str, str | None]]] = {}
        for key in sorted(self.shards.places, key=_natural):
            name, pattern = rename_source_key(key, renamings, converters, prefix, meta)
            found.setdefault(name, []).append((key, pattern))
        return found

    def _find_ties(self) -> dict[str, str]:
        """A name that the files lack -> the tied one that they have."""
        groups: dict[int, list[str]] = {}
        for name, parameter in self.skeleton.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        ties = dict(getattr(self.skeleton, "all_tied_weights_keys", None) or {})
        found: dict[str, str] = {}
        for names in groups.values():
            there = [n for n in names if n in self._keys] or [ties[n] for n in names if ties.get(n) in self._keys]
            found |= {n: there[0] for n in names if there}
        return found

    def _load(self, stored: str, shards: Shards) -> Tensor:
        keys = self._keys[stored]
        if keys[0][1] is None:
            return shards.read(keys[0][0])
        converter = next(c for c in self._conversions if keys[0][1] in getattr(c, "source_patterns", ()))
        mapping: Any = deepcopy(converter)
        for key, pattern in keys:
            mapping.add_tensor(stored, key, pattern, shards.read(key))
        made = mapping.convert(stored, model=self.skeleton, config=self.skeleton.config)
        value = made.get(stored)
        value = value[0] if isinstance(value, list) else value
        if not isinstance(value, Tensor):
            raise SparseForgeError(f"{stored} cannot be made of the files of {self.folder}: sparsify it in memory")
        return value


def _compute_buffers(model: Any) -> None:
    """Give the buffers of a model on the meta device their values as ``from_pretrained`` does: by ``_init_weights``,
    which has nothing to do for weights without values. (A model that is made on the CPU takes room for each weight.)
    What that leaves as it is, is :func:`_unfilled`."""
    for module in model.modules():
        for name, value in module._buffers.items():
            if value is not None and value.is_meta:
                module._buffers[name] = torch.full_like(value, _empty(value.dtype), device="cpu")
    model.initialize_weights()


def _empty(dtype: torch.dtype) -> float | int:
    """What no buffer is meant to hold; of two truth values none is left for it."""
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    return 0 if dtype is torch.bool else torch.iinfo(dtype).max


def _unfilled(value: Tensor) -> bool:
    """Has this buffer got no value?"""
    if not value.numel() or value.dtype is torch.bool:
        return False
    if value.is_floating_point() or value.is_complex():
        return bool(value.isnan().any())
    return bool((value == _empty(value.dtype)).all())


def _natural(key: str) -> tuple:
    return tuple((int(p), "") if p.isdigit() else (-1, p) for p in key.split("."))


def _download(name: str, options: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download

    if Path(name).is_dir():
        return Path(name)
    with explained(f"cannot fetch {name}"):
        others = ["*.bin", "*.pt", "*.gguf", "*.h5", "*.msgpack"]
        return Path(snapshot_download(name, ignore_patterns=others, **options))
