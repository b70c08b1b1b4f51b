"""Compile a repeated block once, not once per layer.

``torch.compile`` of a whole exported graph takes time in proportion to its depth. Here the node ranges of repeated blocks
(``model.layers.0`` ... ``model.layers.29``) are found, checked to be the same program, and outlined into one function
``block(inputs, parameters, buffers)`` which every layer calls with its own tensors. Parameters are arguments, so the
compiled code is guarded by shapes and not by identity, and serves every layer.

Why not ``torch.compiler.nested_compile_region`` inside one compiled whole: see the numbers in
``compile_repeated_blocks``.
"""

from __future__ import annotations

import copy
import operator
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

MIN_NODES = 8  # smaller blocks (a lone Linear in a Sequential) gain nothing from a call of their own

_NUMBERED = re.compile(r"(?:^|\.)\d+$")  # the path of one block: model.layers.7
_SYMBOL = re.compile(r"\b[su]\d+\b")  # symbolic sizes: s72 of inputs, u0 of data-dependent values


@dataclass(frozen=True)
class _Block:
    """One contiguous range of nodes, as a function of what it reads."""

    path: str
    start: int  # positions in the graph, both inclusive
    end: int
    nodes: tuple[Node, ...]  # what the function computes
    hoisted: frozenset[Node]  # get_attr and size nodes in the range that stay outside, ahead of the call
    inputs: tuple[Node, ...]  # in order of first use
    outputs: tuple[Node, ...]  # read after the range
    key: tuple  # equal keys <=> the same program

    @property
    def container(self) -> str:
        return self.path.rpartition(".")[0]


class SharedBlock(nn.Module):
    """The one function that all blocks of a class call. Holds no parameters, so ``state_dict`` does not see it."""

    def __init__(self, body: GraphModule, path: str, count: int, compile: bool, options: dict[str, Any]):
        super().__init__()
        self.body, self.path, self.count = body, path, count
        # body.forward, and not body: every GraphModule's forward is a code object of its own with its own recompile limit
        self.call: Callable = torch.compile(body.forward, **options) if compile else body.forward

    def forward(self, *args: Any) -> Any:
        return self.call(*args)

    def extra_repr(self) -> str:
        return f"{self.path} x {self.count}"


def compile_repeated_blocks(module: GraphModule, *, compile: bool = True, **options: Any) -> GraphModule:
    """A twin of an exported module in which each kind of repeated block is compiled once and called by every layer.

    Args:
        module: the flat module of ``torch.export.export(...).module()``, edited by passes or not. It is not changed.
        compile: False outlines only: the result runs eagerly and is bit-equal to ``module``.
        options: for ``torch.compile`` (``backend``, ``mode``, ``dynamic``, ...). With ``dynamic=None``, its default,
            a second sequence length recompiles once, with that size symbolic.

    Returns a GraphModule with the same signature, hooks, names and the very same Parameters and buffers. What lies outside
    the repeated blocks (embedding, masks, final norm, head) runs eagerly. Where nothing repeats, the whole graph is
    compiled as one.
    """
    classes = _find(module)
    call_of = {i: (k, block) for k, blocks in enumerate(classes) for block in blocks for i in (block.start,)}
    graph = Graph(tracer_cls=module.graph._tracer_cls)
    graph._codegen = copy.copy(module.graph._codegen)  # the pytree signature
    env: dict[Node, Node] = {}
    skip_until = -1
    for i, node in enumerate(nodes := list(module.graph.nodes)):
        if i <= skip_until:
            continue
        if i not in call_of:
            env[node] = graph.node_copy(node, env.__getitem__)
            continue
        k, block = call_of[i]
        skip_until = block.end
        for early in nodes[block.start : block.end + 1]:
            if early in block.hoisted:
                env[early] = graph.node_copy(early, env.__getitem__)
        _call(graph, f"repeated_block_{k}", block, env)
    twin = _twin(module)
    for k, blocks in enumerate(classes):
        container = blocks[0].container or "(root)"
        twin.add_module(f"repeated_block_{k}", SharedBlock(_body(blocks[0], module), container, len(blocks), compile, options))
    twin.graph = graph
    if compile and not classes:
        twin.compile(**options)
    return twin


