"""What trainers ask of a model beside ``forward``: its signature, and a hold on the embeddings inside the graph."""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.compile import shallow_twin
from sparseforge_fx.graph.forward import signature_of


class ForwardOfSource:
    """Decorates ``forward``: an instance's has the signature of its source model, by which the Trainer chooses columns.

    It runs outside of any torch.compile around the model, which could compile its Python and not its graph;
    ``SparseModel.compile`` compiles the graph.
    """

    def __init__(self, function: Any):
        self.function, self.outside = function, torch.compiler.disable(function)

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self.function
        bound = functools.partial(self.outside, instance)
        source = instance.dense.source
        if source is not None:
            bound.__signature__ = _with_labels(signature_of(source))  # type: ignore[attr-defined]
        return bound


def _with_labels(signature: inspect.Signature) -> inspect.Signature:
    if "labels" in signature.parameters:
        return signature
    labels = inspect.Parameter("labels", inspect.Parameter.KEYWORD_ONLY, default=None)
    before = [p for p in signature.parameters.values() if p.kind != p.VAR_KEYWORD]
    after = [p for p in signature.parameters.values() if p.kind == p.VAR_KEYWORD]
    return signature.replace(parameters=[*before, labels, *after])


class Embedded(nn.Module):
    """Passes the embeddings on: where a forward hook that adds noise to them in training (NEFTune) finds them."""

    def __init__(self, owner: nn.Module):
        super().__init__()
        self._owner = weakref.ref(owner)  # no child of it: an exported graph cannot be told that it trains

    @property
    def training(self) -> bool:
        owner = self._owner()
        return owner is not None and owner.training

    @training.setter
    def training(self, mode: bool) -> None:
        del mode  # the owner's

    def forward(self, embeddings: Tensor) -> Tensor:
        return embeddings


def hook_embeddings(module: GraphModule, name: str, handle: Embedded) -> GraphModule:
    """A twin of an exported module in which what the source's module ``name`` gives passes through ``handle``.

    Raises SparseForgeError if the graph does not show that module.
    """
    graph = torch.fx.Graph(tracer_cls=module.graph._tracer_cls)
    graph._codegen = module.graph._codegen
    inside = [
        node
        for node in module.graph.nodes
        if node.op == "call_function"
        and any(path == name for path, _ in (node.meta.get("nn_module_stack") or {}).values())
    ]
    if not inside:
        raise SparseForgeError(f"the captured graph has no {name}: noise cannot be added to the embeddings")
    twin = shallow_twin(module)
    twin.add_module("embedded", handle)
    env: dict = {}
    for node in module.graph.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        if node is inside[-1]:
            env[node] = graph.call_module("embedded", (env[node],))
            env[node].meta = dict(node.meta)
    twin.graph = graph
    return twin
