"""An embedding and the output layer that is tied to it, over one packed weight.

The weight is the embedding's, as it is in transformers: a model without an output layer has it, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_fx.deploy.lowering.sparse_modules import PackedWeight
from sparseforge_fx.formats import Format
from sparseforge_fx.kernels.layouts import ROWS, Layout
from sparseforge_fx.kernels.packed import Packed
from sparseforge_fx.kernels.rows import rows_taken
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.models import low_rank


class PackedEmbedding(PackedWeight):
    """y = W[ids], W [vocabulary, width] dense in few bits and frozen; gradients reach nothing.

    It stays in the layout of the disk, whose rows can be read one by one.

    Args:
        padding_idx: that of the nn.Embedding that it stands for, which only training asks for.
    """

    def __init__(self, packed: Packed, padding_idx: int | None = None, *, dtype: torch.dtype = torch.float32):
        super().__init__(packed, dtype=dtype)
        self.padding_idx = padding_idx

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    def change_layout(self, layout: Layout) -> None:
        assert self.layout == ROWS.name

    @torch.no_grad()
    def to_dense(self) -> nn.Embedding:
        """The nn.Embedding that this stands for."""
        dense = nn.Embedding.from_pretrained(self.weight, freeze=False, padding_idx=self.padding_idx)
        return dense.train(self.training)

    def forward(self, ids: Tensor) -> Tensor:
        assert self.weight_scales is not None
        return rows_taken(ids, self.weight_values, self.in_features, self.weight_scales).to(self.dtype)


class TiedHead(nn.Module):
    """y = x W^T + b with the W of a :class:`PackedEmbedding`, which has it; this holds no tensor but its bias."""

    table: PackedEmbedding

    def __init__(self, table: PackedEmbedding, bias: nn.Parameter | None):
        super().__init__()
        object.__setattr__(self, "table", table)  # no submodule: its tensors have one name
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """Unpacked, as :class:`PackedWeight` has it."""
        return self.table.weight

    @property
    def format(self) -> Format:
        return self.table.format

    @property
    def in_features(self) -> int:
        return self.table.in_features

    @property
    def out_features(self) -> int:
        return self.table.out_features

    def to_dense(self, weight: nn.Parameter) -> nn.Linear:
        """The nn.Linear that this stands for, over the embedding's dense weight."""
        with torch.device("meta"):
            dense = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        dense.weight, dense.bias = weight, self.bias  # type: ignore[assignment]
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.table.extra_repr()}, tied"

    def forward(self, x: Tensor) -> Tensor:
        table = self.table
        return OP(
            x, table.weight_values, table.weight_bitmask, table.layout, table.in_features, self.bias, "none",
            table.weight_scales,
        )  # fmt: skip


def why_not_one(head: Any, embedding: nn.Module, form: Format) -> str | None:
    """Why a linear in that format and the embedding that it is tied to cannot go on as one weight; None if they can."""
    if form.is_sparse or not form.is_quantized:
        return f"in {form} it is no embedding's"
    if type(head) is not nn.Linear:
        return f"{type(head).__name__} keeps its weight the other way round"
    if type(embedding) is not nn.Embedding:
        return f"{type(embedding).__name__} does more than to take rows"
    if embedding.max_norm is not None or low_rank.has_other_hooks(embedding):
        return "the embedding changes its weight, or is seen by hooks"
    return None


def tied_tables(model: nn.Module) -> dict[str, str]:
    """Name of each :class:`TiedHead` -> that of its embedding."""
    names = {id(module): name for name, module in model.named_modules()}
    return {name: names[id(head.table)] for name, head in tied_packed_heads(model)}


def tied_packed_heads(model: nn.Module) -> Iterator[tuple[str, TiedHead]]:
    """Those of a model by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, TiedHead))
