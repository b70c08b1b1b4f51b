"""An embedding over a packed weight, and the output layer that is tied to it.

Of the two the weight is the embedding's, as it is in transformers: a model without an output layer has it, too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

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
        like: the embedding that it stands for. It is kept, without its weight, and does what it does with the rows
            (Gemma's scale them).
    """

    def __init__(self, packed: Packed, like: nn.Embedding):
        super().__init__(packed, dtype=like.weight.dtype)
        self.like = like
        _give(like, _Rows(self, self.rows))
        self.train(like.training)

    def __getattr__(self, name: str) -> Any:
        """What models ask of their embedding beside its rows (``padding_idx``) is that of ``like``."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "like":
                raise
            return getattr(self.like, name)

    def change_layout(self, layout: Layout) -> None:
        assert self.layout == ROWS.name

    def rows(self, ids: Tensor) -> Tensor:
        assert self.weight_scales is not None
        return rows_taken(ids, self.weight_values, self.in_features, self.weight_scales).to(self.dtype)

    @torch.no_grad()
    def to_dense(self) -> nn.Embedding:
        """The embedding that this stands for."""
        del self.like.__dict__["weight"]
        self.like.weight = nn.Parameter(self.weight)
        return self.like

    def forward(self, ids: Tensor) -> Tensor:
        return self.like(ids)


class _Rows:
    """What stands where an embedding has its weight: ``F.embedding`` takes rows of it, and nothing else reads it.

    Args:
        of: what has the shape, dtype and device of the weight.
        take: ids -> rows.
    """

    _is_hf_initialized = True  # transformers would draw values for it

    def __init__(self, of: PackedEmbedding | Tensor, take: Callable[[Tensor], Tensor]):
        self.of, self.take = of, take

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.of.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    @property
    def device(self) -> torch.device:
        return self.of.device if isinstance(self.of, Tensor) else self.of.weight_values.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(zip(("input", "weight", "padding_idx", "max_norm"), args, strict=False)) | (kwargs or {})
        if func is not F.embedding or not isinstance(given["weight"], cls) or given.get("max_norm") is not None:
            return NotImplemented
        return given["weight"].take(given["input"])


def _give(embedding: nn.Embedding, rows: _Rows) -> None:
    embedding._parameters = {n: p for n, p in embedding._parameters.items() if n != "weight"}
    embedding.__dict__["weight"] = rows


def _takes_rows(embedding: nn.Embedding) -> bool:
    """Does it read its weight by ``F.embedding`` alone?"""
    weight, probe = embedding.weight, copy.copy(embedding)
    probe.__dict__ = dict(embedding.__dict__)
    _give(probe, _Rows(weight, lambda ids: F.embedding(ids, weight)))
    ids = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
    try:
        with torch.no_grad():
            return torch.equal(probe(ids), embedding(ids))
    except Exception:  # an open set: whatever its forward does with what is no tensor
        return False


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
    if type(head) is not nn.Linear:
        return f"{type(head).__name__} keeps its weight the other way round"
    return why_not_rows(embedding, form)


def why_not_rows(embedding: nn.Module, form: Format) -> str | None:
    """Why an embedding cannot be packed in that format; None if it can."""
    if form.is_sparse or not form.is_quantized:
        return f"in {form} it is no embedding's"
    if not isinstance(embedding, nn.Embedding) or low_rank.has_other_hooks(embedding) or not _takes_rows(embedding):
        return f"{type(embedding).__name__} does more with it than to take rows, or is seen by hooks"
    return None


def packed_embeddings(model: nn.Module) -> dict[str, str | None]:
    """Name of each :class:`PackedEmbedding` -> that of its :class:`TiedHead`, if it has one."""
    names = {id(module): name for name, module in model.named_modules()}
    heads = {names[id(head.table)]: name for name, head in tied_packed_heads(model)}
    return {n: heads.get(n) for n, module in model.named_modules() if isinstance(module, PackedEmbedding)}


def tied_packed_heads(model: nn.Module) -> Iterator[tuple[str, TiedHead]]:
    """Those of a model by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, TiedHead))


def input_embedding(model: nn.Module) -> str | None:
    """Name of a transformers model's table of tokens, where its weight is no other module's."""
    try:
        found = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    except (NotImplementedError, AttributeError):  # models that read no tokens
        return None
    names = [n for n, m in model.named_modules(remove_duplicate=False) if m is found]
    if not isinstance(found, nn.Embedding) or len(names) != 1:
        return None
    owners = sum(p is found.weight for m in model.modules() for p in m._parameters.values())
    return names[0] if owners == 1 else None
