"""``lower_modules``: the packed operator under nn.Module, in place: ``generate()`` and pipelines keep working."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparseforge_fx.deploy.lowering import cost
from sparseforge_fx.deploy.lowering.report import PackedSite, PackingReport
from sparseforge_fx.errors import SparseForgeError, add_sentence
from sparseforge_fx.kernels.layouts import LAYOUTS, ROWS, Layout, find_target
from sparseforge_fx.kernels.packed import BITMASK, SCALES, VALUES, Packed, pack, why_dense
from sparseforge_fx.kernels.sparse_linear import DENSE_OP, OP
from sparseforge_fx.models import low_rank
from sparseforge_fx.report import environment


class SparseLinear(nn.Module):
    """y = x W^T + b with W [out, in] packed in any format and frozen; ``bias`` trains, and gradients reach x.

    ``weight`` unpacks: it is there for code that looks at a linear's weight, not for arithmetic.

    Args:
        packed: the weight, in the format on disk; tensors may be on the meta device.
        layout: what it is kept in; that of the disk if nothing is said.
        transposed: it stands for a Conv1D, which keeps W as [in, out].
        dtype: of ``weight``, if its values are codes; what the model computes in.
    """

    weight_values: Tensor
    weight_bitmask: Tensor  # in other layouts than that of the disk, whatever they have in its place
    weight_scales: Tensor | None

    def __init__(
        self,
        packed: Packed,
        bias: nn.Parameter | None,
        layout: Layout = ROWS,
        *,
        transposed: bool = False,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.dtype = packed.values.dtype if packed.scales is None else dtype
        self.format = packed.format
        self.out_features, self.in_features = packed.shape
        self.transposed = transposed
        self.layout = ROWS.name
        self.loading = False  # while it is, models that initialise their linears' weights get a shape and no data
        self.register_buffer(VALUES, packed.values)
        self.register_buffer(BITMASK, packed.bitmask)
        self.register_buffer(SCALES, packed.scales)
        self.bias = bias
        self.change_layout(layout)

    @property
    def weight(self) -> Tensor:
        if self.loading:
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        return DENSE_OP(self.weight_values, self.weight_bitmask, self.layout, self.in_features, self.weight_scales).to(
            self.dtype
        )

    def packed(self) -> Packed:
        """The weight in the format on disk, bit for bit what it was made of."""
        restore = LAYOUTS[self.layout].restore
        return restore(self.weight_values, self.weight_bitmask, self.in_features, self.weight_scales)

    def change_layout(self, layout: Layout) -> None:
        """Repack, in place; codes stay in a layout that takes them."""
        if not layout.knows(self.format):
            layout = ROWS
        if layout.name != self.layout:
            self.weight_values, self.weight_bitmask = layout.convert(self.packed())
            self.layout = layout.name

    @torch.no_grad()
    def replace_weight(self, weight: Tensor) -> None:
        """Pack ``weight`` [out, in], exactly 2:4, in the place of the one that is here, in its layout and dtype."""
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise SparseForgeError(
                f"a weight of shape {list(weight.shape)} cannot replace one of {[self.out_features, self.in_features]}"
            )
        if self.weight_scales is not None:
            raise SparseForgeError(f"the weight is kept in {self.format}: quantise the dense model anew instead")
        packed = pack(weight.to(self.weight_values.dtype))
        self.weight_values, self.weight_bitmask = LAYOUTS[self.layout].convert(packed)

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """``model.half()`` and its like change what is computed in, and never the scales that codes were rounded by."""
        scales = self.weight_scales
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_values.device)).dtype
        if scales is not None and self.weight_scales is not None and self.weight_scales.dtype != scales.dtype:
            self.weight_scales = scales.to(self.weight_values.device)
        return self

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, format={self.format}, layout={self.layout}"


@torch.no_grad()
def lower_modules(
    model: nn.Module,
    *,
    target: str = "auto",
    tokens: Sequence[int] = cost.TOKENS,
    table: str | Path | cost.Table | None = None,
    gate: bool = True,
) -> PackingReport:
    """Replace every nn.Linear and Conv1D whose weight is exactly 2:4, and gains from it, by a :class:`SparseLinear`.

    In place; their dense weights are freed. Options as for :func:`sparseforge_fx.lower`. Returns the report: sites,
    skipped modules with reasons, the cost table, bytes before and after. Linears that are packed already stay so.
    Raises SparseForgeError if no weight is 2:4.
    """
    known = cost.check_request(tokens, table)
    sites, skipped = find_packable(model)
    if not sites and not any(isinstance(module, SparseLinear) for module in model.modules()):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:4])
        raise SparseForgeError(f"nothing to lower: {reasons or 'the model has no linear layer'}; run sparsify first")
    weights = {name: weight_of(module) for name, module in sites.items()}
    device = next(iter(weights.values()) if weights else model.buffers()).device
    layouts = find_target(target, device)
    shapes = {name: cost.Shape.of(weight.shape[0], weight.shape[1], weight.dtype) for name, weight in weights.items()}
    timings = cost.timings(shapes.values(), tokens, device, layouts, known) if gate else {}
    before = after = scratch = 0
    lowered: list[PackedSite] = []
    with _dense_again_on_error(model) as done:
        for name, module in sites.items():
            weight = weights.pop(name)
            before += weight.nbytes
            layout, against = cost.choose(timings, shapes[name], layouts, tokens) if gate else (layouts[0], None)
            if layout is None:
                skipped[name] = f"gate: {against}"
                after += weight.nbytes
                continue
            transposed = isinstance(module, Conv1D)
            sparse = SparseLinear(pack(weight), module.bias, layout, transposed=transposed).train(module.training)
            replace(model, name, sparse)
            done.append(name)
            size = sparse.weight_values.nbytes + sparse.weight_bitmask.nbytes
            scratch = max(scratch, weight.nbytes)
            out, width = sparse.out_features, sparse.in_features
            kept = {"format": str(sparse.format), "layout": layout.name, "bytes": size}
            lowered.append({"name": name, "out": out, "in": width, **kept})  # type: ignore[typeddict-item]
            after += size
    return {
        "sites": lowered,
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped.items()],
        "table": cost.describe(timings),
        "tokens": list(tokens),
        "dense_bytes": before,
        "lowered_bytes": after,
        "scratch_bytes": scratch,
        **environment(),
    }


@contextmanager
def _dense_again_on_error(model: nn.Module) -> Iterator[list[str]]:
    """Unpack what was packed, named in the list that is given, if not all of it could be."""
    done: list[str] = []
    try:
        yield done
    except BaseException as error:
        for name in done:
            replace(model, name, model.get_submodule(name).to_dense())  # type: ignore[operator]
        add_sentence(error, "the model is dense and sparse as it was")
        raise


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of that name; a low-rank branch goes with the name."""
    parent, _, leaf = name.rpartition(".")
    low_rank.hand_on(model.get_submodule(name), module)
    setattr(model.get_submodule(parent), leaf, module)


