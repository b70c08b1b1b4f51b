"""Packed checkpoints: a 2:4 model as a Hugging Face folder of 9/16 of its linears' bytes, and back, exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparseforge_fx.deploy.checkpoints.packed_files import (
    BITMASK,
    INDEX,
    METHOD,
    VALUES,
    Header,
    Site,
    check_folder,
    digests,
    read_json,
)
from sparseforge_fx.deploy.checkpoints.quantizer import PackedConfig, packed_linears
from sparseforge_fx.deploy.lowering.modules import find_sparse, weight_of
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.files import check_output, new_folder
from sparseforge_fx.kernels.packed import Packed, pack
from sparseforge_fx.models.dense import (
    DTYPES,
    Location,
    explained,
    is_packed,
    load_config,
    load_model,
    load_tokenizer,
    locate,
    model_class,
    save_model,
)
from sparseforge_fx.models.loading_bar import loading_bar


def save_packed(
    model: Any, tokenizer: Any, folder: str | Path, *, max_shard_size: str | int = "5GB", overwrite: bool = False
) -> dict[str, Any]:
    """Write a Hugging Face folder in which every exactly 2:4 nn.Linear and Conv1D is packed, whole or not at all.

    The rest is as ``save_pretrained`` writes it; the header is ``quantization_config`` in config.json. The same model
    gives the same bytes. The model is not changed.

    Args:
        model: a transformers model, dense with exact zeros or lowered by :func:`sparseforge_fx.lower_modules`.
        tokenizer: goes into the folder, too; None if there is none.
        max_shard_size: bytes of the largest weight file, as for ``save_pretrained``.

    Returns the report: sites, the other linears with reasons, bytes of the sites dense and packed.
    Raises SparseForgeError: no transformers model, quantised, no linear is 2:4, a folder that is not empty.
    """
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise SparseForgeError(
            f"{type(model).__name__} is no transformers model: a packed checkpoint needs its config.json"
        )
    before = getattr(model.config, "quantization_config", None)
    if before is not None and not isinstance(before, PackedConfig):
        raise SparseForgeError("the weights of the model are quantised already: pack it before that")
    check_output(Path(folder), overwrite=overwrite)
    state, header, report = packed_state(model)
    with new_folder(Path(folder), overwrite=overwrite) as partial:
        model.config.quantization_config = PackedConfig(**header.to_json())
        try:
            # its own names, not those of older checkpoints: a packed tensor goes through no conversion
            model.save_pretrained(partial, state_dict=state, max_shard_size=max_shard_size, save_original_format=False)
        finally:
            if before is None:
                del model.config.quantization_config
            else:
                model.config.quantization_config = before
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _complete(partial, model)
    return report


def load(
    folder: str | Path, *, dtype: str | torch.dtype | None = None, device: Any = None, device_map: Any = None
) -> tuple[nn.Module, Any]:
    """The model of a packed checkpoint, in eval mode, and its tokenizer (None if it was packed without one).

    Its linears are :class:`SparseLinear` (deploy/lowering/modules.py) in the layout of their device; no packed weight
    is ever dense. All of the folder is checked first: nothing in it is executed or unpickled.

    Args:
        folder: what :func:`save_packed` wrote, or a hub id of it.
        dtype: ``bfloat16``, ``float16``, ``float32``; None: the checkpoint's own.
        device: all of the model goes there. device_map: or what ``from_pretrained`` takes, "auto" say.

    Raises SparseForgeError: no packed checkpoint, damaged, from the future, of another tool.
    """
    where = locate(folder)
    if where.gguf:
        raise SparseForgeError(f"{folder} is a GGUF file, no packed checkpoint: load it with sf.load_model")
    path = Path(where.name) if Path(where.name).is_dir() else _download(where)
    check_folder(path)
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise SparseForgeError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    where = where._replace(name=str(path))
    config = load_config(where)
    tokenizer = load_tokenizer(where, config) if _has_tokenizer(path) else None
    options: dict[str, Any] = {"dtype": DTYPES[dtype] if isinstance(dtype, str) else dtype or "auto"}
    if device is not None or device_map is not None:
        options["device_map"] = {"": device} if device_map is None else device_map
    with explained(f"cannot load the packed model {folder}"), loading_bar(str(folder)):
        model, info = _model_class(config, folder).from_pretrained(
            path, config=config, use_safetensors=True, output_loading_info=True, **options
        )
        model.eval()
    if absent := sorted(info.get("missing_keys") or ()):
        raise SparseForgeError(f"tensor '{absent[0]}' of the model is missing from {folder}: copy the checkpoint anew")
    return model, tokenizer


def load_any(name: str | Path, dtype: str | torch.dtype | None = None) -> tuple[nn.Module, Any]:
    """:func:`load` of a packed checkpoint, :func:`sparseforge_fx.load_model` of any other."""
    where = locate(name)
    packed = not where.gguf and _says_packed(where)
    return load(name, dtype=dtype) if packed else load_model(name, dtype)


def unpack_checkpoint(packed: str | Path, dense: str | Path, *, overwrite: bool = False) -> None:
    """A packed folder -> a plain Hugging Face folder with exact zeros and nothing in it that says sparse.

    The weights are those that were packed, bit for bit (-0.0 excepted). Raises SparseForgeError as :func:`load` and
    :func:`sparseforge_fx.save_model` do.
    """
    check_output(Path(dense), overwrite=overwrite)
    model, tokenizer = load(packed)
    save_model(model.dequantize(), tokenizer, dense, overwrite=overwrite)  # type: ignore[operator]


def pack_checkpoint(
    dense: str | Path, packed: str | Path, *, max_shard_size: str | int = "5GB", overwrite: bool = False
) -> dict[str, Any]:
    """A folder of a 2:4 model -> a packed folder; returns the report of :func:`save_packed`."""
    check_output(Path(packed), overwrite=overwrite)
    model, tokenizer = load_model(dense)
    return save_packed(model, tokenizer, packed, max_shard_size=max_shard_size, overwrite=overwrite)


@torch.no_grad()
def packed_state(model: nn.Module) -> tuple[dict[str, Tensor], Header, dict[str, Any]]:
    """The state dict with packed weights in place of dense ones, the header of it, the report."""
    linears, skipped = find_sparse(model)
    found: dict[str, Packed] = {name: module.packed() for name, module in packed_linears(model).items()}
    found |= {name: pack(weight_of(module)) for name, module in linears.items()}
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:4])
        raise SparseForgeError(f"nothing to pack: {reasons or 'the model has no linear layer'}; run sparsify first")
    if any(packed.values.is_meta for packed in found.values()):
        raise SparseForgeError("weights of the model are on the meta device: load it without offloading first")
    if damaged := [n for n, packed in found.items() if not packed.values.isfinite().all()]:
        raise SparseForgeError(f"'{damaged[0]}' has NaN or inf in its weight: train or load it anew")
    gone = {f"{name}.{leaf}" for name in found for leaf in ("weight", "values", "where")}
    state = {key: value for key, value in model.state_dict().items() if key not in gone}
    for name, packed in found.items():
        state[f"{name}.{VALUES}"], state[f"{name}.{BITMASK}"] = packed.values, packed.bitmask
    modules = {
        name: Site(packed.shape[0], packed.in_features, str(packed.values.dtype).removeprefix("torch."))
        for name, packed in sorted(found.items())
    }
    report = {
        "sites": [{"name": n, "out": s[0], "in": s[1], "bytes": found[n].nbytes} for n, s in modules.items()],
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped.items()],
        "dense_bytes": sum(p.shape.numel() * p.values.element_size() for p in found.values()),
        "packed_bytes": sum(p.nbytes for p in found.values()),
    }
    header = Header(modules, model_modules=sum(1 for _ in model.modules()))
    state[header.sentinel] = torch.empty(0, dtype=torch.uint8)
    return state, header, report


def _complete(folder: Path, model: Any) -> None:
    """What ``save_pretrained`` does not know: checksums for the header, and how many weights are in packed ones."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["files"] = digests(folder.glob("*.safetensors"))
    _write_json(folder / "config.json", config)
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
        packed = sum(m.out_features * m.in_features for m in packed_linears(model).values())
        index["metadata"]["total_parameters"] = model.num_parameters() + packed
        _write_json(folder / INDEX, index)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _says_packed(where: Location) -> bool:
    if not Path(where.name).is_dir():
        return is_packed(load_config(where))
    # what stands there, before the configuration's class makes something of it
    found = read_json(Path(where.name) / "config.json").get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == METHOD


def _has_tokenizer(folder: Path) -> bool:
    patterns = ("*token*", "*vocab*", "merges.*", "*.model", "tekken.json")
    return any(not file.name.endswith(".safetensors") for pattern in patterns for file in folder.glob(pattern))


def _model_class(config: Any, folder: str | Path) -> Any:
    """A model class and nothing else of transformers, whatever config.json names."""
    found = model_class(config)
    if found is not AutoModelForCausalLM and not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise SparseForgeError(f"config.json of {folder} names {found}, which is no model: it is damaged")
    return found


def _download(where: Any) -> Path:
    from huggingface_hub import snapshot_download

    with explained(f"cannot download {where.name}"):
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
        return Path(snapshot_download(where.name, allow_patterns=patterns, **where.options))
