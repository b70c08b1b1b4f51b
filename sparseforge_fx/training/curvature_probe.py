"""How the curvature of a step gets from the graph into its running average (methods/curvature.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from sparseforge_fx.data.reading import Reading
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.program import Program
from sparseforge_fx.methods.curvature import Curvature, fold_on_backward, hutchinson_diagonal
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.passes import Pass, run_passes
from sparseforge_fx.passes.insert_hessian_hooks import probe_name
from sparseforge_fx.passes.insert_soft_masks import mask_name


class CurvatureProbe:
    """The probed twin of a soft-masked graph, where the estimator has probes, and what the others need.

    Args:
        dense: the program without masks: its operators differentiate twice.
        masked: the program with them.
        passes: from ``masked`` to its probed twin.
        weights: the masked weights.
        curvature: where the estimates go.
        tapped: what makes a module keep its intermediate values.
    """

    def __init__(
        self,
        dense: Program,
        masked: Program,
        passes: Sequence[Pass],
        weights: Sequence[MaskedWeight],
        curvature: Curvature,
        tapped: Callable[[GraphModule], GraphModule],
    ):
        self.dense, self.masked, self.weights, self.curvature = dense, masked, weights, curvature
        self.module: GraphModule | None = None
        self._probes: dict[str, Tensor] = {}  # by the weight's name
        self._hooks: list[Any] = []
        self._batches: list[Reading] = []  # this step's micro-batches, where Hutchinson needs them
        if curvature.estimator in ("gauss_newton", "activation"):
            module = tapped(run_passes(masked, passes)[0].module())
            found = dict(module.named_parameters())
            self._probes = {w.fqn: found[probe_name(w.fqn)] for w in weights}
            self._hooks = fold_on_backward(self._probes, curvature)
            self.module = module
        elif curvature.estimator == "hutchinson":
            once = {op for op in dense.op_counts() if "grouped_mm" in op}
            if once:
                raise SparseForgeError(
                    f"hutchinson needs second derivatives, which {min(once)} has not: take curvature='gauss_newton'"
                )
        self.run: Callable[..., Any] | None = self.module

    def keep(self, batch: Reading) -> None:
        """Hear of a micro-batch of a step that estimates."""
        if self.curvature.estimator == "hutchinson":
            self._batches.append(batch)

    def move(self, change: Callable[[Tensor], Tensor]) -> None:
        """Follow the model to another device or dtype, the masks too; probes take the memory of one element again."""
        if self.module is None:
            return
        self.module._apply(change)
        for w in self.weights:
            owner, _, leaf = mask_name(w.fqn).rpartition(".")
            self.module.get_submodule(owner)._buffers[leaf] = w.mask
            probe = self.module.get_parameter(probe_name(w.fqn))
            probe.data = probe.data.new_zeros(()).expand(probe.shape)

    def complete(self, step: int, loss: Callable[[Any, Reading], Tensor]) -> None:
        """Bring in what ``step`` says of the curvature beside what its backward passes have folded.

        Args:
            loss: of an output of the dense graph and its batch, twice differentiable.
        """
        weights = {w.fqn: w.mask for w in self.weights}  # of the weight's shape, in the dtype that h is kept in
        if self.curvature.estimator == "squared_gradient":
            gradients = {w.fqn: w.weight.grad for w in self.weights if w.weight.grad is not None}
            self.curvature.add_signed(gradients, weights)
        elif self.curvature.estimator == "hutchinson":
            vectors = self.curvature.vectors
            for index in range(vectors):
                self.curvature.add_signed(self._hutchinson(step, index, loss), weights, 1 / vectors)
        self.curvature.close(self._probes or weights)

    def forget(self) -> None:
        """The step is over."""
        self._batches.clear()

    def release(self) -> None:
        """Take the hooks off, and let go of the twin."""
        for hook in self._hooks:
            hook.remove()
        self.module = self.run = None
        self._probes.clear()
        self._batches.clear()

    def _hutchinson(self, step: int, index: int, loss: Callable[[Any, Reading], Tensor]) -> Mapping[str, Tensor]:
        """v * (H v) of this step's loss, its mean over the micro-batches, at the effective weights W * e, through the
        dense graph. v depends on the step and on ``index``, not on process or batch."""
        weights = {w.fqn: (self.masked.tensor(w.fqn).detach() * w.mask).requires_grad_() for w in self.weights}
        module = self.dense.module()
        total: dict[str, Tensor] = {}
        for batch in self._batches:

            def of_batch(batch: Reading = batch) -> Tensor:
                output = torch.func.functional_call(module, weights, batch.args, batch.kwargs, tie_weights=True)
                return loss(output, batch)

            generator = torch.Generator(device=next(iter(weights.values())).device)
            generator.manual_seed(step + (index << 32))
            for fqn, part in hutchinson_diagonal(of_batch, weights, generator=generator).items():
                part /= len(self._batches)
                total[fqn] = total[fqn].add_(part) if fqn in total else part
        return total
