"""Products timed on this machine: the dense weight and the packed ones in turn, each cold when its turn comes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import _grouped_linear

from sparseforge_fx.deploy.lowering.cost_table import Shape, Table, Timing
from sparseforge_fx.formats import Format
from sparseforge_fx.kernels.gpu.timing import Replays
from sparseforge_fx.kernels.huge_pages import on_huge_pages
from sparseforge_fx.kernels.layouts import Layout
from sparseforge_fx.kernels.packed import Packed, pack, pack_codes
from sparseforge_fx.kernels.sparse_experts import PACKED_EXPERTS_OP
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.methods.rounding import round_weight
from sparseforge_fx.passes.find_routing import Routing
from sparseforge_fx.pattern import TWO_FOUR, hard_mask

ROTATED_BYTES = 256 << 20  # weights are rotated over so much memory: in a model each is cold when its turn comes
ROUTINGS = 64  # ways of tokens to experts that calls take in turn
MOST_COPIES = 4096  # of one weight; what is below 64 KiB would else have up to a million, more than a sample has calls


@torch.no_grad()
def measure(
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    device: torch.device,
    layouts: Sequence[Layout],
    *,
    rounds: int = 15,
    seconds: float = 0.02,
) -> Table:
    """Time the dense product and the packed operator in every format and layout, interleaved, each sample at least
    ``seconds`` long.

    Args:
        shapes: one size, dtype and routing, in as many formats as there are shapes.

    Weights are random ones, rotated beyond the caches. Of a stack the experts of every token are drawn anew for every
    call, all with the same chance; the dense product is that of transformers' ``grouped_mm``.
    """
    out, width, name, _, routing = shapes[0]
    dtype = getattr(torch, name)
    generator = torch.Generator(device=device).manual_seed(0)
    weight = torch.randn(out, width, generator=generator, device=device).to(dtype)
    dense = _Rotation(_copies((weight,), routing), _dense if routing is None else _dense_experts, device)
    found: Table = {shape: {} for shape in shapes}
    runs: list[tuple[Shape, Layout, _Rotation]] = []
    for shape in shapes:
        packed = _random(weight, shape.format)
        for layout in layouts:
            if layout.refuses(out, width, dtype, device, shape.format) is None:
                found[shape][layout.name] = {}
                call = partial(_packed if routing is None else _packed_experts, layout.name)
                copies = _copies((*layout.convert(packed), packed.scales), routing)
                runs.append((shape, layout, _Rotation(copies, call, device)))
    for count in tokens:
        rows = count * (1 if routing is None else routing.chosen)
        x = torch.randn(rows, width, generator=generator, device=device).to(dtype)
        if routing is None:
            for _, layout, run in runs:
                values, meta, scales = run.copies[0]
                layout.tune(x, values, meta, width, scales)
        inputs = [(x,)] if routing is None else [(x, ends) for ends in _drawn(count, routing)]
        turns = [dense, *(run for _, _, run in runs)]
        repeats = [run.calibrate(inputs, seconds) for run in turns]
        samples: list[list[float]] = [[] for _ in turns]
        for _ in range(rounds):
            for run, repeat, sample in zip(turns, repeats, samples, strict=True):
                sample.append(run.time(inputs, repeat))
        base, *others = (_summary(s) for s in samples)
        for (shape, layout, _), summary in zip(runs, others, strict=True):
            found[shape][layout.name][count] = Timing(shape, layout.name, count, *base, *summary)
    return found


def _random(weight: Tensor, form: Format) -> Packed:
    """A weight of the format, whatever its values."""
    if form.is_sparse:
        weight = weight * hard_mask(weight.float().abs(), TWO_FOUR)
    if not form.is_quantized:
        return pack(weight)
    rounded = round_weight(weight, form)
    return pack_codes(rounded.codes, rounded.scales, form)


def _copies(tensors: tuple[Tensor | None, ...], routing: Routing | None = None) -> list[tuple[Tensor | None, ...]]:
    """So many, of a stack with every expert, that together they are beyond the caches."""
    experts = 1 if routing is None else routing.experts
    size = experts * sum(t.nbytes for t in tensors if t is not None)
    count = min(max(2 if routing is None else 1, -(-ROTATED_BYTES // size)), MOST_COPIES)
    make = Tensor.clone if routing is None else lambda t: t.repeat(experts, *[1] * t.dim())
    given = [None if t is None else make(t) for _ in range(count) for t in tensors]
    moved = on_huge_pages(t for t in given if t is not None)  # as they are deployed
    placed = [None if t is None else next(moved) for t in given]
    return [tuple(placed[i : i + len(tensors)]) for i in range(0, len(placed), len(tensors))]


def _drawn(tokens: int, routing: Routing) -> list[Tensor]:
    """Where the rows of each expert end [experts], of several batches of tokens, each of which goes to ``chosen``
    different experts."""
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(ROUTINGS, tokens, routing.experts, generator=generator)
    chosen = scores.topk(routing.chosen, -1).indices.flatten(1)
    return [torch.bincount(of_one, minlength=routing.experts).cumsum(0) for of_one in chosen]


def _dense(x: Tensor, copy: tuple[Tensor]) -> Tensor:
    return F.linear(x, copy[0])


def _packed(layout: str, x: Tensor, copy: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    values, meta, scales = copy
    return OP(x, values, meta, layout, x.shape[-1], None, "none", scales)


def _dense_experts(x: Tensor, ends: Tensor, copy: tuple[Tensor]) -> Tensor:
    return _grouped_linear(x, copy[0], ends.int())


def _packed_experts(layout: str, x: Tensor, ends: Tensor, copy: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    values, meta, scales = copy
    return PACKED_EXPERTS_OP(x, values, meta, layout, x.shape[-1], ends, None, scales)


class _Rotation:
    """One call after the other, each with the next inputs and the next copy of the weight; on a GPU in a graph, as they
    are deployed."""

    def __init__(self, copies: Sequence[Any], call: Callable[..., Any], device: torch.device):
        self.copies, self.call, self.device, self.next = copies, call, device, 0
        self.inputs: Sequence[tuple] | None = None

    def time(self, inputs: Sequence[tuple], repeats: int) -> float:
        """Microseconds of one call."""
        if self.device.type == "cuda":
            if self.inputs is not inputs:
                self.inputs = inputs
                self.replays = Replays([partial(self.call, *inputs[0], copy) for copy in self.copies])
            return 1e6 * self.replays.seconds(-(-repeats // len(self.copies)))
        clock = time.perf_counter()
        for _ in range(repeats):
            self.call(*inputs[self.next % len(inputs)], self.copies[self.next % len(self.copies)])
            self.next += 1
        return (time.perf_counter() - clock) / repeats * 1e6

    def calibrate(self, inputs: Sequence[tuple], seconds: float) -> int:
        """Warm up; calls that make a sample long enough."""
        self.time(inputs, 2)
        return max(1, round(seconds * 1e6 / self.time(inputs, 3)))


def _summary(sample: list[float]) -> tuple[float, tuple[float, float]]:
    low, middle, high = statistics.quantiles(sample, n=4) if len(sample) > 1 else sample * 3
    return middle, (low, high)
