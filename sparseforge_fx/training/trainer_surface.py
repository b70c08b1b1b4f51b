"""What trainers ask of a model beside ``forward``: its signature, gradient checkpointing, a hold on the embeddings
inside the graph, a state dict that safetensors takes."""

from __future__ import annotations

import functools
import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.compile import count_blocks, shallow_twin
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.graph.forward import signature_of
from sparseforge_fx.graph.module_tree import shared_blocks
from sparseforge_fx.training.distillation import Distillation


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


class Vectors(nn.LayerNorm):
    """What holds vectors alone in the graph. Nobody calls it; trainers do not decay what is in a LayerNorm."""

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {list(vector.shape)}" for name, vector in self.named_parameters())


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


class TrainerSurface(nn.Module, ABC):
    """The part of a :class:`SparseModel` that the Hugging Face Trainer asks for."""

    dense: Exported
    distillation: Distillation
    graph: GraphModule
    embedded: tuple[str, Embedded] | None
    checkpointing: bool

    @abstractmethod
    def make_runners(self) -> None:
        """What was asked for has changed: make anew what runs."""

    def activation_checkpointing_enable(
        self, *, every_n_layers: int = 1, offload: bool = False, **options: Any
    ) -> None:
        """Compute every repeated block again in the backward pass instead of keeping its activations.
        Raises SparseForgeError where it cannot."""
        del options  # of torch.utils.checkpoint, for modules
        if every_n_layers != 1 or offload:
            raise SparseForgeError(
                "activations are checkpointed at every block, without offloading: take every_n_layers=1"
            )
        if self.distillation.features is not None:
            raise SparseForgeError("features cannot be distilled under activation checkpointing: choose one of the two")
        if not (count_blocks(self.graph) or shared_blocks(self.graph)):
            raise SparseForgeError("the model has no repeated blocks whose activations could be checkpointed")
        self.checkpointing = True
        self.make_runners()

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The older name of :meth:`activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(**options)

    def get_input_embeddings(self) -> nn.Module:
        """A module that hands the embeddings on inside the graph: forward hooks on it change them (NEFTune)."""
        if self.embedded is None:
            source = self.dense.source
            table = source.get_input_embeddings() if hasattr(source, "get_input_embeddings") else None  # type: ignore[union-attr, operator]
            name = next((n for n, m in source.named_modules() if m is table), None) if source is not None else None
            if name is None:
                raise SparseForgeError("the model does not say which module its input embeddings are")
            self.embedded = (name, Embedded(self))
            self.make_runners()
        return self.embedded[1]

    @staticmethod
    def as_norms(module: GraphModule) -> GraphModule:
        """The exported module, in which what holds vectors alone shows trainers that it is not to be decayed: norms
        lost their classes in the export."""
        for holder in module.modules():
            own = list(holder.parameters())
            if type(holder) is nn.Module and own and all(p.dim() < 2 for p in own):
                holder.__class__ = Vectors
        return module

    def _get_name(self) -> str:
        """The source's: by it the Trainer's own losses know whether labels are shifted."""
        return type(self).__name__ if self.dense.source is None else self.dense.source._get_name()

    #: the mean over micro-batches is the Trainer's work, not the model's
    accepts_loss_kwargs = False

    @property
    def config(self) -> Any:
        """The source model's config, as the Trainer expects; None without one. The annealing's is ``method.config``."""
        return getattr(self.dense.source, "config", None)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module, but a tied tensor comes under its first name only: safetensors refuses shared memory."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for name in self._aliases():
            state.pop(prefix + name, None)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """What :meth:`state_dict` gave; sets weights and masks. The rest of the annealing is in ``method.state()``."""
        first = {name: state_dict[one] for name, one in self._aliases().items() if one in state_dict}
        return super().load_state_dict({**first, **state_dict}, *args, **kwargs)

    def _aliases(self) -> dict[str, str]:
        """Further names of tied parameters -> the first name."""
        first: dict[int, str] = {}
        names = {name: first.setdefault(id(p), name) for name, p in self.named_parameters(remove_duplicate=False)}
        return {name: one for name, one in names.items() if name != one}
