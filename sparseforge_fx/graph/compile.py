"""Compile a repeated block once, not once per layer.

``torch.compile`` of a whole exported graph takes time in proportion to its depth. Here the node ranges of repeated
blocks (``model.layers.0`` ... ``model.layers.29``) are found, checked to be the same program, and outlined into one
function ``block(inputs, parameters, buffers)`` which every layer calls with its own tensors. Parameters are arguments,
so the compiled code is guarded by shapes and not by identity, and serves every layer.

The other way is one compiled whole with ``torch.compiler.nested_compile_region`` around each block: it still traces
every layer and writes one wrapper for the whole depth, so that its Python time grows with the number of layers. Here
it does not; the tests count the compilations.
"""

from __future__ import annotations

import copy
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils.checkpoint import checkpoint

MIN_NODES = 8  # smaller blocks (a lone Linear in a Sequential) gain nothing from a call of their own

_NUMBERED = re.compile(r"(?:^|\.)\d+$")  # the path of one block: model.layers.7
_SYMBOL = re.compile(r"\b[su]\d+\b")  # symbolic sizes: s72 of inputs, u0 of data-dependent values


@dataclass(frozen=True)
class Block:
    """One contiguous range of nodes, as a function of what it reads."""

    path: str
    span: range  # positions in the graph
    nodes: tuple[Node, ...]  # what the function computes; the rest of the span moves ahead of the call
    inputs: tuple[Node, ...]  # in order of first use
    outputs: tuple[Node, ...]  # read after the span
    key: tuple  # equal keys <=> the same program

    @property
    def container(self) -> str:
        return self.path.rpartition(".")[0]


class SharedBlock(nn.Module):
    """The one function that all blocks of a kind call. Holds no parameters, so ``state_dict`` does not see it."""

    def __init__(self, body: GraphModule, blocks: list[Block]):
        super().__init__()
        self.body, self.path, self.count = body, blocks[0].container, len(blocks)
        self._carried = _carried(blocks)
        self.run_as()

    def run_as(self, compile: Mapping[str, Any] | None = None, checkpoint: bool = False) -> SharedBlock:
        """From now on: compiled with these options of ``torch.compile``, if any; computed again in the backward pass,
        or not."""
        self.checkpoint = checkpoint
        # body.forward, and not body: its code object, which torch.compile counts recompiles by, is this block's own
        self.call: Callable = self.body.forward if compile is None else torch.compile(self.body.forward, **compile)
        self.carried = frozenset() if compile is None else self._carried
        return self

    def forward(self, *args: Any) -> Any:
        if self.carried and torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            # behind a frozen embedding the first block's input needs no gradient: not worth a compile of its own
            args = tuple(
                a.detach().requires_grad_() if i in self.carried and not a.requires_grad else a
                for i, a in enumerate(args)
            )
        if self.checkpoint and torch.is_grad_enabled():
            return checkpoint(self.call, *args, use_reentrant=False)
        return self.call(*args)

    def extra_repr(self) -> str:
        return f"{self.path} x {self.count}"


def compile_repeated_blocks(
    module: GraphModule, *, compile: bool = True, checkpoint: bool = False, **options: Any
) -> GraphModule:
    """A twin of an exported module in which each kind of repeated block is compiled once and called by every layer.

    Args:
        module: the flat module of ``torch.export.export(...).module()``, edited by passes or not. It is not changed.
        compile: False outlines only: the result runs eagerly and is bit-equal to ``module``.
        checkpoint: keep only what goes into each block for the backward pass, and compute the block again there.
        options: for ``torch.compile`` (``backend``, ``mode``, ``dynamic``, ...). With ``dynamic=None``, its default,
            a second sequence length recompiles once, with that size symbolic; so does a second batch size.

    Returns a GraphModule with the same signature, hooks, names and the very same Parameters and buffers. What lies
    outside the blocks (embedding, masks, final norm, head) runs eagerly. Where nothing repeats, the whole graph is
    compiled as one. Compiled blocks differentiate once, as under any torch.compile; no-grad calls compile anew.
    """
    kinds = _find(module)
    starts = {block.span.start: (f"repeated_block_{k}", block) for k, blocks in enumerate(kinds) for block in blocks}
    nodes = list(module.graph.nodes)
    graph = Graph(tracer_cls=module.graph._tracer_cls)
    graph._codegen = copy.copy(module.graph._codegen)  # the pytree signature
    env: dict[Node, Node] = {}
    position = 0
    while position < len(nodes):
        target, block = starts.get(position, ("", None))
        span = range(position, position + 1) if block is None else block.span
        for node in nodes[span.start : span.stop]:
            if block is None or node not in block.nodes:
                env[node] = graph.node_copy(node, env.__getitem__)
        if block is not None:
            call_block(graph, target, block, tuple(env[n] for n in block.inputs), env)
        position = span.stop
    twin = shallow_twin(module)
    for k, blocks in enumerate(kinds):
        shared = SharedBlock(block_body(blocks[0], module), blocks)
        twin.add_module(f"repeated_block_{k}", shared.run_as(options if compile else None, checkpoint))
    twin.graph = graph
    if compile and not kinds:
        twin.compile(**options)
    return twin


