"""A graph that Dynamo captured, as a program that the deployment passes can edit."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind, InputSpec
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from sparseforge_fx.graph.program import Program


class Frame(Program):
    """The graph between two breaks: parameters and inputs are placeholders in one list, whose order stays.

    What passes add becomes an input after the others, ``added`` in this order: the graph holds no weight, so that it
    serves every layer of the same code. What passes drop stays an input that nothing reads.
    """

    def __init__(self, module: GraphModule, fqns: dict[Node, str], values: dict[str, Tensor], added: dict[str, Node]):
        self.module_, self.fqns, self.values, self.added = module, fqns, values, added
        self.source, self.notes = None, ()

    @classmethod
    def from_dynamo(cls, module: GraphModule, inputs: Sequence[Any]) -> Frame:
        """Lower to aten operators, sizes staying symbols. Raises whatever torch cannot trace."""
        fakes = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
        mode = next(fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor))
        with mode:
            lowered = make_fx(module, tracing_mode="real", pre_dispatch=True)(*fakes)
        frame = cls(lowered, {}, {}, {})
        for index, (node, value) in enumerate(zip(lowered.graph.find_nodes(op="placeholder"), inputs, strict=True)):
            if isinstance(value, torch.nn.Parameter):
                frame.fqns[node] = f"input_{index}.weight"
                frame.values[frame.fqns[node]] = value
        return frame

    @property
    def graph(self) -> Graph:
        return self.module_.graph

    @property
    def state(self) -> dict[str, Tensor]:
        return self.values

    def tensor(self, fqn: str) -> Tensor:
        return self.values[fqn]

    def spec_of(self, node: Node) -> InputSpec | None:
        return None

    def lifted(self, *kinds: InputKind) -> Iterator[tuple[Node, str, Tensor]]:
        if InputKind.PARAMETER in kinds:
            for node, fqn in list(self.fqns.items()):
                yield node, fqn, self.values[fqn]

    def copy(self) -> Frame:
        mapping: dict[Node, Node] = {}
        graph = Graph()
        output = graph.output(graph.graph_copy(self.graph, mapping))
        output.meta = copy.copy(self.graph.output_node().meta)
        return Frame(
            GraphModule(self.module_, graph),
            {mapping[n]: fqn for n, fqn in self.fqns.items()},
            dict(self.values),
            {fqn: mapping[n] for fqn, n in self.added.items()},
        )

    def add_parameter(self, fqn: str, value: Tensor, *, requires_grad: bool = True) -> Node:
        node = self.add_buffer(fqn, value)
        self.fqns[node] = fqn
        return node

    def add_buffer(self, fqn: str, value: Tensor) -> Node:
        placeholders = self.graph.find_nodes(op="placeholder")
        mode = next(v.fake_mode for n in self.graph.nodes if isinstance(v := n.meta.get("val"), FakeTensor))
        with self.graph.inserting_after(placeholders[-1]):
            node = self.graph.placeholder("added_" + fqn.replace(".", "_"))
        node.meta["val"] = mode.from_tensor(value, static_shapes=True)
        self.values[fqn], self.added[fqn] = value, node
        return node

    def drop(self, placeholder: Node) -> None:
        assert not placeholder.users, f"{placeholder} is still read"
        fqn = self.fqns.pop(placeholder)
        self.values.pop(fqn)
        if self.added.pop(fqn, None) is not None:
            self.graph.erase_node(placeholder)

    def extra_inputs(self) -> list[Tensor]:
        """The tensors that the graph takes after those of Dynamo."""
        return [self.values[fqn] for fqn in self.added]

    def replace(self, old: Node, new: Node) -> None:
        new.meta = copy.copy(old.meta) | {k: v for k, v in new.meta.items() if k == "val"}
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def validate(self) -> None:
        self.graph.lint()
        self.module_.recompile()

    def module(self) -> GraphModule:
        return self.module_
