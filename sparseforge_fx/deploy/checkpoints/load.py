"""``load``: the one way in, whatever a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparseforge_fx.deploy.checkpoints.packed_files import check_folder, read_json
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.models.dense import (
    Location,
    explained,
    find_dtype,
    is_packed,
    load_config,
    load_dense,
    load_tokenizer,
    locate,
    model_class,
    where_to,
)
from sparseforge_fx.models.loading_bar import loading_bar


def load(
    name: str | Path, *, dtype: str | torch.dtype | None = None, device: Any = None, device_map: Any = None
) -> tuple[nn.Module, Any]:
    """The model, in eval mode, and its tokenizer (None for a model without a vocabulary, or packed without one).

    What is done with each kind of ``name``:

    - a folder or hub id that :func:`save_packed` wrote: its linears become :class:`SparseLinear`, its stacks of experts
      :class:`SparseExperts` (deploy/lowering/sparse_modules.py), in the layout of their device; nothing packed is ever
      dense (``model.dequantize()`` makes it so, in place), but for stacks that transformers' experts interface does not
      compute. All of the folder is checked first, and a hub id downloaded: nothing in it is executed or unpickled.
    - any other folder or hub id of transformers: the class that wrote it, its weights as they are, zeros included;
      low-rank branches (``slorb_block``) are rebuilt. Code that comes with a checkpoint is never run.
    - a GGUF file, or a folder that holds one and nothing else to load: its weights are dequantised.

    Args:
        dtype: ``bfloat16``, ``float16``, ``float32``; None: the checkpoint's own; bfloat16 for a GGUF file.
        device: all of the model goes there; None: the CPU. device_map: or what ``from_pretrained`` takes, "auto" say.

    Raises SparseForgeError: nothing of that name, the hub is not reachable, not a model, weights missing; quantised by
    another tool; packed and damaged, or from the future; a tokenizer that cannot be loaded.
    """
    where = locate(name)
    if where.gguf or not _says_packed(where):
        return load_dense(name, dtype=dtype, device=device, device_map=device_map)
    path = Path(where.name) if Path(where.name).is_dir() else _download(where)
    check_folder(path)
    options = {"dtype": find_dtype(dtype) or "auto", **where_to(device, device_map)}
    where = where._replace(name=str(path))
    config = load_config(where)
    tokenizer = load_tokenizer(where, config)
    with explained(f"cannot load the packed model {name}"), loading_bar(str(name)):
        model, info = _model_class(config, name).from_pretrained(
            path, config=config, use_safetensors=True, output_loading_info=True, **options
        )
        model.eval()
    if absent := sorted(info.get("missing_keys") or ()):
        raise SparseForgeError(f"tensor '{absent[0]}' of the model is missing from {name}: copy the checkpoint anew")
    return model, tokenizer


def _says_packed(where: Location) -> bool:
    if not Path(where.name).is_dir():
        return is_packed(load_config(where))
    # what stands there, before the configuration's class makes something of it
    return is_packed(read_json(Path(where.name) / "config.json"))


def _model_class(config: Any, folder: str | Path) -> Any:
    """A model class and nothing else of transformers, whatever config.json names."""
    found = model_class(config)
    if found is not AutoModelForCausalLM and not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise SparseForgeError(f"config.json of {folder} names {found}, which is no model: it is damaged")
    return found


def _download(where: Location) -> Path:
    from huggingface_hub import snapshot_download

    with explained(f"cannot download {where.name}"):
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(where.name, allow_patterns=patterns, **where.options))
