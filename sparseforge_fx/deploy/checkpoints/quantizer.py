"""``from_pretrained`` of a packed checkpoint: a transformers quantizer, registered when this module is imported.

Importing ``sparseforge_fx`` is enough (see ``transformers_hook``). The linears of the skeleton are replaced before
weights are read, so that a packed weight is never dense.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparseforge_fx.deploy.checkpoints.model_size import check_size
from sparseforge_fx.deploy.checkpoints.packed_files import (
    INDEX,
    SINGLE,
    check_folder,
    check_weights,
    read_json,
    shard_files,
    weight_files,
)
from sparseforge_fx.deploy.checkpoints.packed_header import Header, Site
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.layouts import native_layout
from sparseforge_fx.kernels.packed import BITMASK, METHOD, SCALES, VALUES, Packed, check_packed
from sparseforge_fx.models import low_rank
from sparseforge_fx.models.dense import find_dtype

if TYPE_CHECKING:
    from sparseforge_fx.deploy.lowering.packed_embedding import PackedEmbedding
    from sparseforge_fx.deploy.lowering.sparse_modules import PackedWeight, SparseLinear

MOST_BUFFER_BYTES = (
    1 << 30
)  # that a model may compute for itself (rotary tables and the like), whatever its config says


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed checkpoint as transformers carries it."""

    def __init__(self, **entries: Any):
        self.header = Header.from_json(entries)
        self.quant_method = METHOD  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        return self.header.to_json()


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Loads packed linears, and writes them again in ``save_pretrained``."""

    quantization_config: PackedConfig

    def __init__(self, quantization_config: Any, **options: Any):
        super().__init__(quantization_config, **options)
        if not self.pre_quantized:
            raise SparseForgeError(
                "a dense checkpoint is not packed while it loads: write it with sf.save_packed first"
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """The first that is asked of a quantizer, before files are looked for and before a model is built of what
        config.json says of its size."""
        header, folder = self.quantization_config.header, Path(config.name_or_path or "")
        if _has_header(folder, header) and any((folder / name).is_file() for name in (SINGLE, INDEX)):
            check_folder(folder)  # most likely what from_pretrained was given; it names the files later
        check_size(config, header.most_modules)
        return config

    update_tp_plan = update_attn_implementation  # the first that transformers 5.17 asks

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise SparseForgeError(f"packed weights cannot be loaded as {dtype}: choose bfloat16, float16 or float32")
        return dtype

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> list[Any]:
        return []  # the file has the model's own names; transformers 5.17 passes no model

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        from sparseforge_fx.deploy.checkpoints.packed_stacks import expect_stacks, named_in
        from sparseforge_fx.deploy.lowering.modules import replace

        header = self.quantization_config.header
        files = options.get("checkpoint_files") or ()
        stored = check_weights(_folder_of(files, model.config.name_or_path, header), header)
        here = _Names(model)
        same_class = type(model).__name__ in (model.config.architectures or ())  # another may well drop or add a head
        places = {name: here.module(name) for name in header.modules}
        absent = sorted(name for name, place in places.items() if place is None)
        if absent and (same_class or len(absent) == len(places)):
            raise SparseForgeError(
                f"packed module '{absent[0][:120]}' is not in this model: load it with the class that wrote it"
            )
        for name, place in places.items():
            if place is not None:
                make = _empty_table if name in header.embeddings else _empty
                replace(model, place, make(name, here.modules[place], header.modules[name]))
        self._tie(model, here, same_class)
        self.stacks = named_in(header.stacks, here.module)
        if (lost := len(header.stacks) - len(self.stacks)) and same_class:
            raise SparseForgeError(f"{lost} packed stacks are not in this model: load it with the class that wrote it")
        expect_stacks(model, self.stacks)
        _insert_branches(model, here, stored)
        if header.sentinel is not None:
            stored.pop(header.sentinel, None)
            expected = re.escape(header.sentinel.removeprefix(here.prefix))  # not to be reported as unexpected
            ignored = {*(model._keys_to_ignore_on_load_unexpected or ()), expected}
            model._keys_to_ignore_on_load_unexpected = ignored
        state = model.state_dict()
        held = {k: tuple(v.shape) for k, v in state.items()}
        found = {here.tensor(name, held): info for name, info in stored.items()}
        for name, info in found.items():
            if name in held and info.shape != held[name]:
                raise SparseForgeError(
                    f"tensor '{name}' has shape {list(info.shape)} and the model wants {list(held[name])}: "
                    "config.json and weights do not belong together"
                )
            if name in held and state[name].is_floating_point() != ("F" in info.dtype):
                raise SparseForgeError(
                    f"tensor '{name}' is {info.dtype} and the model wants {state[name].dtype}: copy it anew"
                )
        if same_class:
            _check_names(model, held.keys(), found.keys())
        size = sum(b.nbytes for _, b in model.named_non_persistent_buffers())
        if size > MOST_BUFFER_BYTES:
            raise SparseForgeError(f"config.json makes the model compute {size} bytes of buffers: it is damaged")

    def _tie(self, model: Any, here: _Names, same_class: bool) -> None:
        """Heads over the packed embeddings, where the model has them."""
        from sparseforge_fx.deploy.lowering.modules import replace
        from sparseforge_fx.deploy.lowering.packed_embedding import TiedHead
        from sparseforge_fx.models.ties import part

        ties = self.quantization_config.header.embeddings
        for name, of in ((head, table) for table, head in ties.items() if head is not None):
            place, table = here.module(name), here.module(of)
            if place is None or table is None:
                if same_class:
                    raise SparseForgeError(f"'{name}' is not in this model: load it with the class that wrote it")
                continue
            head, embedding = here.modules[place], model.get_submodule(table)
            if type(head) is not nn.Linear or tuple(head.weight.shape) != embedding.shape:
                raise SparseForgeError(
                    f"the header ties '{name}' to '{of}', whose weight does not fit it: config.json is damaged"
                )
            part(model, place)
            replace(model, place, TiedHead(embedding, head.bias))

    @torch.no_grad()
    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from sparseforge_fx.deploy.checkpoints.packed_stacks import take_stacks
        from sparseforge_fx.deploy.lowering.sparse_modules import lay_together, packed_weights

        for name, module in packed_weights(model).items():
            if module.weight_values.is_meta:
                raise SparseForgeError(
                    f"'{name}' was put on the disk, from where packed weights cannot run: free memory"
                )
            try:
                check_packed(module.packed())
            except SparseForgeError as error:
                raise SparseForgeError(f"'{name}': {error}; copy the checkpoint anew") from error
            values = module.weight_values
            if module.weight_scales is None and not values.isfinite().all():
                raise SparseForgeError(f"packed module '{name}' has NaN or inf as {values.dtype}: pack it anew")
            module.loading = False
        take_stacks(model, self.stacks)
        packed = packed_weights(model).values()
        for module in packed:
            change_to_device(module)
        lay_together(packed)
        model._weight_conversions = []  # save_pretrained would apply the inverse of ours to every name
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        from sparseforge_fx.deploy.checkpoints.packed_state import packed_state

        state, header, _ = packed_state(model)
        model.config.quantization_config = self.quantization_config = PackedConfig(**header.to_json())
        return state, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        from sparseforge_fx.deploy.lowering.modules import replace
        from sparseforge_fx.deploy.lowering.packed_embedding import packed_embeddings, tied_packed_heads
        from sparseforge_fx.deploy.lowering.sparse_modules import packed_weights
        from sparseforge_fx.models.ties import join

        heads = dict(tied_packed_heads(model))
        tables = {head: table for table, head in packed_embeddings(model).items() if head is not None}
        for name, module in packed_weights(model).items():
            replace(model, name, module.to_dense())  # type: ignore[operator]
        for name, head in heads.items():
            replace(model, name, head.to_dense(model.get_parameter(f"{tables[name]}.weight")))
            join(model, name)
        del model._weight_conversions  # the model's defaults, as if it had never been packed
        return model if dtype is None else model.to(find_dtype(dtype))  # a name, once the model was saved

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # what stands around packed weights and adapters beside them; they are frozen

    @property
    def is_compileable(self) -> bool:
        return True


def change_to_device(module: PackedWeight) -> None:
    """Give a packed weight the layout that its device reads; one without kernels of its own keeps that of the disk."""
    device, sides = module.weight_values.device, (module.out_features, module.in_features)
    module.change_layout(native_layout(device, module.format, *sides, module.dtype))


def _has_header(folder: Path, header: Header) -> bool:
    if not (folder / "config.json").is_file():
        return False
    try:
        return Header.from_json(read_json(folder / "config.json").get("quantization_config")) == header
    except SparseForgeError:
        return False


def _folder_of(files: Sequence[str], named: str, header: Header) -> Path:
    """The folder that config.json and the weights to be loaded are in: ``named``, if that is one, or below it."""
    if not files:
        raise SparseForgeError("a packed model is loaded from its folder: give that")
    folder = Path(os.path.abspath(files[0])).parent
    for file in map(Path, files):
        inside = not Path(named).is_dir() or (file.is_relative_to(named) and ".." not in file.relative_to(named).parts)
        if not inside or Path(os.path.abspath(file)).parent != folder or not _has_header(folder, header):
            raise SparseForgeError(f"{file} is not in the folder of the checkpoint's own config.json: it is not opened")
    above = [p for p in folder.parents if p.is_relative_to(os.path.abspath(named)) and (p / INDEX).is_file()]
    for place in above:  # did its index lead here?
        shard_files(place)
    if {Path(file).name for file in files} != {path.name for path in weight_files(folder)}:
        raise SparseForgeError(f"{files[0]} is no file of the packed checkpoint in {folder}: it is not opened")
    return folder


def _empty(name: str, module: nn.Module, site: Site) -> SparseLinear:
    """The packed linear on the meta device for ``module``."""
    from transformers.pytorch_utils import Conv1D

    from sparseforge_fx.deploy.lowering.modules import SparseLinear, weight_of

    if type(module) not in (nn.Linear, Conv1D):
        raise SparseForgeError(f"packed module '{name}' is a {type(module).__name__} in this model, no linear layer")
    weight = weight_of(module)
    packed = _on_meta(name, weight, site)
    transposed = isinstance(module, Conv1D)
    sparse = SparseLinear(packed, module.bias, transposed=transposed, dtype=weight.dtype)  # type: ignore[arg-type]
    sparse.loading = True
    return sparse


def _empty_table(name: str, module: nn.Module, site: Site) -> PackedEmbedding:
    """The packed embedding on the meta device for ``module``."""
    from sparseforge_fx.deploy.lowering.packed_embedding import PackedEmbedding

    if not isinstance(module, nn.Embedding):
        raise SparseForgeError(f"packed module '{name}' is a {type(module).__name__} in this model, no embedding")
    table = PackedEmbedding(_on_meta(name, module.weight, site), module)
    table.loading = True
    return table


def _on_meta(name: str, weight: torch.Tensor, site: Site) -> Packed:
    if tuple(weight.shape) != (site.out_features, site.in_features):
        raise SparseForgeError(
            f"packed module '{name}' is {[site.out_features, site.in_features]} in the header and "
            f"{list(weight.shape)} in the model: config.json is damaged"
        )
    with torch.device("meta"):
        tensors = site.empty(weight.dtype)
    return Packed(tensors[VALUES], tensors[BITMASK], site.in_features, tensors.get(SCALES))


def _insert_branches(model: Any, here: _Names, stored: Mapping[str, Any]) -> None:
    """Low-rank branches on the meta device, where the file holds them: their values come with all others."""
    owners = {name: here.module(owner) for name, owner in low_rank.branch_names(stored).items()}
    with torch.device("meta"):
        shapes = {
            f"{owner}{name[-len('.slorb.x') :]}": torch.empty(stored[name].shape, dtype=model.dtype)
            for name, owner in owners.items()
            if owner is not None
        }
        low_rank.rebuild(model, shapes)


class _Names:
    """Names in the checkpoint -> names in a model, which may be its inner model or have one more head around it."""

    def __init__(self, model: Any):
        self.modules = dict(model.named_modules())
        self.prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""

    def module(self, name: str) -> str | None:
        candidates = (name, name.removeprefix(self.prefix), self.prefix + name)
        return next((c for c in candidates if c in self.modules), None)

    def tensor(self, name: str, held: Any) -> str:
        candidates = (name, name.removeprefix(self.prefix), self.prefix + name)
        return next((c for c in candidates if c in held), name)


def _check_names(model: Any, held: Any, found: Any) -> None:
    """Every tensor of the model comes from the file or is tied to one that does, and the file has no other."""
    for name in sorted(found - held):
        raise SparseForgeError(
            f"tensor '{name[:120]}' is in the checkpoint and not in the model: one of them is damaged"
        )
    ties = model.all_tied_weights_keys
    groups = [{a, b} for a, b in ties.items()]
    for name in sorted(held - found - set(model._keys_to_ignore_on_save or ())):
        if not any(name in group and group & found for group in groups):
            raise SparseForgeError(f"tensor '{name}' of the model is missing from the checkpoint: copy it anew")
