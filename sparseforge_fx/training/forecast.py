"""How long a run would take: what this machine does in a moment with products of the model's shapes, with memory, and
with small problems of a layer-wise start, times how often the run does each.

Not counted: loading, capturing, compiling, saving.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node

from sparseforge_fx.formats import Format
from sparseforge_fx.graph.program import Program
from sparseforge_fx.graph.sizes import hint, numel
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.config import MethodConfig
from sparseforge_fx.methods.one_shot import LAYERWISE, LayerwiseConfig
from sparseforge_fx.methods.rounding import Rounded, follow, round_weight
from sparseforge_fx.passes import LinearSite, run_passes, train_passes
from sparseforge_fx.passes.find_channels import find_channels
from sparseforge_fx.passes.operators import op_name
from sparseforge_fx.pattern import Pattern
from sparseforge_fx.training.machine import Machine, Product
from sparseforge_fx.training.recipe import Recipe

#: how often memory is passed over by what one operator hands to the next, forward and backward
FORWARD, BACKWARD = 3, 6
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
        machine = Machine(dtype, device)
        others = trained_beside(program, chosen, config)
        work = _Work(machine, program, sites, sites if others else chosen, recipe)
        start = _start(machine, work, chosen, recipe, config)
        if not isinstance(config, TrainedConfig):
            return Forecast(start, 0.0, 0)
        loss = recipe.settings(True).objective
        taught = loss.kl > 0 or loss.features is not None
        scored = work.loss(taught)
    micro = (1 + taught) * work.forward + work.backward + scored
    once = machine.optimizer(sum(s.numel for s in chosen) + others)
    if config.starts_fixed:
        once += machine.masks(chosen, final=True)
    else:
        micro += machine.masks(chosen)
    if getattr(config, "curvature", "") == "hutchinson" and not config.starts_fixed:
        micro *= 1 + HUTCHINSON / config.probe_every  # type: ignore[attr-defined]
    per_step = recipe.batch_size * recipe.length * recipe.accumulate * processes
    steps = config.steps if recipe.tokens is None else recipe.tokens // per_step
    return Forecast(start, recipe.accumulate * micro + once, steps)


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
        machine = Machine(dtype, device)
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


def _start(machine: Machine, work: _Work, chosen: Sequence[LinearSite], recipe: Recipe, config: MethodConfig) -> float:
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
        for found in find_channels(masked, config.pattern)[0]:
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


class _Work:
    """Seconds of one batch: forward and backward of the dense model, and the loss."""

    def __init__(
        self,
        machine: Machine,
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
        attended = [self._attention(n, recipe) for n in nodes.values() if op_name(n) == "scaled_dot_product_attention"]
        self.attended = Product(sum(a.forward for a in attended), sum(a.backward for a in attended))
        self.forward, self.backward = self.products(sites)

    def loss(self, taught: bool) -> float:
        """Seconds of the answer's loss and its gradient."""
        answer = answer_of(self.program)
        rows = self.scale * numel(answer) / answer.shape[-1]
        return rows * self.machine.loss(hint(answer.shape[-1]), taught)

    def _attention(self, node: Node, recipe: Recipe) -> Product:
        """Of one node, in a batch of the run; in a text as long as the run's."""
        texts, length = _text_of(self.program)
        shapes = [list(map(hint, arg.meta["val"].shape)) for arg in node.args[:2]]  # type: ignore[union-attr]
        rows = self.scale * shapes[0][0] if length is None else recipe.batch_size * shapes[0][0] / texts
        for shape in shapes:
            shape[0] = 1
            shape[2] = recipe.length if shape[2] == length else shape[2]
        masked = isinstance(node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask"), Node)
        found = self.machine.attention(tuple(shapes[0]), tuple(shapes[1]), masked)
        return Product(rows * found.forward, rows * found.backward)

    def products(self, sites: Sequence[LinearSite]) -> Product:
        """Seconds of one batch in these weights' products, and in what lies between them."""
        names = {s.fqn for s in sites}
        found = [
            (self.rows(site, node), self.machine.product(site.out_features, site.in_features), site.fqn in self.trained)
            for site, node in self.uses
            if site.fqn in names
        ]
        return Product(
            sum(n * p.forward for n, p, _ in found) + FORWARD * self.move + self.attended.forward,
            sum(n * (p.backward if both else p.backward / 2) for n, p, both in found)
            + BACKWARD * self.move
            + self.attended.backward,
        )

    def rows(self, site: LinearSite, node: Node) -> float:
        """Rows that a product has in one batch of the run."""
        return self.scale * sum(map(numel, _values(node))) / site.out_features

    def moments(self, site: LinearSite) -> float:
        """Seconds of X^T X over one batch, in float32."""
        product = self.machine.product(site.in_features, site.in_features, torch.float32)
        return sum(self.rows(site, node) * product.forward for s, node in self.uses if s is site)


def trained_beside(program: Program, chosen: Sequence[LinearSite], config: MethodConfig) -> int:
    """Elements of matrices that train without a mask."""
    if getattr(config, "trainable", None) != "all":
        return 0
    masked = {id(program.tensor(s.fqn)) for s in chosen}
    found = {id(p): p for p in program.state.values() if isinstance(p, nn.Parameter) and p.is_floating_point()}
    return sum(p.numel() for p in found.values() if p.dim() > 1 and id(p) not in masked)


def scale_of(program: Program, recipe: Recipe) -> float:
    """How often a batch of the run holds what the graph's example does."""
    texts, length = _text_of(program)
    return recipe.batch_size * (1 if length is None else recipe.length / length) / texts


def _text_of(program: Program) -> tuple[int, int | None]:
    """How many samples the graph's example has, and the length of each; None: it is no text."""
    example = program.user_inputs()[0].meta["val"]
    text = not example.is_floating_point() and example.dim() == 2
    return hint(example.shape[0]), hint(example.shape[1]) if text else None


def answer_of(program: Program) -> Tensor:
    """The largest output of the graph's example."""
    outputs = [v for n in program.graph.output_node().all_input_nodes for v in _values(n)]
    return max((v for v in outputs if v.dim()), key=numel, default=torch.empty(0, 1))


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
