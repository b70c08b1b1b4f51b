"""``save_packed``: a 2:4 model as a Hugging Face folder of 9/16 of its linears' bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseforge_fx.deploy.checkpoints.packed_files import INDEX, digests
from sparseforge_fx.deploy.checkpoints.packed_state import packed_state
from sparseforge_fx.deploy.checkpoints.quantizer import PackedConfig
from sparseforge_fx.deploy.lowering.report import PackingReport
from sparseforge_fx.deploy.lowering.sparse_modules import packed_weights
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.files import check_output, new_folder
from sparseforge_fx.graph.forward import unwrapped
from sparseforge_fx.models.beside_adapters import has_adapters
from sparseforge_fx.models.companions import copy_companions
from sparseforge_fx.ranges import checked


@checked
def save_packed(
    model: Any, tokenizer: Any, folder: str | Path, *,
    max_shard_size: str | int = "5GB", overwrite: bool = False, beside: Sequence[Path] = (),
) -> PackingReport:  # fmt: skip
    """Write a Hugging Face folder in which every exactly 2:4 nn.Linear, Conv1D and stack of experts is packed, whole or
    not at all.

    The rest is as ``save_pretrained`` writes it; the header is ``quantization_config`` in config.json. The same model
    gives the same bytes. The model is not changed.

    Args:
        model: a transformers model, dense with exact zeros or lowered by :func:`sparseforge_fx.lower_modules`.
        tokenizer: goes into the folder, too; None if there is none.
        max_shard_size: bytes of the largest weight file, as for ``save_pretrained``.
        beside: files and folders to copy into it, unless it has them.

    Returns the report: sites, the other linears with reasons, bytes of the sites dense and packed.
    Raises SparseForgeError: no transformers model, quantised, adapters, no linear is 2:4, a folder that is not empty.
    """
    model = unwrapped(model)
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise SparseForgeError(
            f"{type(model).__name__} is no transformers model: a packed checkpoint needs its config.json"
        )
    if has_adapters(model):
        raise SparseForgeError(
            "the model carries PEFT adapters, and a packed checkpoint has no place for them: merge them "
            "(sf.merge_lora), or save them by themselves and give PeftModel.unload()"
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
        copy_companions(beside, partial)
        _complete(partial, model)
    return report


def _complete(folder: Path, model: Any) -> None:
    """What ``save_pretrained`` does not know: checksums for the header, and how many weights are in packed ones."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["files"] = digests(folder.glob("*.safetensors"))
    _write_json(folder / "config.json", config)
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
        packed = sum(math.prod(m.shape) for m in packed_weights(model).values())
        index["metadata"]["total_parameters"] = model.num_parameters() + packed
        _write_json(folder / INDEX, index)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
