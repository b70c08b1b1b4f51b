"""What this machine does in a moment: products, attention, a loss, a solver's problem, memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseforge_fx.kernels import cpu
from sparseforge_fx.kernels.attention import attention
from sparseforge_fx.methods.reorder import ROUNDS as ROUNDS_OF_ORDER
from sparseforge_fx.methods.reorder import find_order
from sparseforge_fx.passes import LinearSite
from sparseforge_fx.pattern import Pattern
from sparseforge_fx.training.distillation import logits_loss

ROWS = 512  # of inputs in a product that is timed
SCORED = 128  # rows of scores whose loss is timed
WIDTH = 1024  # of the widest problem that is solved to time a solver
COPIED = 1 << 24  # numbers in the copy that is timed
ROUNDS, ENOUGH = 3, 0.5  # of a timing: calls, and seconds after which there is no further one
FLOAT32 = 4  # bytes
#: how often memory is passed over: by a mask's product with its weight, forward and backward; by that of a final mask
#: where the weight is written; by an optimizer step with float32 masters
MASK, FINAL_MASK, OPTIMIZER = 6, 3, 13


class Product(NamedTuple):
    """Seconds, forward, and of both products of the backward pass."""

    forward: float
    backward: float


class Problem(Protocol):
    def solve(self, weight: Tensor, mask: Tensor, moments: Tensor) -> object: ...


class Machine:
    """What was timed, each shape once."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.products: dict[tuple[int, int, torch.dtype], Product] = {}
        self.attentions: dict[tuple[int, ...], Product] = {}
        self.solved: dict[tuple[int, int], float] = {}
        self.ordered: dict[tuple[int, int], float] = {}
        source, target = (torch.zeros(COPIED, device=device) for _ in range(2))
        self.byte = self._time(lambda: target.copy_(source)) / (2 * FLOAT32 * COPIED)

    def product(self, out: int, width: int, dtype: torch.dtype | None = None) -> Product:
        """For a row of inputs."""
        key = out, width, dtype or self.dtype
        if key not in self.products:
            x, w, y = (
                torch.randn(*shape, device=self.device).to(key[2])
                for shape in ((ROWS, width), (out, width), (ROWS, out))
            )
            forward = self._time(lambda: F.linear(x, w))
            self.products[key] = Product(forward / ROWS, self._time(lambda: (y @ w, y.t() @ x)) / ROWS)
        return self.products[key]

    def attention(self, queries: tuple[int, ...], keys: tuple[int, ...], masked: bool) -> Product:
        """Of all rows; a mask costs what is not looked at, too. Keys of fewer heads are read by several."""
        key = (*queries, *keys, masked)
        if key not in self.attentions:
            q, k, v = (torch.randn(n, device=self.device, dtype=self.dtype) for n in (queries, keys, keys))
            mask = torch.zeros(1, 1, queries[2], keys[2], device=self.device, dtype=self.dtype) if masked else None
            # a forecast does not wait for a compiler
            call = attention if self.device.type == "cpu" and cpu.built() else F.scaled_dot_product_attention
            attend = partial(call, attn_mask=mask, is_causal=not masked, enable_gqa=queries[1] != keys[1])
            forward = self._time(lambda: attend(q, k, v))
            with torch.enable_grad():
                leaves = [t.requires_grad_() for t in (q, k, v)]
                y = attend(*leaves)
                backward = self._time(lambda: torch.autograd.grad(y, leaves, y.detach(), retain_graph=True))
            self.attentions[key] = Product(forward, backward)
        return self.attentions[key]

    def loss(self, classes: int, taught: bool) -> float:
        """Seconds of a row of scores, and of its gradient."""
        student, teacher = (torch.randn(SCORED, classes, device=self.device).to(self.dtype) for _ in range(2))
        labels = torch.zeros(SCORED, dtype=torch.int64, device=self.device)

        def both() -> None:
            with torch.enable_grad():
                told = logits_loss(student.requires_grad_(), teacher if taught else None, labels, w_kl=float(taught))
                torch.autograd.grad(told.total, student)

        return self._time(both) / SCORED

    def solve(self, solver: Problem, out: int, width: int) -> float:
        """Seconds of one weight; of a wide one by two problems of its form that are small enough to be solved now. The
        power of the width that lies between them grows with the width, to 3: half-way is taken."""
        if (out, width) not in self.solved:
            factor = max(1.0, width / WIDTH)
            self.solved[out, width] = seconds = self._solve(solver, out / factor, width / factor)
            if factor > 1:
                power = math.log2(seconds / self._solve(solver, out / factor / 2, width / factor / 2))
                self.solved[out, width] *= factor ** ((3 + min(3.0, max(1.0, power))) / 2)
        return self.solved[out, width]

    def _solve(self, solver: Problem, out: float, width: float) -> float:
        rows, columns = (max(16, round(n / 16) * 16) for n in (out, width))  # whole groups
        inputs = torch.randn(2 * columns, columns, device=self.device)
        moments, weight = inputs.t() @ inputs, torch.randn(rows, columns, device=self.device)
        return self._time(lambda: solver.solve(weight, torch.ones_like(weight), moments))

    def order(self, rows: int, columns: int, pattern: Pattern) -> float:
        """Seconds that a better order of so many columns takes to be found."""
        if (rows, columns) not in self.ordered:
            worth = torch.rand(rows, columns, device=self.device)
            self.ordered[rows, columns] = ROUNDS_OF_ORDER / 2 * self._time(lambda: find_order(worth, pattern, rounds=2))
        return self.ordered[rows, columns]

    def masks(self, sites: Sequence[LinearSite], final: bool = False) -> float:
        """Seconds of the masks' products with their weights: forward and backward, or once a step."""
        return self.byte * (FINAL_MASK if final else MASK) * self.dtype.itemsize * sum(s.numel for s in sites)

    def optimizer(self, numbers: int) -> float:
        """Seconds of AdamW and the float32 masters of so many numbers in one step."""
        return self.byte * OPTIMIZER * FLOAT32 * numbers

    def _time(self, run: Callable[[], object]) -> float:
        """The median of some calls: as steps go, not as the best of them does."""
        found: list[float] = []
        while len(found) < ROUNDS and sum(found) < ENOUGH:
            self._wait()
            clock = time.perf_counter()
            run()
            self._wait()
            found.append(time.perf_counter() - clock)
        return median(found)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
