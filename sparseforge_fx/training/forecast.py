"""How long a run would take: what this machine does in a moment with products of the model's shapes, with memory, and
with small problems of a layer-wise start, times how often the run does each.

Not counted: loading, capturing, compiling, saving; attention's own products, which are small while texts are short.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from sparseforge_fx.formats import Format
from sparseforge_fx.graph.program import Program
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.config import MethodConfig
from sparseforge_fx.methods.one_shot import LAYERWISE, LayerwiseConfig
from sparseforge_fx.methods.reorder import ROUNDS as ROUNDS_OF_ORDER
from sparseforge_fx.methods.reorder import find_order
from sparseforge_fx.methods.rounding import Rounded, follow, round_weight
from sparseforge_fx.passes import LinearSite, run_passes, train_passes
from sparseforge_fx.passes.find_channels import find_channels
from sparseforge_fx.pattern import Pattern
from sparseforge_fx.training.recipe import Recipe

ROWS = 512  # of inputs in a product that is timed
WIDTH = 1024  # of the widest problem that is solved to time a solver
COPIED = 1 << 24  # numbers in the copy that is timed
ROUNDS, ENOUGH = 3, 0.5  # of a timing: calls, and seconds after which there is no further one
FLOAT32 = 4  # bytes
#: how often memory is passed over: by a mask's product with its weight, forward and backward; by an optimizer step with
#: float32 masters; by what one operator hands to the next, forward and backward; by the loss over the logits
MASK, OPTIMIZER, FORWARD, BACKWARD, LOSS = 6, 13, 3, 6, 10
HUTCHINSON = 2.8  # steps that a probe takes as long as: examples/benchmarks/results/estimator_cost; others take a sixth


class Forecast(NamedTuple):
    """Seconds.

    Attributes:
        start: of a layer-wise start, or of a whole method that does not train.
        step: of one optimizer step.
        steps: how many there are.
    """

    start: float
    step: float
    steps: int

    @property
    def seconds(self) -> float:
        return self.start + self.steps * self.step


class Product(NamedTuple):
    """Seconds, forward, and of both products of the backward pass."""

    forward: float
    backward: float


@torch.no_grad()
def forecast(
    program: Program,
    sites: Sequence[LinearSite],
    chosen: Sequence[LinearSite],
    recipe: Recipe,
    config: MethodConfig,
    dtype: torch.dtype,
    device: torch.device,
    processes: int = 1,
) -> Forecast:
    """Predict a run of ``config`` under ``recipe`` on so many processes, each with a ``device`` like this; takes some
    seconds. What they say to each other is not counted.

    Args:
        program: the graph, of any example inputs; its tensors may be on the meta device.
        sites: all linears of it; ``chosen``: those that become sparse.
        dtype: that the run computes in.
    """
    with torch.random.fork_rng(devices=[]):
        machine = _Machine(dtype, device)
        work = _Work(machine, program, sites, chosen, recipe)
        start = _start(machine, work, chosen, recipe, config)
    if not isinstance(config, TrainedConfig):
        return Forecast(start, 0.0, 0)
    loss = recipe.settings(True).objective
    teacher = work.forward if loss.kl or loss.features is not None else 0.0
    micro = work.forward + teacher + work.backward + work.loss + machine.masks(chosen)
    if getattr(config, "curvature", "") == "hutchinson" and not config.starts_fixed:
        micro *= 1 + HUTCHINSON / config.probe_every  # type: ignore[attr-defined]
    per_step = recipe.batch_size * recipe.length * recipe.accumulate * processes
    steps = config.steps if recipe.tokens is None else recipe.tokens // per_step
    return Forecast(start, recipe.accumulate * micro + machine.optimizer(sum(s.numel for s in chosen)), steps)


@torch.no_grad()
def forecast_rounding(
    program: Program,
    sites: Sequence[LinearSite],
    formats: Mapping[str, Format],
    recipe: Recipe,
    dtype: torch.dtype,
    device: torch.device,
) -> Forecast:
    """Predict the walk over data in which ``sf.quantize`` puts weights on their grids; as :func:`forecast`.

    Args:
        formats: of the weights that are rounded, by name.
        recipe: how much is read: its calibration, length and batch size.
    """
    chosen = [s for s in sites if s.fqn in formats]
    with torch.random.fork_rng(devices=[]):
        machine = _Machine(dtype, device)
        work = _Work(machine, program, sites, chosen, recipe)
        # the model beside its twin that is not rounded; moments of the inputs, and with those of the twin
        batches = 2 * math.ceil(recipe.calibration / recipe.batch_size)
        seconds = batches * (work.products(chosen).forward + sum(work.moments(s) for s in chosen))
        for form in set(formats.values()):
            machine.solved.clear()
            fitting = [s for s in chosen if formats[s.fqn] == form]
            seconds += sum(machine.solve(_Rounding(form), s.out_features, s.in_features) for s in fitting)
    return Forecast(seconds, 0.0, 0)


class _Rounding:
    """A weight that is put on a grid, as a problem that can be timed."""

    def __init__(self, form: Format):
        self.form = form

    def solve(self, weight: Tensor, mask: Tensor, moments: Tensor) -> Rounded:
        return round_weight(follow(weight * mask, moments, moments), self.form, moments)


class _Problem(Protocol):
    def solve(self, weight: Tensor, mask: Tensor, moments: Tensor) -> object: ...


def _start(machine: _Machine, work: _Work, chosen: Sequence[LinearSite], recipe: Recipe, config: MethodConfig) -> float:
    """Seconds of a layer-wise method: the walk, its moments and its problems, and the blocks that learn after it."""
    solver = config if isinstance(config, LayerwiseConfig) else None
    if solver is None and (kind := LAYERWISE.get(getattr(config, "start", "dense"))) is not None:
        solver = kind(config.pattern)
    batches = math.ceil(recipe.calibration / recipe.batch_size)
    blocks = work.products(chosen)
    seconds = 0.0
    if solver is not None:
        seconds += batches * (blocks.forward + sum(work.moments(s) for s in chosen))
        seconds += sum((s.experts or 1) * machine.solve(solver, s.out_features, s.in_features) for s in chosen)
    if getattr(config, "reorder", False) and isinstance(config.pattern, Pattern):
        outputs = {s.fqn: s.out_features for s in chosen}
        masked, _ = run_passes(work.program, train_passes(chosen))
        for found in find_channels(masked, config.pattern):
            if len(names := {part.fqn for part in found.columns}) == 1 and (name := names.pop()) in outputs:
                seconds += machine.order(
                    len(found.columns) * outputs[name], len(found.columns[0].indices), config.pattern
                )
    if epochs := getattr(config, "reconstruct", 0):
        learn = (
            blocks.forward + blocks.backward + machine.masks(chosen) + machine.optimizer(sum(s.numel for s in chosen))
        )
        times = 1 if getattr(config, "values", "float") == "float" else 2  # once more after the rounding
        # beside that: the dense blocks, the errors before and after, and what is handed on
        seconds += times * batches * (4 * blocks.forward + epochs * learn)
    return seconds


class _Machine:
    """What was timed, each shape once."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.products: dict[tuple[int, int, torch.dtype], Product] = {}
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

    def solve(self, solver: _Problem, out: int, width: int) -> float:
        """Seconds of one weight; of a wide one by two problems of its form that are small enough to be solved now. The
        power of the width that lies between them grows with the width, to 3: half-way is taken."""
        if (out, width) not in self.solved:
            factor = max(1.0, width / WIDTH)
            self.solved[out, width] = seconds = self._solve(solver, out / factor, width / factor)
            if factor > 1:
                power = math.log2(seconds / self._solve(solver, out / factor / 2, width / factor / 2))
                self.solved[out, width] *= factor ** ((3 + min(3.0, max(1.0, power))) / 2)
        return self.solved[out, width]

    def _solve(self, solver: _Problem, out: float, width: float) -> float:
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

    def masks(self, sites: Sequence[LinearSite]) -> float:
        """Seconds of the masks' products with their weights, forward and backward."""
        return self.byte * MASK * self.dtype.itemsize * sum(s.numel for s in sites)

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


