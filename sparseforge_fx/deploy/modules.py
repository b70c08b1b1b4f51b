"""``lower_modules``: the packed operator under nn.Module, in place: ``generate()`` and pipelines keep working."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparseforge_fx.deploy import cost
from sparseforge_fx.deploy.targets import Target, find_target
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.packed import pack
from sparseforge_fx.kernels.sparse_linear import DENSE_OP, OP
from sparseforge_fx.pattern import TWO_FOUR, check_pattern
from sparseforge_fx.report import environment


class SparseLinear(nn.Module):
    """y = x W^T + b with W [out, in] packed 2:4 and frozen; ``bias`` trains, and gradients reach x.

    ``weight`` unpacks: it is there for code that looks at a linear's weight, not for arithmetic.
    """

    values: Tensor
    where: Tensor  # the packed weight's metadata; torch.export cannot take a buffer that is called ``meta``

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, target: Target):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.layout = target.layout
        values, meta = target.convert(pack(weight))
        self.register_buffer("values", values)
        self.register_buffer("where", meta)
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        return DENSE_OP(self.values, self.where, self.layout, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return OP(x, self.values, self.where, self.layout, self.in_features, self.bias, "none")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, layout={self.layout}"


@torch.no_grad()
def lower_modules(
    model: nn.Module,
    *,
    target: str = "auto",
    batch: Sequence[int] = (1, 8, 64, 2048),
    table: str | Path | cost.Table | None = None,
    gate: bool = True,
) -> dict[str, Any]:
    """Replace every nn.Linear and Conv1D whose weight is exactly 2:4, and gains from it, by a :class:`SparseLinear`.

    In place; their dense weights are freed. Options as for :func:`sparseforge_fx.lower`. Returns the report: sites,
    skipped modules with reasons, the cost table, bytes before and after. Raises SparseForgeError if no weight is 2:4.
    """
    known = cost.check_request(batch, table)
    sites, skipped = _find(model)
    if not sites:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:4])
        raise SparseForgeError(f"nothing to lower: {reasons or 'the model has no linear layer'}; run sparsify first")
    weights = {name: _weight(module) for name, module in sites.items()}
    device = next(iter(weights.values())).device
    chosen = find_target(target, device)
    shapes = {name: cost.Shape.of(weight.shape[0], weight.shape[1], weight.dtype) for name, weight in weights.items()}
    timings = cost.timings(shapes.values(), batch, device, chosen, known) if gate else {}
    before = after = scratch = 0
    lowered = []
    for name, module in sites.items():
        weight = weights.pop(name)
        before += weight.nbytes
        against = cost.verdict(timings[shapes[name]], batch) if gate else None
        if against:
            skipped[name] = f"gate: {against}"
            after += weight.nbytes
            continue
        sparse = SparseLinear(weight, module.bias, chosen).train(module.training)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, sparse)
        size = sparse.values.nbytes + sparse.where.nbytes
        scratch = max(scratch, weight.nbytes)
        lowered.append({"name": name, "out": sparse.out_features, "in": sparse.in_features, "bytes": size})
        after += size
    return {
        "sites": lowered,
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped.items()],
        "table": [t.describe() for by_tokens in timings.values() for t in by_tokens.values()],
        "batch": list(batch),
        "dense_bytes": before,
        "lowered_bytes": after,
        "scratch_bytes": scratch,
        **environment(),
    }


def _weight(module: nn.Module) -> Tensor:
    """[out, in]"""
    weight = module.weight.detach()  # type: ignore[union-attr,operator]
    return weight.t() if isinstance(module, Conv1D) else weight


def _find(model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
    """Modules that can be lowered by name; the other linears with a reason."""
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
        elif owners[id(weight)] > 1:
            skipped[name] = "its weight belongs to another module, too"
        elif module._forward_hooks or module._forward_pre_hooks:
            skipped[name] = "it has forward hooks"
        elif weight.is_meta or weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            skipped[name] = f"no kernel for {weight.dtype} on {weight.device.type}"
        elif not TWO_FOUR.fits(_weight(module).shape[1]) or not check_pattern(_weight(module), TWO_FOUR):
            skipped[name] = "not 2:4: a group of four has more than two non-zeros"
        else:
            sites[name] = module
    return sites, skipped
