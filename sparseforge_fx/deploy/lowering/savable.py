"""After packing in place: ``model.save_pretrained`` writes a packed checkpoint, which loads again."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from sparseforge_fx.deploy.checkpoints.packed_header import Header, Site
from sparseforge_fx.deploy.lowering.sparse_modules import SparseLinear, packed_weights
from sparseforge_fx.kernels.packed import METHOD


def leave_savable(model: Any) -> None:
    """Give a transformers model with packed linears our quantizer, as one that was loaded has it. A plain checkpoint
    would lack their weights, which transformers then makes up."""
    packed = {name: m for name, m in packed_weights(model).items() if isinstance(m, SparseLinear)}
    known = isinstance(model, PreTrainedModel)
    if not packed or not known or getattr(model, "hf_quantizer", None) is not None:
        return
    sites = {
        name: Site(m.out_features, m.in_features, str(m.dtype).removeprefix("torch."), m.format)
        for name, m in packed.items()
    }
    config = AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD](**Header(sites).to_json())
    model.hf_quantizer = AUTO_QUANTIZER_MAPPING[METHOD](config)
    model.config.quantization_config = config
    model._weight_conversions = []
