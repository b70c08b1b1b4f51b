"""Blocks that learn, one after the other, to hand on what the dense ones hand on: after a layer-wise solution, within
its masks and on its grids, from the same few sequences.

min over the survivors of a block f and its vectors of ||f(X) - f_dense(X_dense)||^2 / ||f_dense(X_dense)||^2, X being
what the reconstructed blocks before it give (EBFT, arXiv 2402.12419, section 3.2; there over Wanda's or SparseGPT's
masks; of rounded weights the codes and their scales learn, as in the first phase of EfficientQAT, arXiv 2407.11062,
section 3.2). What a layer-wise solver cannot do, layers of a block make good here for each other.
"""

from __future__ import annotations

import operator
import os.path
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from sparseforge_fx.data.reading import Reading
from sparseforge_fx.graph.compile import SharedBlock, block_outputs, compile_repeated_blocks
from sparseforge_fx.graph.padding import MASK, Rows, mask_names, real_rows
from sparseforge_fx.graph.program import Program
from sparseforge_fx.methods import schedule
from sparseforge_fx.methods.calibrate import flat_inputs, last_uses
from sparseforge_fx.methods.on_grid import Learner, OnGrid
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.passes import run_passes, step_passes
from sparseforge_fx.progress import counted

WARMUP = 0.05  # share of a block's steps


class Reconstructed(NamedTuple):
    """Relative squared error of what a block hands on, over the calibration data."""

    block: str
    before: float
    after: float


