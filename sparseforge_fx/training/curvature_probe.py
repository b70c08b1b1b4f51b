"""How the curvature of a step gets from the graph into its running average (methods/curvature.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx import GraphModule

from sparseforge_fx.data.reading import Reading
from sparseforge_fx.data.sources import stable_hash
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.program import Program
from sparseforge_fx.methods.curvature import DRAWN, PROBES, Curvature, fold_on_backward, hutchinson_diagonal, processes
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.passes import Pass, run_passes
from sparseforge_fx.passes.insert_expert_counters import counters_of
from sparseforge_fx.passes.insert_hessian_hooks import probe_name
from sparseforge_fx.passes.insert_low_rank import branch_names
from sparseforge_fx.passes.insert_soft_masks import mask_name
from sparseforge_fx.training.expert_counters import ExpertCounters
from sparseforge_fx.training.objective import Answer, drawn_loss


class CurvatureProbe:
    """The probed twin of a soft-masked graph, where the estimator has probes, and what the others need.

    Args:
        dense: the program without masks: its operators differentiate twice.
        masked: the program with them.
        passes: from ``masked`` to its probed twin.
        weights: the masked weights.
        curvature: where the estimates go.
        answer: output of a module -> what of it is compared.
        tapped: what makes a module keep its intermediate values.
        seed: of labels and vectors that are drawn.

    Attributes:
        rides: the estimate, or the count of experts' tokens, comes out of the backward pass that trains: the step runs
            ``run`` instead of its own graph.
    """

    def __init__(
        self,
        dense: Program,
        masked: Program,
        passes: Sequence[Pass],
        weights: Sequence[MaskedWeight],
        curvature: Curvature,
        answer: Callable[[Any], Answer],
        tapped: Callable[[GraphModule], GraphModule],
        seed: int = 0,
    ):
        self.dense, self.masked, self.weights, self.curvature, self.seed = dense, masked, weights, curvature, seed
        stacks = any("soft_masked_experts" in op for op in masked.op_counts())
        self.answer, self.rides = answer, (curvature.estimator in PROBES or stacks) and curvature.estimator != "fisher"
        self.module: GraphModule | None = None
        self._probes: dict[str, Tensor] = {}  # by the weight's name
        self._hooks: list[Any] = []
        self._batches: list[Reading] = []  # this step's micro-batches, where they are run again
        module = run_passes(masked, passes)[0].module() if curvature.estimator in PROBES or stacks else None
        self._counters = ExpertCounters(
            {} if module is None else counters_of(module, [w.fqn for w in weights]), curvature
        )
        if module is not None:
            found = dict(module.named_parameters())
            self._probes = {w.fqn: found[name] for w in weights if (name := probe_name(w.fqn)) in found}
            if self.rides:
                module = tapped(module)
                self._hooks = fold_on_backward(self._probes, curvature)
            self.module = module
        if curvature.estimator == "hutchinson":
            once = {op for op in dense.op_counts() if "grouped_mm" in op}
            if once:
                raise SparseForgeError(
                    f"hutchinson needs second derivatives, which {min(once)} has not: take curvature='gauss_newton'"
                )
        self.run: Callable[..., Any] | None = self.module

    def keep(self, batch: Reading) -> None:
        """Hear of a micro-batch of a step that estimates."""
        if self.curvature.estimator in DRAWN:
            self._batches.append(batch)

    def move(self, change: Callable[[Tensor], Tensor]) -> None:
        """Follow the model to another device or dtype, the masks too; probes take the memory of one element again."""
        if self.module is None:
            return
        self.module._apply(change)
        for w in self.weights:
            owner, _, leaf = mask_name(w.fqn).rpartition(".")
            self.module.get_submodule(owner)._buffers[leaf] = w.mask
        for probe in self._probes.values():
            probe.data = probe.data.new_zeros(()).expand(probe.shape)
        self._counters.move()

    def complete(self, step: int, loss: Callable[[Any, Reading], Tensor]) -> None:
        """Bring in what ``step`` says of the curvature beside what its backward passes have folded.

        Args:
            loss: of an output of the dense graph and its batch, twice differentiable.
        """
        weights = {w.fqn: w.mask for w in self.weights}  # of the weight's shape, in the dtype that h is kept in
        if self.curvature.estimator == "squared_gradient":
            gradients = {w.fqn: w.weight.grad for w in self.weights if w.weight.grad is not None}
            self.curvature.add_signed(gradients, weights)
        elif self.curvature.estimator == "fisher":
            for name, estimate in self._fisher(step).items():
                self.curvature.add(name, estimate)
        elif self.curvature.estimator == "hutchinson":
            vectors = self.curvature.vectors
            for index in range(vectors):
                self.curvature.add_signed(self._hutchinson(step, index, loss), weights, 1 / vectors)
        self.curvature.close(self._probes or weights)
        self._counters.complete()

    def forget(self) -> None:
        """The step is over."""
        self._batches.clear()
        self._counters.forget()

    def release(self) -> None:
        """Take the hooks off, and let go of the twin."""
        for hook in self._hooks:
            hook.remove()
        self.module = self.run = None
        self._probes.clear()
        self._batches.clear()

    def _fisher(self, step: int) -> Mapping[str, Tensor]:
        """The per-token factors of labels drawn from the model, per answer of this step's micro-batches. The draws
        depend on seed, step, process and micro-batch."""
        assert self.run is not None
        rank = dist.get_rank() if processes() > 1 else 0
        total: dict[str, Tensor] = {}
        answers = 0
        for index, batch in enumerate(self._batches):
            with torch.enable_grad():
                found = self.answer(self.run(*batch.args, **batch.kwargs))
                keep = None if found.span else batch.real_rows(found.value)
                value = found.value if keep is None else found.value[keep]
                generator = generator_of(value.device, self.seed, step, index, rank)
                loss = drawn_loss(value, found.scores, generator)
            answers += value.shape[:-1].numel()
            counters = list(self._counters.parameters.values())
            parts = torch.autograd.grad(loss, [*self._probes.values(), *counters], allow_unused=True)
            for fqn, part in zip(self._probes, parts, strict=False):
                if part is not None:
                    total[fqn] = total[fqn].add_(part) if fqn in total else part
            for counter, part in zip(counters, parts[len(self._probes) :], strict=True):
                if part is not None:
                    counter.grad = part if counter.grad is None else counter.grad + part
        return {fqn: part.div_(max(1, answers)) for fqn, part in total.items()}

    def _hutchinson(self, step: int, index: int, loss: Callable[[Any, Reading], Tensor]) -> Mapping[str, Tensor]:
        """v * (H v) of this step's loss, its mean over the micro-batches, at the effective weights (W * e, and what a
        low-rank branch adds to it), through the dense graph. v depends on seed, step and ``index``, not on process
        or batch."""
        weights = {w.fqn: self._effective(w).requires_grad_() for w in self.weights}
        module = self.dense.module()
        total: dict[str, Tensor] = {}
        for batch in self._batches:

            def of_batch(batch: Reading = batch) -> Tensor:
                output = torch.func.functional_call(module, weights, batch.args, batch.kwargs, tie_weights=True)
                return loss(output, batch)

            generator = generator_of(next(iter(weights.values())).device, self.seed, step, index)
            for fqn, part in hutchinson_diagonal(of_batch, weights, generator=generator).items():
                part /= len(self._batches)
                total[fqn] = total[fqn].add_(part) if fqn in total else part
        return total

    def _effective(self, w: MaskedWeight) -> Tensor:
        """The weight that the dense graph would need to compute what the masked one does."""
        value = self.masked.tensor(w.fqn).detach() * w.mask
        x, s = branch_names(w.fqn)
        if x in self.masked.state:
            added = self.masked.tensor(s).detach() @ self.masked.tensor(x).detach()
            value += added.t() if w.dim == 0 else added
        return value


def generator_of(device: torch.device, *numbers: int) -> torch.Generator:
    """A generator of its own for these numbers. They are mixed: of a seed the CPU's looks at the lowest 32 bits."""
    return torch.Generator(device=device).manual_seed(int(stable_hash(*numbers)[:8], 16))