def count_blocks(module: GraphModule) -> list[tuple[str, int]]:
    """What ``compile_repeated_blocks`` would compile: (container's path, number of blocks) per kind, in graph order."""
    return [(blocks[0].container, len(blocks)) for blocks in _find(module)]


def find_blocks(module: GraphModule) -> list[Block]:
    """The repeated blocks, in graph order."""
    return sorted((block for kind in _find(module) for block in kind), key=lambda block: block.span.start)


def block_outputs(module: GraphModule) -> list[Node]:
    """What each repeated block hands on: its first floating-point output of three dimensions, in graph order."""
    handed = []
    for block in find_blocks(module):
        values = (n for n in block.outputs if torch.is_tensor(n.meta.get("val")))
        hidden = [n for n in values if n.meta["val"].is_floating_point() and n.meta["val"].dim() >= 3]
        handed += hidden[:1]
    return handed


def block_ends(module: GraphModule) -> list[Node]:
    """The last node of each repeated block, in graph order."""
    nodes = list(module.graph.nodes)
    return [nodes[end - 1] for end in sorted(b.span.stop for kind in _find(module) for b in kind)]


# -- finding ---------------------------------------------------------------------------------------------------------
def _find(module: GraphModule) -> list[list[Block]]:
    """Kinds of blocks, each a list of ranges that are the same program; outermost containers first; no overlaps.

    A block that is the only one of its kind in a container that mostly repeats (a first layer that also computes the
    position bias, a dense layer before the experts) is a kind of one: that is still a fixed number of compiles.
    """
    nodes = list(module.graph.nodes)
    spans: dict[tuple[str, str], range] = {}  # by (key, path): a module called twice has one path and two keys
    for i, node in enumerate(nodes):
        if node.op == "call_function":
            for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
                if _NUMBERED.search(path):
                    spans[key, path] = range(spans.get((key, path), range(i, i)).start, i + 1)
    by_depth: dict[int, list[tuple[str, range]]] = defaultdict(list)
    for (_, path), span in spans.items():
        by_depth[path.count(".")].append((path, span))

    taken: set[int] = set()
    found: list[list[Block]] = []
    for _, candidates in sorted(by_depth.items()):
        kinds: dict[tuple, list[Block]] = defaultdict(list)
        for path, span in candidates:
            if len(span) >= MIN_NODES and taken.isdisjoint(span) and (block := _as_function(path, span, nodes, module)):
                kinds[block.key].append(block)
        repeated = Counter(b.container for blocks in kinds.values() if len(blocks) > 1 for b in blocks)
        single = Counter(blocks[0].container for blocks in kinds.values() if len(blocks) == 1)
        for blocks in sorted(kinds.values(), key=len, reverse=True):
            container = blocks[0].container
            if len(blocks) == 1 and single[container] > repeated[container]:
                continue
            found.append([])
            for block in blocks:
                if taken.isdisjoint(block.span):
                    taken.update(block.span)
                    found[-1].append(block)
    return sorted(filter(None, found), key=lambda blocks: blocks[0].span.start)


