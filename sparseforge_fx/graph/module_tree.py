"""A flat graph gets modules back: its repeated blocks, each with the parameters that it alone reads.

``torch.export.unflatten`` would give every module of the source back, with clones of its tensors, and stops at modules
that the graph enters twice. What is cut over processes needs the blocks alone, which the nodes' module stacks show.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node

from sparseforge_fx.graph.compile import (
    Block,
    SharedBlock,
    attribute,
    block_body,
    call_block,
    find_blocks,
    shallow_twin,
)


class BlockModule(nn.Module):
    """A block as a function of what the graph hands it; its own parameters are in ``names``: attribute -> full name."""

    def __init__(self, block: Block, shared: SharedBlock, own: dict[Node, nn.Parameter]):
        super().__init__()
        self.path = block.path
        self.shared = (shared,)  # with the other blocks of its kind: no child of one of them
        self.names: dict[str, str] = {}
        self._order: list[str | None] = []  # of the body's arguments: an attribute, or the next of what is handed
        for node in block.inputs:
            name = None
            if node in own:
                name = f"tensor_{len(self.names)}"
                self.register_parameter(name, own[node])
                self.names[name] = str(node.target)
            self._order.append(name)

    def forward(self, *handed: Any) -> Any:
        rest = iter(handed)
        return self.shared[0](*(next(rest) if name is None else getattr(self, name) for name in self._order))


def shared_blocks(tree: nn.Module) -> list[SharedBlock]:
    """What the block modules of a tree run, one for each kind."""
    return list(dict.fromkeys(m.shared[0] for m in tree.modules() if isinstance(m, BlockModule)))


def with_block_modules(module: GraphModule) -> GraphModule:
    """A twin of an exported module that calls its repeated blocks as modules.

    ``module`` loses the parameters of the blocks to them; what several blocks read, or the rest of the graph, too,
    stays where it is. The twin computes the same, to the bit. A model without repeated blocks has none.
    """
    blocks = find_blocks(module)
    owner = {node: i for i, block in enumerate(blocks) for node in block.nodes}
    parameters = {n: v for n in module.graph.nodes if isinstance(v := attribute(n, module), nn.Parameter)}
    readers: dict[int, set[int]] = defaultdict(set)
    for node, value in parameters.items():
        readers[id(value)] |= {owner.get(user, -1) for user in node.users}
    own = {
        node: value
        for node, value in parameters.items()
        if len(readers[id(value)] - {-1}) == len(readers[id(value)]) == 1
    }
    graph = Graph(tracer_cls=module.graph._tracer_cls)
    graph._codegen = copy.copy(module.graph._codegen)  # the pytree signature
    twin = shallow_twin(module)
    env: dict[Node, Node] = {}
    ends = {block.span.stop - 1: i for i, block in enumerate(blocks)}
    kinds: dict[tuple, list[Block]] = defaultdict(list)
    for block in blocks:
        kinds[block.key].append(block)
    shared = {key: SharedBlock(block_body(kind[0], module), kind) for key, kind in kinds.items()}
    for position, node in enumerate(module.graph.nodes):
        if node not in owner and node not in own:
            env[node] = graph.node_copy(node, env.__getitem__)
        if position in ends:
            block = blocks[ends[position]]
            name = f"block_{ends[position]}"
            twin.add_module(name, BlockModule(block, shared[block.key], own))
            call_block(graph, name, block, tuple(env[n] for n in block.inputs if n not in own), env)
    twin.graph = graph
    for node in own:
        path, _, leaf = str(node.target).rpartition(".")
        if hasattr(twin.get_submodule(path), leaf):
            delattr(twin.get_submodule(path), leaf)
    return twin
