"""What a weight's format is predicted to cost: the error that it makes, weighted by what follows it in the model.

A weight W that becomes W + E changes the outputs of its linear by E x. To second order the mean loss grows by half of
the Fisher information along that change. Its off-diagonal part over outputs and over positions is left out:

    1/2 sum_o g_o (E M E^T)_oo,   M = X^T X / rows,   g_o = sum over rows of (dL / dy_o)^2 / answers

Of an embedding whose rows y have the squared error r |y|^2, even over their width D, 1/2 r times what is at stake:

    sum over rows of |y|^2 / D |dL / dy|^2 / answers

L is the loss of a label drawn from the model's own distribution (the true Fisher, whose mean gradient is zero), so that
this predicts the divergence from the dense model, in nats per answer. As the K-FAC of arXiv 1503.05671, section 3, with
the diagonal alone of the factor that belongs to the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from sparseforge_fx.data.reading import Reading
from sparseforge_fx.methods.calibrate import Read
from sparseforge_fx.progress import counted
from sparseforge_fx.training.objective import Answer, drawn_loss

#: node that multiplies by a weight -> how
Nodes = Mapping[Node, Read]


@torch.inference_mode(False)
@torch.enable_grad()
def output_curvature(
    module: GraphModule,
    nodes: Nodes,
    batches: Sequence[Reading],
    answer: Callable[[Any], Answer],
    *,
    draws: int = 1,
    seed: int = 0,
    taken: Collection[Node] = (),
) -> dict[str, Tensor]:
    """g [out], float32, of every weight: the squared gradient at its outputs, summed over rows, per answer. Of a stack
    [experts, out], each expert's over its own rows.

    Args:
        module: a flat GraphModule; neither its parameters' gradients nor their flags change.
        answer: output of the model -> what of it is compared.
        draws: labels drawn for every answer.
        taken: nodes of embeddings; by the name of the node what is at stake there is given, too, a number.

    Of scores the loss is the log-likelihood of a drawn class; of other answers the squared error of a row relative to
    its own square. Memory: one batch's activations.
    """
    generator = torch.Generator().manual_seed(seed)
    total: dict[str, Tensor] = {}
    answers = 0
    with counted("curvature", len(batches)) as advance:
        for batch in batches:
            run = _Watched(module, nodes, total, taken)
            found = answer(run.run(*pytree.tree_leaves((batch.args, batch.kwargs))))
            keep = None if found.span else batch.real_rows(found.value)
            value = found.value if keep is None else found.value[keep]
            answers += value.shape[:-1].numel()
            for draw in range(draws):
                loss = drawn_loss(value, found.scores, generator)
                loss.backward(retain_graph=draw + 1 < draws)
            advance()
    return {name: value / (draws * max(1, answers)) for name, value in total.items()}


class _Watched(Interpreter):
    """Runs a graph whose parameters need no gradients, and adds up the squared gradients at the watched nodes."""

    def __init__(self, module: GraphModule, nodes: Nodes, total: dict[str, Tensor], taken: Collection[Node]):
        super().__init__(module)
        self.nodes, self.total, self.taken = nodes, total, taken

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return value.detach() if isinstance(value, Tensor) else value

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes:
            if not value.requires_grad:
                value = value.detach().requires_grad_() + 0  # no leaf: what follows may write into it
            read = self.nodes[n]
            ends = None if read.offsets is None else self.env[read.offsets]
            value.register_hook(lambda grad: self._add(read, ends, grad))
        if n in self.taken:
            value = value.detach().requires_grad_() + 0
            value.register_hook(partial(self._add_stake, n.name, value.detach()))
        return value

    def _add_stake(self, name: str, rows: Tensor, grad: Tensor) -> None:
        found = (rows.float().square().mean(-1) * grad.float().square().sum(-1)).sum()
        self.total[name] = self.total[name] + found if name in self.total else found

    def _add(self, read: Read, ends: Tensor | None, grad: Tensor) -> None:
        square = grad.float().square()
        if read.experts is None:
            square = square.reshape(-1, square.shape[-1]).sum(0)
        else:
            square = square.sum(1) if ends is None else _by_expert(square, ends)
        if read.expert is not None:
            whole = square.new_zeros(len(self.fetch_attr(read.name)), len(square))
            whole[read.expert] = square
            square = whole
        self.total[read.name] = self.total[read.name] + square if read.name in self.total else square


def _by_expert(rows: Tensor, ends: Tensor) -> Tensor:
    """Sums [experts, out] of the rows of each, which end there; those behind the last are nobody's."""
    whose = torch.searchsorted(ends, torch.arange(len(rows), device=ends.device, dtype=ends.dtype), right=True)
    return rows.new_zeros(len(ends) + 1, rows.shape[-1]).index_add_(0, whose, rows)[:-1]


def predicted_loss(error: Tensor, moments: Tensor, curvature: Tensor) -> float:
    """1/2 sum_o g_o (E M E^T)_oo.

    Args:
        error: E [out, in], what the format adds to the weight.
        moments: M [in, in], X^T X / rows of the weight's inputs.
        curvature: g [out].
    """
    return float(loss_by_output(error, moments, curvature).sum())


def loss_by_output(error: Tensor, moments: Tensor, curvature: Tensor) -> Tensor:
    """The terms of :func:`predicted_loss`, float64 [out]."""
    return 0.5 * _energies(error, moments) * curvature.double()


def drawn_outputs(weight: Tensor, moments: Tensor, curvature: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` outputs that stand for all, where there are more: their places, each once and in order, and the
    curvature to give :func:`predicted_loss` with their errors alone.

    Drawn at even distances along the sum of g_o (W M W^T)_oo (systematic sampling with unequal probabilities, Madow
    1949): what an output adds to the loss is about a constant share of that, in every format.

    Args:
        weight: W [out, in].
        moments: M [in, in].
        curvature: g [out].
    """
    if len(weight) <= count:
        return torch.arange(len(weight), device=weight.device), curvature
    places, shares = drawn(curvature.double() * _energies(weight, moments), count)
    return places, curvature[places].double() * shares


def drawn(sizes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` of these, float64, by their sizes: their places, and how many each stands for; all where there are no
    more."""
    if len(sizes) <= count:
        return torch.arange(len(sizes), device=sizes.device), torch.ones_like(sizes)
    sizes = sizes + (sizes.mean() * 1e-3 if sizes.sum() > 0 else 1.0)  # none is left out for ever
    steps = (torch.arange(count, dtype=torch.float64, device=sizes.device) + 0.5) / count * sizes.sum()
    places, times = torch.searchsorted(sizes.cumsum(0), steps).clamp(max=len(sizes) - 1).unique(return_counts=True)
    return places, times * sizes.sum() / (count * sizes[places])


def _energies(error: Tensor, moments: Tensor) -> Tensor:
    """(E M E^T)_oo, float64 [out]."""
    return ((error.float() @ moments.float()) * error).sum(1).clamp(min=0).double()