def weight_of(module: nn.Module) -> Tensor:
    """[out, in]"""
    weight = module.weight.detach()  # type: ignore[union-attr,operator]
    return weight.t() if isinstance(module, Conv1D) else weight


def find_packable(
    model: nn.Module, against: Callable[[Tensor], str | None] = why_dense, copied: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, str]]:
    """Modules that can be replaced, and whose weight [out, in] nothing is said ``against``, by name; the other linears
    with a reason. By default those that are exactly 2:4.

    Args:
        copied: names of linears whose weight may be another module's, too (``tied_heads`` of models/ties.py).
    """
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    sites, skipped = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        weight = module.weight
        if not name:
            skipped["(the model itself)"] = "it cannot be replaced in itself: wrap it in a module"
        elif type(module) not in (nn.Linear, Conv1D) or type(weight) is not nn.Parameter:
            skipped[name] = f"{type(module).__name__} with a weight of type {type(weight).__name__}"
        elif names[id(module)] > 1:
            skipped[name] = "it stands at several places of the model"
        elif owners[id(weight)] > 1 and name not in copied:
            skipped[name] = "its weight belongs to another module, too"
        elif low_rank.has_other_hooks(module):
            skipped[name] = "it has forward hooks"
        elif (reason := against(weight_of(module))) is not None:
            skipped[name] = reason
        else:
            sites[name] = module
    return sites, skipped
