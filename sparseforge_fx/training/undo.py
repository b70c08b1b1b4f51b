"""No way out leaves a model half-way: what a run changes in it is put back when the run fails or is interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from sparseforge_fx.errors import AS_IT_WAS, add_sentence
from sparseforge_fx.graph.program import Program
from sparseforge_fx.methods.weights import put_back
from sparseforge_fx.models.low_rank import detach


@contextmanager
def dense_again_on_error(program: Program) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Gives a list to fill with tensors of the model that will be written, each with a copy.

    Whatever ends the block early, they are put back bit for bit, with the model's flags, gradients, hooks and branches,
    and the error says so if a value had changed.
    """
    model = program.source
    assert model is not None
    parameters = [(p, p.requires_grad, p.grad, set(p._backward_hooks or ())) for p in model.parameters()]
    copies = [(buffer, buffer.clone()) for buffer in model.buffers()]  # a graph may write them, and they are small
    try:
        yield copies
    except BaseException as error:
        if put_back(copies):
            add_sentence(error, AS_IT_WAS)
        for module in model.modules():
            detach(module)
        for p, flag, gradient, hooks in parameters:
            p.requires_grad_(flag)
            p.grad = gradient
            registered: dict = p._backward_hooks or {}
            for key in set(registered) - hooks:
                del registered[key]
        raise