class _Work:
    """Seconds of one batch: forward and backward of the dense model, and the loss."""

    def __init__(
        self,
        machine: _Machine,
        program: Program,
        sites: Sequence[LinearSite],
        chosen: Sequence[LinearSite],
        recipe: Recipe,
    ):
        self.machine, self.program = machine, program
        nodes = {node.name: node for node in program.graph.nodes}
        self.scale = scale_of(program, recipe)
        self.trained = {s.fqn for s in chosen}  # of the others no gradient is computed
        self.uses = [(site, nodes[use.node]) for site in sites for use in site.uses if use.node in nodes]
        linears = {node for _, node in self.uses}
        between = sum(numel(v) for n in nodes.values() if n not in linears for v in written(n))
        self.move = machine.byte * machine.dtype.itemsize * between * self.scale
        self.forward, self.backward = self.products(sites)
        self.loss = machine.byte * LOSS * FLOAT32 * answer_of(program) * self.scale

    def products(self, sites: Sequence[LinearSite]) -> Product:
        """Seconds of one batch in these weights' products, and in what lies between them."""
        names = {s.fqn for s in sites}
        found = [
            (self.rows(site, node), self.machine.product(site.out_features, site.in_features), site.fqn in self.trained)
            for site, node in self.uses
            if site.fqn in names
        ]
        return Product(
            sum(n * p.forward for n, p, _ in found) + FORWARD * self.move,
            sum(n * (p.backward if both else p.backward / 2) for n, p, both in found) + BACKWARD * self.move,
        )

    def rows(self, site: LinearSite, node: Node) -> float:
        """Rows that a product has in one batch of the run."""
        return self.scale * sum(map(numel, _values(node))) / site.out_features

    def moments(self, site: LinearSite) -> float:
        """Seconds of X^T X over one batch, in float32."""
        product = self.machine.product(site.in_features, site.in_features, torch.float32)
        return sum(self.rows(site, node) * product.forward for s, node in self.uses if s is site)


def scale_of(program: Program, recipe: Recipe) -> float:
    """How often a batch of the run holds what the graph's example does."""
    example = program.user_inputs()[0].meta["val"]
    text = not example.is_floating_point() and example.dim() == 2
    return recipe.batch_size * (recipe.length / numel(example) if text else 1 / _size(example.shape[0]))


def answer_of(program: Program) -> int:
    """Numbers in the largest output of the graph's example."""
    outputs = [v for n in program.graph.output_node().all_input_nodes for v in _values(n)]
    return max(map(numel, outputs), default=0)


def _size(size: int | torch.SymInt) -> int:
    """Of the example, where the graph takes any: to ask a symbol for its number would pin it."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def numel(value: Tensor) -> int:
    return math.prod(map(_size, value.shape))


def _values(node: Node) -> list[Tensor]:
    value = node.meta.get("val")
    found = value if isinstance(value, tuple | list) else (value,)
    return [v for v in found if isinstance(v, Tensor)]


def written(node: Node) -> list[Tensor]:
    """What an operator writes; a view writes nothing."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or any(r.alias_info is not None for r in schema.returns):
        return []
    return _values(node)
