"""A graph that Dynamo captured, as a program that the deployment passes can edit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from sparseforge_fx.graph.program import Program


class Frame(Program):
    """The graph between two breaks: parameters and inputs are placeholders in one list, whose order stays.

    What passes add becomes an input after the others, ``added`` in this order: the graph holds no weight, so that it
    serves every layer of the same code. What passes drop stays an input that nothing reads.

    Args:
        module: owns the graph.
        parameters: names of the placeholders that are parameters.
        state: tensors by name.
        added: placeholders that passes added, by name; those that are no parameters are buffers.
    """

    def __init__(
        self, module: GraphModule, parameters: dict[Node, str], state: dict[str, Tensor], added: dict[str, Node]
    ):
        super().__init__()
        self._module, self._parameters, self._state, self.added = module, parameters, state, added

    @classmethod
    def from_dynamo(cls, module: GraphModule, inputs: Sequence[Any]) -> Self:
        """Lower to aten operators, sizes staying symbols. Raises whatever torch cannot trace."""
        fakes = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
        mode = next(fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor))
        with mode:
            lowered = make_fx(module, tracing_mode="real", pre_dispatch=True)(*fakes)
        placeholders = zip(lowered.graph.find_nodes(op="placeholder"), inputs, strict=True)
        given = {
            node: (f"input_{index}.weight", value)
            for index, (node, value) in enumerate(placeholders)
            if isinstance(value, torch.nn.Parameter)
        }
        return cls(lowered, {node: fqn for node, (fqn, _) in given.items()}, dict(given.values()), {})

    @property
    def graph_module(self) -> GraphModule:
        return self._module

    @property
    def state(self) -> dict[str, Tensor]:
        return self._state

    def lifted(self, *kinds: InputKind) -> Iterator[tuple[Node, str, Tensor]]:
        buffers = {node: fqn for fqn, node in self.added.items() if node not in self._parameters}
        for kind, found in ((InputKind.PARAMETER, dict(self._parameters)), (InputKind.BUFFER, buffers)):
            if not kinds or kind in kinds:
                for node, fqn in found.items():
                    yield node, fqn, self.tensor(fqn)

    def user_inputs(self) -> list[Node]:
        lifted = self.names()
        return [node for node in self.graph.find_nodes(op="placeholder") if node not in lifted]

    def copy(self) -> Self:
        mapping: dict[Node, Node] = {}
        graph = Graph()
        output = graph.output(graph.graph_copy(self.graph, mapping))
        output.meta = copy.copy(self.graph.output_node().meta)
        return type(self)(
            GraphModule(self._module, graph),
            {mapping[node]: fqn for node, fqn in self._parameters.items()},
            dict(self._state),
            {fqn: mapping[node] for fqn, node in self.added.items()},
        )

    def add_parameter(self, fqn: str, value: Tensor, *, requires_grad: bool = True) -> Node:
        """As of any program, but the tensor is not wrapped: a compiled graph takes it as an input like another."""
        node = self.add_buffer(fqn, value)
        self._parameters[node] = fqn
        return node

    def add_buffer(self, fqn: str, value: Tensor) -> Node:
        placeholders = self.graph.find_nodes(op="placeholder")
        mode = next(v.fake_mode for n in self.graph.nodes if isinstance(v := n.meta.get("val"), FakeTensor))
        with self.graph.inserting_after(placeholders[-1]):
            node = self.graph.placeholder("added_" + fqn.replace(".", "_"))
        node.meta["val"] = mode.from_tensor(value, static_shapes=True)
        self._state[fqn], self.added[fqn] = value, node
        return node

    def drop(self, placeholder: Node) -> None:
        assert not placeholder.users, f"{placeholder} is still read"
        fqn = self.names()[placeholder]
        self._parameters.pop(placeholder, None)
        self._state.pop(fqn)
        if self.added.pop(fqn, None) is not None:
            self.graph.erase_node(placeholder)

    def extra_inputs(self) -> list[Tensor]:
        """The tensors that the graph takes after those of Dynamo."""
        return [self._state[fqn] for fqn in self.added]

    def validate(self) -> None:
        self.graph.lint()
        self._module.recompile()

    def module(self) -> GraphModule:
        """The graph, which takes its tensors as inputs."""
        return self._module