def reconstructed(
    program: Program,
    dense: GraphModule,
    batches: Sequence[Reading],
    weights: Sequence[MaskedWeight],
    *,
    epochs: int,
    lr: float,
    grid: OnGrid | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """As :func:`reconstruct_blocks` over a soft-masked program: for the report, what became of each block, and a note
    where there are none or one learned nothing."""
    module = run_passes(program, step_passes())[0].module()
    found = reconstruct_blocks(module, dense, batches, weights, epochs=epochs, lr=lr, grid=grid)
    if not found:
        return [], ["reconstruct changes nothing: no block of this graph repeats"]
    kept = sum(block.after == block.before for block in found)
    told = f"{kept} of {len(found)} blocks came no nearer to the dense ones and keep the layer-wise solution"
    notes = [f"{told}: try a lower reconstruct_lr than {lr:g}"] if kept else []
    return [block._asdict() for block in found], notes


def reconstruct_blocks(
    student: GraphModule,
    teacher: GraphModule,
    batches: Sequence[Reading],
    weights: Sequence[MaskedWeight],
    *,
    epochs: int,
    lr: float,
    grid: OnGrid | None = None,
) -> list[Reconstructed]:
    """Train the blocks' masked weights and their vectors (biases, norms), in place; what is frozen stays.

    Args:
        student: flat soft-masked module over ``weights``, whose masks are final.
        teacher: flat module of the dense model, over tensors of its own where the student's change.
        batches: calibration data; one is one step.
        epochs: passes over ``batches`` for every block.
        lr: AdamW's peak rate; it falls to zero along a cosine.
        grid: of the weights that are rounded and stay so.

    A block that comes no nearer keeps its solution. Returns what became of every block; empty where no block repeats.
    Memory: what is alive between two blocks for all batches, of both models, and the float32 masters and moments of one
    block.
    """
    names = mask_names(student.graph, student.graph.find_nodes(op="placeholder"))
    rows = [names.get(node) for node in block_outputs(student)]
    ours, theirs = _Stream(student, batches), _Stream(teacher, batches)
    if len(ours.blocks) != len(theirs.blocks):
        return []
    rows = rows if len(rows) == len(ours.blocks) else [Rows(MASK)] * len(ours.blocks)
    masks = {id(w.weight): w.mask for w in weights}
    found = []
    with counted("blocks learn", len(ours.blocks)) as advance:
        for block, aim, row in zip(ours.blocks, theirs.blocks, rows, strict=True):
            with torch.no_grad():
                ours.come_to(block)
                theirs.come_to(aim)
                targets = [theirs.leave(aim, k) for k in range(len(batches))]
            leaves = {k: _Leaf(p, masks.get(id(p)), grid) for k, p in _learnable(ours, block, masks).items()}
            real = [None if row is None else row.of(batch.real) for batch in batches]
            before = _error(ours, block, targets, real)
            _learn(ours, block, leaves, targets, real, epochs, lr)
            for leaf in leaves.values():
                leaf.write()
            after = _error(ours, block, targets, real)
            if not after < before:  # NaN, too
                for leaf in leaves.values():
                    leaf.undo()
                after = before
            found.append(Reconstructed(_name(block), before, after))
            with torch.no_grad():
                for k in range(len(batches)):
                    ours.leave(block, k)
            advance(f"error {before:.2g} -> {after:.2g}")
    return found


class _Leaf:
    """A parameter of a block that learns, and what learns in its place."""

    def __init__(self, parameter: nn.Parameter, mask: Tensor | None, grid: OnGrid | None):
        self.parameter, self.mask = parameter, mask
        self.grid = grid if grid is not None and grid.takes(parameter) else None
        self.first: Learner | Tensor
        self.learner: Learner | None = None
        if self.grid is not None:
            self.first, self.learner = self.grid.learner(parameter), self.grid.learner(parameter)
            self.learning = self.learner.leaves
        else:
            self.first = parameter.detach().clone()
            self.learning = [parameter.detach().to(torch.float32, copy=True).requires_grad_()]

    def value(self) -> Tensor:
        """What the block is to see, differentiable."""
        found = self.learning[0] if self.learner is None else self.learner.value()
        return found.to(self.parameter.dtype)

    @torch.no_grad()
    def write(self) -> None:
        if self.grid is not None and self.learner is not None:
            self.parameter.copy_(self.grid.learned(self.parameter, self.learner))
            return
        self.parameter.copy_(self.learning[0])
        if self.mask is not None:
            self.parameter.mul_(self.mask)  # pruned weights have gradients, too: straight through

    @torch.no_grad()
    def undo(self) -> None:
        """As it was before it learned."""
        if self.grid is not None and isinstance(self.first, Learner):
            self.parameter.copy_(self.grid.learned(self.parameter, self.first))
        elif isinstance(self.first, Tensor):
            self.parameter.copy_(self.first)


class _Stream:
    """All batches on their way through a module whose blocks are outlined, from one block to the next."""

    def __init__(self, module: GraphModule, batches: Sequence[Reading]):
        self.module = compile_repeated_blocks(module, compile=False)
        self.runs = [Interpreter(self.module, garbage_collect_values=False) for _ in batches]
        self.feeds = [iter(flat_inputs(module, batch)) for batch in batches]
        self.nodes = list(self.module.graph.nodes)
        self.blocks = [n for n in self.nodes if n.op == "call_module" and isinstance(self.call(n), SharedBlock)]
        self.dead = last_uses(self.module, {})
        self.at = 0
        for run in self.runs:
            run.env = {}

    def call(self, block: Node) -> Any:
        return self.module.get_submodule(str(block.target))

    def come_to(self, block: Node) -> None:
        """Compute everything before a block, batch by batch: a state that nodes enter is left before the next batch."""
        end = self.nodes.index(block)
        for run, feed in zip(self.runs, self.feeds, strict=True):
            for node in self.nodes[self.at : end]:
                run.env[node] = next(feed) if node.op == "placeholder" else run.run_node(node)
                self._forget(run, node)
        self.at = end + 1

    def arguments(self, block: Node, batch: int) -> list[Any]:
        return [self.runs[batch].env[a] if isinstance(a, Node) else a for a in block.args]

    def leave(self, block: Node, batch: int) -> Any:
        """What the block hands on; its inputs are forgotten."""
        run = self.runs[batch]
        run.env[block] = out = self.call(block)(*self.arguments(block, batch))
        self._forget(run, block)
        return out

    def _forget(self, run: Interpreter, node: Node) -> None:
        for dead in self.dead.get(node, ()):
            run.env.pop(dead, None)


def _learnable(stream: _Stream, block: Node, masked: Container[int]) -> dict[int, nn.Parameter]:
    """Position of an argument -> the parameter that can learn there: masked weights and vectors that are this block's
    alone and not frozen."""
    values = {n: operator.attrgetter(str(n.target))(stream.module) for n in stream.nodes if n.op == "get_attr"}
    readers = Counter(id(value) for node, value in values.items() for _ in node.users)
    return {
        k: values[a]
        for k, a in enumerate(block.args)
        if isinstance(a, Node)
        and isinstance(value := values.get(a), nn.Parameter)
        and value.requires_grad
        and readers[id(value)] == 1
        and (id(value) in masked or value.dim() < 2)
    }


@torch.enable_grad()
def _learn(
    stream: _Stream,
    block: Node,
    leaves: dict[int, _Leaf],
    targets: Sequence[Any],
    real: Sequence[Tensor | None],
    epochs: int,
    lr: float,
) -> None:
    if not leaves:
        return
    learning = [tensor for leaf in leaves.values() for tensor in leaf.learning]
    optimizer = torch.optim.AdamW(learning, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    steps = epochs * len(targets)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule.learning_rate((step + 1) / (steps + 1), WARMUP, 0.0)
        k = step % len(targets)
        arguments = stream.arguments(block, k)
        for position, leaf in leaves.items():
            arguments[position] = leaf.value()
        _distance(stream.call(block)(*arguments), targets[k], real[k]).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def _error(stream: _Stream, block: Node, targets: Sequence[Any], real: Sequence[Tensor | None]) -> float:
    errors = (
        _distance(stream.call(block)(*stream.arguments(block, k)), target, mask).item()
        for k, (target, mask) in enumerate(zip(targets, real, strict=True))
    )
    return sum(errors) / len(targets)


def _distance(found: Any, target: Any, mask: Tensor | None) -> Tensor:
    """Relative squared error of the values that a block hands on, padding left out where its rows are positions."""
    total = torch.zeros(())
    for one, other in zip(_values(found), _values(target), strict=True):
        rows = [v if (real := real_rows(v, mask)) is None else real for v in (one.float(), other.float())]
        total = total.to(one.device) + (rows[0] - rows[1]).square().sum() / rows[1].square().sum().clamp(min=1e-12)
    return total


def _values(output: Any) -> Iterator[Tensor]:
    for value in output if isinstance(output, tuple) else (output,):
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
            yield value


def _name(block: Node) -> str:
    """The path that its tensors have in common."""
    paths = [str(a.target).replace(".", "/") for a in block.args if isinstance(a, Node) and a.op == "get_attr"]
    return os.path.commonpath(paths).replace("/", ".")
