"""Packed linears in vLLM: which layers are packed, their parameters for vLLM's weight loaders, and the product.

vLLM merges q, k and v, and gate and up, along the outputs: rows of packed weights of one format stand one below the
other as those of dense ones do. Tensor parallelism splits outputs anywhere, and inputs at whole bytes of the bitmask
and whole groups of int4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
)
from vllm.model_executor.utils import set_weight_attrs

from sparseforge_fx.deploy.checkpoints.packed_header import Header, Site
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import FINE, Format
from sparseforge_fx.kernels.layouts import ROWS, native_layout
from sparseforge_fx.kernels.packed import BITMASK, METHOD, SCALES, VALUES, Packed, check_packed
from sparseforge_fx.kernels.rows import rows_taken
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.models.dense import UNPACK

NEVER = 0x88  # two int4 codes of -8: a row of nothing else is none that was rounded


class PackedVllmConfig(QuantizationConfig):
    """``quantization_config`` of a packed checkpoint as vLLM carries it."""

    def __init__(self, header: Header):
        super().__init__()
        self.header = header
        self.modules = dict(header.modules)  # by vLLM's names
        self.embeddings = dict(header.embeddings)
        self.tables: dict[str | None, nn.Module] = {}  # as vLLM builds them, by the head that is tied to it

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # the header is in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedVllmConfig:
        header = Header.from_json(config)
        if header.stacks:
            raise SparseForgeError(
                f"'{min(header.stacks)}' is a packed stack of experts, for which there is no operator in vLLM: "
                f"{UNPACK}, and serve that"
            )
        return cls(header)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)
        heads = {
            table: None if head is None else hf_to_vllm_mapper.apply_list([head])[0]
            for table, head in self.embeddings.items()
        }
        self.embeddings = hf_to_vllm_mapper.apply_dict(heads)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            table = prefix or next(iter(self.embeddings), "")  # some models of vLLM do not say the name
            if table in self.embeddings:
                self.tables[self.embeddings[table]] = layer
                return PackedLinearMethod(table, self.modules[table].format)
        if (tied := next((t for t, head in self.embeddings.items() if head == prefix), None)) is not None:
            if prefix not in self.tables:
                raise SparseForgeError(
                    f"'{prefix}' is tied to '{tied}', which is not built here before it: choose "
                    f"pipeline_parallel_size=1, or {UNPACK}, and serve that"
                )
            return TiedHeadMethod(self.tables[prefix])
        parts = self.parts(prefix)
        packed = [name for name in parts if name in self.modules]
        formats = {name: self.modules[name].format for name in packed}
        is_head = isinstance(layer, ParallelLMHead) and not any(form.is_sparse for form in formats.values())
        if not isinstance(layer, LinearBase) and not (is_head and packed):
            if packed:
                raise SparseForgeError(
                    f"'{prefix}' is packed, and in vLLM a {type(layer).__name__}, which has to be dense: "
                    f"{UNPACK}, and serve that"
                )
            return None
        if not packed:
            return UnquantizedLinearMethod()
        if len(packed) < len(parts):
            dense = next(name for name in parts if name not in self.modules)
            raise SparseForgeError(
                f"vLLM merges '{packed[0]}', which is packed, with '{dense}', which is dense: prune both, or "
                f"{UNPACK}, and serve that"
            )
        first, *others = packed
        if (odd := next((name for name in others if formats[name] != formats[first]), None)) is not None:
            raise SparseForgeError(
                f"vLLM merges '{first}' ({formats[first]}) with '{odd}' ({formats[odd]}): give them one format in the "
                "plan, and pack again"
            )
        return PackedLinearMethod(prefix, formats[first])

    def parts(self, prefix: str) -> list[str]:
        """Names in the checkpoint of what vLLM merged into the layer of that name."""
        parent, dot, leaf = prefix.rpartition(".")
        if prefix in self.modules:
            return [prefix]
        return [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(leaf, [leaf])]


@register_weight_loader_v2_supported_method
class PackedLinearMethod(LinearMethodBase):
    """y = x W^T + b, W [out, in] of one rank packed, in one format.

    Until weights are processed ``weight_values``, ``weight_bitmask`` and, of codes, ``weight_scales`` are as on disk;
    then the layout of their device.
    """

    def __init__(self, prefix: str, format: Format):
        self.prefix, self.format = prefix, format

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        width, rows, unit = input_size_per_partition, sum(output_partition_sizes), self.format.group or 8
        if width != input_size and width % unit:
            raise SparseForgeError(
                f"'{self.prefix}' is {self.format}: a share of {width} of {input_size} inputs is no multiple of the "
                f"{unit} that are stored together: choose another tensor_parallel_size"
            )
        if width != input_size and self.format.group == FINE:
            raise SparseForgeError(
                f"'{self.prefix}' is {self.format}, whose rows have a scale each and cannot be split by inputs: choose "
                "tensor_parallel_size=1, or quantise to int4/32"
            )
        weight_loader = extra_weight_attrs.pop("weight_loader")
        data = Site(rows, width, "float32", self.format).empty(params_dtype)
        # what no weight has, so that tensors which the checkpoint lacks are seen when they are checked
        scale = 0 if self.format.group == FINE else torch.nan
        blank = {BITMASK: 0, SCALES: scale, VALUES: {"float": 0, "int8": -128, "int4": NEVER}[self.format.values]}
        for name, tensor in data.items():
            tensor.fill_(blank[name])
            places = {"input_dim": 1, "output_dim": 0, "weight_loader": weight_loader}
            if name != SCALES:
                parameter = ModelWeightParameter(data=tensor, **places)
            elif self.format.group not in (None, FINE):
                parameter = GroupQuantScaleParameter(data=tensor, **places)
            else:  # every rank has all of it
                parameter = ChannelQuantScaleParameter(data=tensor, output_dim=0, weight_loader=weight_loader)
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, extra_weight_attrs)
        # one of the packed linears has an empty dense weight in the file, which stops loaders that do not know us
        empty = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
        set_weight_attrs(empty, {"weight_loader": lambda *_, **__: None})
        layer.register_parameter("weight", empty)
        layer.packed_width, layer.packed_layout = width, "rows"  # type: ignore[assignment]
        layer.packed_dtype = params_dtype  # type: ignore[assignment]

    @torch.no_grad()
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if layer.packed_layout != "rows":
            return
        values, bitmask = getattr(layer, VALUES).data, getattr(layer, BITMASK).data
        scales = getattr(layer, SCALES).data if self.format.is_quantized else None
        if scales is not None:  # vLLM pads a vocabulary with zeros, of which a scale cannot be
            scales[getattr(layer, "num_org_embeddings_per_partition", len(scales)) :] = 1
        try:
            if values.dtype == torch.uint8 and (values == NEVER).all(-1).any():
                raise SparseForgeError("a code of every place in a row is -8, as where no values were loaded")
            packed = check_packed(Packed(values, bitmask, layer.packed_width, scales))  # type: ignore[arg-type]
        except SparseForgeError as error:
            raise SparseForgeError(f"'{self.prefix}': {error}; copy the checkpoint anew") from error
        if "weight" in layer._parameters:
            del layer.weight
        (out, width), dtype = packed.shape, layer.packed_dtype
        layout = native_layout(values.device, self.format, out, width, dtype)  # type: ignore[arg-type]
        if layout is ROWS:
            return
        for name, tensor in zip((VALUES, BITMASK), layout.convert(packed), strict=True):
            layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        layer.packed_layout = layout.name  # type: ignore[assignment]

    def embedding(self, layer: nn.Module, ids: Tensor) -> Tensor:
        """Rows of a dense weight in codes, in the model's dtype."""
        known: Any = layer
        rows = rows_taken(ids, getattr(layer, VALUES), known.packed_width, getattr(layer, SCALES))
        return rows.to(known.packed_dtype)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        values, meta = getattr(layer, VALUES), getattr(layer, BITMASK)
        scales = getattr(layer, SCALES) if self.format.is_quantized else None
        return OP(x, values, meta, layer.packed_layout, layer.packed_width, bias, "none", scales)


class TiedHeadMethod(LinearMethodBase):
    """y = x W^T + b with the rows of W that ``table``, the packed embedding, has on this rank."""

    def __init__(self, table: Any):
        self.table = table

    def create_weights(self, layer: nn.Module, *_: Any, **__: Any) -> None:
        """None of its own."""

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.table.quant_method.apply(self.table, x, bias)