def _as_function(path: str, span: range, nodes: list[Node], module: GraphModule) -> Block | None:
    """The range as a function of outside values; None where it calls submodules, is small, or gives nothing."""
    inside: dict[Node, int] = {}
    for node in nodes[span.start : span.stop]:
        # layers share sizes: the first to compute one must not differ by that, so sizes of outside values stay outside
        size = isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)
        if node.op == "get_attr" or (size and not any(a in inside for a in node.all_input_nodes)):
            continue
        if node.op != "call_function":
            return None
        inside[node] = len(inside)
    inputs: dict[Node, int] = {}

    def name(arg: Node) -> tuple:
        if arg in inside:
            return ("node", inside[arg])
        if (body := _subgraph(arg, module)) is not None:
            return ("subgraph", _graph_key(body))
        return ("input", inputs.setdefault(arg, len(inputs)))

    steps = [(_args_key(node, name), _value_key(node.meta.get("val"))) for node in inside]
    outputs = tuple(node for node in inside if any(user not in inside for user in node.users))
    if len(inside) < MIN_NODES or not outputs:
        return None
    # sizes are compared by where they occur: what is s72 in one block may be u3 in another
    order: dict[str, str] = {}
    text = repr(([_input_key(node, module) for node in inputs], steps))
    text = _SYMBOL.sub(lambda match: order.setdefault(match[0], f"size{len(order)}"), text)
    key = (tuple(node.target for node in inside), text, tuple(inside[node] for node in outputs))
    return Block(path, span, tuple(inside), tuple(inputs), outputs, key)


def _args_key(node: Node, name: Callable[[Node], Any]) -> str:
    """Arguments as text, with nodes by number; repr tells 1 from 1.0 and True."""
    return repr(map_aggregate((node.args, node.kwargs), lambda arg: name(arg) if isinstance(arg, Node) else arg))


def _value_key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (str(value.dtype), str(tuple(value.shape)), str(value.device))
    if isinstance(value, tuple | list):
        return tuple(_value_key(v) for v in value)
    return (type(value).__name__, str(value))


def attribute(node: Node, module: GraphModule) -> Any:
    """What a node reads of its module; None for other nodes."""
    return operator.attrgetter(str(node.target))(module) if node.op == "get_attr" else None


def _input_key(node: Node, module: GraphModule) -> Any:
    value = attribute(node, module)
    if isinstance(value, Tensor):
        return (type(value).__name__, _value_key(value), value.stride(), value.requires_grad)
    return node.target if node.op == "get_attr" else _value_key(node.meta.get("val"))


def _subgraph(node: Node, module: GraphModule) -> GraphModule | None:
    """The body that a higher-order operator (no_grad, autocast, cond) refers to."""
    value = attribute(node, module)
    return value if isinstance(value, GraphModule) else None


def _graph_key(body: GraphModule) -> tuple:
    number = {node: i for i, node in enumerate(body.graph.nodes)}

    def what(node: Node) -> Any:
        inner = _subgraph(node, body)
        named = node.op not in ("placeholder", "output")
        return _graph_key(inner) if inner is not None else str(node.target) if named else ""

    return tuple((node.op, what(node), _args_key(node, number.__getitem__)) for node in body.graph.nodes)


# -- outlining -------------------------------------------------------------------------------------------------------
def block_body(block: Block, module: GraphModule) -> GraphModule:
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


def _carried(blocks: list[Block]) -> frozenset[int]:
    """Inputs that one block hands to the next: the residual stream. None where a block writes in place."""
    results = {node for block in blocks for node in block.outputs if torch.is_tensor(node.meta.get("val"))}
    carried = {i for b in blocks for i, n in enumerate(b.inputs) if n in results and n.meta["val"].is_floating_point()}
    in_place = any(n.target._schema.is_mutable for n in blocks[0].nodes if isinstance(n.target, torch._ops.OpOverload))
    return frozenset() if in_place else frozenset(carried)


def call_block(graph: Graph, target: str, block: Block, args: tuple[Node, ...], env: dict[Node, Node]) -> None:
    """Call a module in the place of a block: what it gives goes to ``env``."""
    call = graph.create_node("call_module", target, args)
    for i, node in enumerate(block.outputs):
        env[node] = call if len(block.outputs) == 1 else graph.call_function(operator.getitem, (call, i))
        env[node].meta = copy.copy(node.meta)


def shallow_twin(module: GraphModule) -> GraphModule:
    """A shallow copy: graph, hooks and list of children are its own; the children and the root's tensors are shared.

    So ``to``, ``load_state_dict`` and the like reach both, whichever of the two they are called on.
    """
    twin = GraphModule.__new__(type(module))  # gives the instance a class, and so a ``forward``, of its own
    twin.__dict__ = {k: copy.copy(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()}
    twin._parameters, twin._buffers = module._parameters, module._buffers
    twin._compiled_call_impl = None
    return twin
