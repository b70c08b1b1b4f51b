"""After packing in place: ``model.save_pretrained`` writes a packed checkpoint, which loads again."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from sparseforge_fx.deploy.checkpoints.packed_header import Header, Site, Stack
from sparseforge_fx.deploy.lowering.packed_embedding import packed_embeddings
from sparseforge_fx.deploy.lowering.sparse_modules import packed_weights
from sparseforge_fx.kernels.packed import METHOD


def leave_savable(model: Any) -> None:
    """Give a transformers model with packed weights our quantizer, as one that was loaded has it. A plain checkpoint
    would lack their weights, which transformers then makes up."""
    packed = packed_weights(model)
    known = isinstance(model, PreTrainedModel)
    if not packed or not known or getattr(model, "hf_quantizer", None) is not None:
        return
    sites, stacks = {}, {}
    for name, m in packed.items():
        site = Site(m.out_features, m.in_features, str(m.dtype).removeprefix("torch."), m.format)
        if m.experts is None:
            sites[name] = site
        else:
            stacks[name] = Stack(m.experts, site, m.transposed)
    header = Header(sites, stacks=stacks, embeddings=packed_embeddings(model))
    config = AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD](**header.to_json())
    model.hf_quantizer = AUTO_QUANTIZER_MAPPING[METHOD](config)
    model.config.quantization_config = config
    model._weight_conversions = []
