"""Modules over packed weights: a linear, and a stack of experts, in the place of what they pack."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear
from transformers.pytorch_utils import Conv1D

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.grouped_experts import PACKED
from sparseforge_fx.kernels.huge_pages import on_huge_pages
from sparseforge_fx.kernels.layouts import LAYOUTS, ROWS, Layout
from sparseforge_fx.kernels.packed import BITMASK, SCALES, VALUES, Packed, pack
from sparseforge_fx.kernels.sparse_experts import PACKED_EXPERTS_OP
from sparseforge_fx.kernels.sparse_linear import DENSE_OP, OP

_ELSEWHERE = f"packed experts are computed by the implementation '{PACKED}': set_experts_implementation('{PACKED}')"


class PackedWeight(nn.Module):
    """A weight [out, in], or a stack of them, packed in any format and frozen.

    ``weight`` unpacks: it is there for code that looks at a layer's weight, not for arithmetic.

    Args:
        packed: the weight, in the format on disk; tensors may be on the meta device.
        layout: what it is kept in; that of the disk if nothing is said.
        transposed: the module that it stands for keeps [in, out].
        dtype: of ``weight``, if its values are codes; what the model computes in.
    """

    weight_values: Tensor
    weight_bitmask: Tensor  # in other layouts than that of the disk, whatever they have in its place
    weight_scales: Tensor | None

    def __init__(
        self,
        packed: Packed,
        layout: Layout = ROWS,
        *,
        transposed: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.dtype = packed.values.dtype if packed.scales is None else dtype
        self.format = packed.format
        *stack, self.out_features, self.in_features = packed.shape
        self.experts = stack[0] if stack else None
        self.transposed = transposed
        self.layout = ROWS.name
        self.loading = False  # while it is, models that initialise their linears' weights get a shape and no data
        self.register_buffer(VALUES, packed.values)
        self.register_buffer(BITMASK, packed.bitmask)
        self.register_buffer(SCALES, packed.scales)
        self.change_layout(layout)

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in] or [experts, out, in]"""
        one = (self.out_features, self.in_features)
        return one if self.experts is None else (self.experts, *one)

    @property
    def weight(self) -> Tensor:
        if self.loading:
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        if self.experts is None:
            return self._dense(self.weight_values, self.weight_bitmask, self.weight_scales)
        each = zip(self.weight_values, self.weight_bitmask, self._scales_of_each(), strict=True)
        return torch.stack([self._dense(*tensors) for tensors in each])

    def _dense(self, values: Tensor, meta: Tensor, scales: Tensor | None) -> Tensor:
        return DENSE_OP(values, meta, self.layout, self.in_features, scales).to(self.dtype)

    def _scales_of_each(self) -> Any:
        return self.weight_scales if self.weight_scales is not None else [None] * len(self.weight_values)

    def packed(self) -> Packed:
        """The weight in the format on disk, bit for bit what it was made of."""
        tensors = self.weight_values, self.weight_bitmask, self.in_features, self.weight_scales
        layout = LAYOUTS[self.layout]
        return layout.restore(*tensors) if self.experts is None else layout.restore_each(*tensors)

    def change_layout(self, layout: Layout) -> None:
        """Repack, in place; codes stay in a layout that takes them."""
        if not layout.knows(self.format):
            layout = ROWS
        if layout.name != self.layout:
            self.weight_values, self.weight_bitmask = layout.convert_each(self.packed())
            self.layout = layout.name

    @torch.no_grad()
    def replace_weight(self, weight: Tensor) -> None:
        """Pack ``weight`` [out, in], exactly 2:4, in the place of the one that is here, in its layout and dtype."""
        if tuple(weight.shape) != self.shape:
            raise SparseForgeError(f"a weight of shape {list(weight.shape)} cannot replace one of {list(self.shape)}")
        if self.weight_scales is not None:
            raise SparseForgeError(f"the weight is kept in {self.format}: quantise the dense model anew instead")
        packed = pack(weight.to(self.weight_values.dtype))
        self.weight_values, self.weight_bitmask = LAYOUTS[self.layout].convert_each(packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """``model.half()`` and its like change what is computed in, and never the scales that codes were rounded by."""
        scales = self.weight_scales
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_values.device)).dtype
        if scales is not None and self.weight_scales is not None and self.weight_scales.dtype != scales.dtype:
            self.weight_scales = scales.to(self.weight_values.device)
        return self

    def extra_repr(self) -> str:
        stack = "" if self.experts is None else f"experts={self.experts}, "
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{stack}{size}, format={self.format}, layout={self.layout}"


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """The packed linears and stacks of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}


def lay_together(weights: Iterable[PackedWeight]) -> None:
    """Put packed weights that are on a CPU on huge pages (kernels/huge_pages.py), one after the other. Only new ones:
    they move, and others may know where they were."""
    held = [(m, name) for m in weights for name, buffer in m._buffers.items() if buffer is not None]
    for (module, name), moved in zip(held, on_huge_pages(getattr(m, name) for m, name in held), strict=True):
        setattr(module, name, moved)


class SparseLinear(PackedWeight):
    """y = x W^T + b with W [out, in] packed; ``bias`` trains, and gradients reach x. ``transposed``: it stands for a
    Conv1D."""

    def __init__(self, packed: Packed, bias: nn.Parameter | None, layout: Layout = ROWS, **how: Any):
        super().__init__(packed, layout, **how)
        self.bias = bias

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """The nn.Linear or Conv1D that this stands for."""
        out, width = self.out_features, self.in_features
        with torch.device("meta"):
            dense = Conv1D(out, width) if self.transposed else nn.Linear(width, out, self.bias is not None)
        weight = self.weight.t().contiguous() if self.transposed else self.weight
        dense.weight = nn.Parameter(weight)
        dense.bias = self.bias  # type: ignore[assignment]
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        return OP(
            x, self.weight_values, self.weight_bitmask, self.layout, self.in_features, self.bias, "none",
            self.weight_scales,
        )  # fmt: skip


class SparseExperts(PackedWeight):
    """y_e = x_e W_e^T for a stack of packed weights, in the place of the parameter of a module of experts.

    ``experts_forward`` calls it: transformers' experts interface has it as the implementation "sparseforge".

    Attributes:
        instead_of: the implementation that computed the experts before.
    """

    instead_of: str | None = None

    def __getattr__(self, name: str) -> Any:
        """Other implementations of the interface ask for what a parameter has."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(f"{error}: {_ELSEWHERE}") from None

    def __getitem__(self, _: Any) -> Tensor:
        raise SparseForgeError(_ELSEWHERE)

    @torch.no_grad()
    def to_dense(self) -> nn.Parameter:
        """The parameter that this stands for."""
        return nn.Parameter(self.weight.mT.contiguous() if self.transposed else self.weight)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x: [rows, in], those of one expert after those of another; offsets: [experts], where they end."""
        return PACKED_EXPERTS_OP(
            x.to(self.dtype), self.weight_values, self.weight_bitmask, self.layout, self.in_features, offsets, None,
            self.weight_scales,
        )  # fmt: skip


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """A module of experts as transformers' ``grouped_mm`` computes it: tokens in the order of their experts, two
    products, tokens back in theirs. Its stacks may be packed or dense.

    Args:
        hidden_states: [tokens, hidden]; top_k_index, top_k_weights: [tokens, k], the experts of each and their shares.
    """
    tokens, k = top_k_index.shape
    chosen, order = top_k_index.reshape(-1).sort(stable=True)
    offsets = torch.searchsorted(chosen, torch.arange(self.num_experts, device=chosen.device), right=True)
    places = chosen.clamp(max=self.num_experts - 1)  # beyond: of another process, whose rows come out as zeros

    def product(x: Tensor, leaf: str) -> Tensor:
        weight = getattr(self, leaf)
        bias = getattr(self, f"{leaf}_bias")[places] if self.has_bias else None
        if not isinstance(weight, SparseExperts):
            return _grouped_linear(x, weight, offsets.int(), bias=bias, is_transposed=self.is_transposed)
        y = weight(x, offsets)
        return y if bias is None else y + bias

    x = product(hidden_states[order // k], "gate_up_proj" if self.has_gate else "up_proj")
    x = product(self._apply_gate(x) if self.has_gate else self.act_fn(x), "down_proj")
    if getattr(self, "has_post_expert_norm", False):
        x = self.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1)[order][:, None]
    return x[order.argsort()].view(tokens, k, x.shape[-1]).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(PACKED, experts_forward)