def count_blocks(module: GraphModule) -> list[tuple[str, int]]:
    """What ``compile_repeated_blocks`` would compile: (container's path, number of blocks) per kind, in graph order."""
    return [(blocks[0].container, len(blocks)) for blocks in _find(module)]


# -- finding ---------------------------------------------------------------------------------------------------------
def _find(module: GraphModule) -> list[list[_Block]]:
    """Classes of blocks that are the same program, outermost containers first; ranges never overlap.

    A block of a container that mostly repeats, but which is the only one of its kind (a first layer that also computes the
    position bias, a dense layer before the experts), is a class of one: compiled too, still a fixed number of compiles.
    """
    nodes = list(module.graph.nodes)
    spans: dict[tuple[str, str], list[int]] = {}  # (key, path): a module called twice has one path and two keys
    for i, node in enumerate(nodes):
        if node.op == "call_function":
            for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
                if _NUMBERED.search(path):
                    spans.setdefault((key, path), [i, i])[1] = i
    by_depth: dict[int, list[tuple[str, int, int]]] = defaultdict(list)
    for (_, path), (start, end) in spans.items():
        if end - start + 1 >= MIN_NODES:
            by_depth[path.count(".")].append((path, start, end))

    taken = [False] * len(nodes)
    found: list[list[_Block]] = []
    for depth in sorted(by_depth):
        kinds: dict[tuple, list[_Block]] = defaultdict(list)
        for path, start, end in by_depth[depth]:
            if not any(taken[start : end + 1]) and (block := _as_function(path, nodes, start, end, module)):
                kinds[block.key].append(block)
        repeated = [blocks for blocks in kinds.values() if len(blocks) > 1]
        members = [b.container for blocks in repeated for b in blocks]
        alone = [blocks for blocks in kinds.values() if len(blocks) == 1]
        loners = [blocks[0].container for blocks in alone]
        mostly = {c for c in members if loners.count(c) <= members.count(c)}
        for blocks in repeated + [blocks for blocks in alone if blocks[0].container in mostly]:
            kept = []
            for block in blocks:
                if not any(taken[block.start : block.end + 1]):
                    taken[block.start : block.end + 1] = [True] * (block.end + 1 - block.start)
                    kept.append(block)
            if kept:
                found.append(kept)
    return sorted(found, key=lambda blocks: blocks[0].start)


def _as_function(path: str, nodes: list[Node], start: int, end: int, module: GraphModule) -> _Block | None:
    """The range as a function of outside values; None where it calls submodules or gives nothing."""
    inside: dict[Node, int] = {}
    hoisted = set()
    for node in nodes[start : end + 1]:
        size = isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)
        if node.op == "get_attr" or (size and not any(a in inside for a in node.all_input_nodes)):
            hoisted.add(node)  # sizes are shared between layers: whoever comes first must not differ by computing them
        elif node.op == "call_function":
            inside[node] = len(inside)
        else:
            return None
    inputs: dict[Node, int] = {}

    def name(arg: Node) -> tuple:
        if arg in inside:
            return ("node", inside[arg])
        if (subgraph := _subgraph(arg, module)) is not None:
            return ("subgraph", _subgraph_key(subgraph))
        return ("input", inputs.setdefault(arg, len(inputs)))

    program = tuple((n.target, _args_key(n, name), _value_key(n.meta.get("val"))) for n in inside)
    outputs = tuple(n for n in inside if any(user not in inside for user in n.users))
    if len(inside) < MIN_NODES or not outputs:
        return None
    signature = tuple(_input_key(n, module) for n in inputs)
    # sizes are compared by where they occur: s72 in one block may be u3 in another
    order: dict[str, str] = {}
    text = _SYMBOL.sub(lambda m: order.setdefault(m[0], f"d{len(order)}"), repr((signature, [p[1:] for p in program])))
    key = (tuple(p[0] for p in program), text, tuple(inside[n] for n in outputs))
    return _Block(path, start, end, tuple(inside), frozenset(hoisted), tuple(inputs), outputs, key)


def _args_key(node: Node, name: Callable[[Node], tuple]) -> str:
    """Arguments as text with nodes by number; repr tells 1 from 1.0 and True."""

    def one(arg: Any) -> Any:
        return name(arg) if isinstance(arg, Node) else arg

    return repr((map_aggregate(node.args, one), sorted(map_aggregate(dict(node.kwargs), one).items())))


def _value_key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (str(value.dtype), str(tuple(value.shape)), str(value.device))
    if isinstance(value, tuple | list):
        return tuple(_value_key(v) for v in value)
    return (type(value).__name__, str(value))


def _input_key(node: Node, module: GraphModule) -> Any:
    if node.op != "get_attr":
        return _value_key(node.meta.get("val"))
    value = operator.attrgetter(node.target)(module)
    if not isinstance(value, Tensor):
        return (node.target,)
    return (type(value).__name__, _value_key(value), value.stride(), value.requires_grad)


def _subgraph(node: Node, module: GraphModule) -> GraphModule | None:
    """The body that a higher-order operator (no_grad, autocast, cond) in the block refers to."""
    value = operator.attrgetter(node.target)(module) if node.op == "get_attr" else None  # type: ignore[arg-type]
    return value if isinstance(value, GraphModule) else None


def _subgraph_key(body: GraphModule) -> tuple:
    number = {n: i for i, n in enumerate(body.graph.nodes)}
    return tuple(
        (
            n.op,
            str(n.target) if n.op in ("call_function", "call_method", "call_module") else "",
            _subgraph_key(sub) if (sub := _subgraph(n, body)) is not None else n.op == "get_attr" and n.target,
            _args_key(n, lambda arg: ("node", number[arg])),
        )
        for n in body.graph.nodes
    )


# -- outlining -------------------------------------------------------------------------------------------------------
def _body(block: _Block, module: GraphModule) -> GraphModule:
    """The range as a GraphModule of its own: placeholders for ``block.inputs``, results ``block.outputs``."""
    graph = Graph()
    env: dict[Node, Node] = {}
    for i, node in enumerate(block.inputs):
        env[node] = graph.placeholder(f"{'weight' if node.op == 'get_attr' else 'input'}_{i}")
        env[node].meta = copy.copy(node.meta)
    for node in block.nodes:
        for arg in node.all_input_nodes:
            if arg not in env:  # the subgraph of a higher-order operator
                env[arg] = graph.node_copy(arg)
        env[node] = graph.node_copy(node, env.__getitem__)
    results = tuple(env[n] for n in block.outputs)
    graph.output(results[0] if len(results) == 1 else results)
    return GraphModule(module, graph, "RepeatedBlock")


def _call(graph: Graph, target: str, block: _Block, env: dict[Node, Node]) -> None:
    call = graph.create_node("call_module", target, tuple(env[n] for n in block.inputs), name=f"{target}_call")
    call.meta["nn_module_stack"] = block.nodes[-1].meta.get("nn_module_stack")
    for i, node in enumerate(block.outputs):
        env[node] = call if len(block.outputs) == 1 else graph.call_function(operator.getitem, (call, i))
        env[node].meta = copy.copy(node.meta)


def _twin(module: GraphModule) -> GraphModule:
    """A shallow copy: a graph, hooks and a list of children of its own; the children and root tensors are the same objects.

    So ``module.to(...)``, ``load_state_dict`` and the like reach the twin as well, whichever of the two they are called on.
    """
    twin = GraphModule.__new__(type(module))  # gives the instance a class, and so a ``forward``, of its own
    twin.__dict__ = {k: copy.copy(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()}
    twin._parameters, twin._buffers = module._parameters, module._buffers
    twin._compiled_call_impl = None
    return twin
