"""Walk a graph node by node with all calibration batches in step, stopping at every weight that is to be pruned.

Each node is computed once per batch, and each layer sees inputs that the already pruned layers before it produced.
What is alive at one point of the graph is all the memory that it takes, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from sparseforge_fx.data.reading import Reading, call_signature
from sparseforge_fx.errors import SparseForgeError, one_line
from sparseforge_fx.graph.capture import as_call
from sparseforge_fx.graph.padding import mask_names, real_rows

#: called at the first use of a weight, before the node runs, with its name and [in, in] X^T X / tokens; may write the
#: weight
Visit = Callable[[str, Tensor], None]


@torch.no_grad()
def layer_by_layer(
    module: GraphModule, weights: Mapping[Node, tuple[str, int]], batches: Sequence, visit: Visit
) -> set[str]:
    """Run ``batches`` through ``module`` in lock step and ``visit`` each weight with its inputs' second moments.

    Args:
        module: a flat GraphModule (``Program.module()``).
        weights: node that multiplies by a weight -> (the weight's name, argument index of the node's input).
            A weight with several nodes is visited at the first.
        batches: the calibration inputs: Readings, whose padding does not count, or any form that the model takes.

    Returns the names of weights in whose moments padding counts, because their inputs are not the batch's positions.
    """
    names = mask_names(module.graph, module.graph.find_nodes(op="placeholder"))
    padded: set[str] = set()
    flat = [_flatten(module, batch) for batch in batches]
    runs = [Interpreter(module, garbage_collect_values=False) for _ in batches]
    feeds = [iter(inputs) for inputs in flat]
    last = _last_uses(module)
    seen: set[str] = set()
    moments: dict[Node, Tensor] = {}
    blind: set[Node] = set()
    for run in runs:
        run.env = {}
    for step in _steps(module.graph):
        leave = dict(_pairs(step))
        for node in step:
            if node in weights and weights[node][0] not in seen:
                name, index = weights[node]
                seen.add(name)
                source = node.args[index]
                assert isinstance(source, Node)
                if source not in moments:
                    inputs = (
                        run.env[source] if node is step[0] else _look_ahead(run, step, leave, node, source)
                        for run in runs
                    )
                    masks = [b.real.get(names.get(source, "")) if isinstance(b, Reading) else None for b in batches]
                    moments[source], known = _second_moment(inputs, masks)
                    if not known:
                        blind.add(source)
                if source in blind:
                    padded.add(name)
                visit(name, moments[source])
        for index, (run, feed) in enumerate(zip(runs, feeds, strict=True)):
            try:
                _run(run, step, leave, feed)
            except torch.OutOfMemoryError:
                raise
            except (AssertionError, IndexError, RuntimeError) as error:  # a size or a token that it does not take
                told = f"calibration batch {index} does not fit the model: {one_line(error)}"
                raise SparseForgeError(told) from error
        for node in step:
            for dead in last.get(node, ()):
                moments.pop(dead, None)
                for run in runs:
                    run.env.pop(dead, None)
    return padded


def _leaves(node: Node) -> str:
    """The name of the function that leaves the state of the process which this node enters; "" if it enters none."""
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    other = name.replace("_increment_nesting", "_decrement_nesting").replace("_enter_", "_exit_")
    return other if other != name else ""


def _pairs(nodes: Iterable[Node]) -> Iterator[tuple[Node, Node]]:
    """(node that enters a state such as a vmap or an autocast, node that leaves it), the inner ones first."""
    entered: list[Node] = []
    for node in nodes:
        if _leaves(node):
            entered.append(node)
        elif entered and getattr(node.target, "__name__", "") == _leaves(entered[-1]):
            yield entered.pop(), node


def _steps(graph: Graph) -> Iterator[list[Node]]:
    """The nodes in order: one by one, but what stands between entering a state of the process and leaving it together,
    for one batch must leave it before the next enters."""
    nodes = [n for n in graph.nodes if n.op != "output"]
    leave = dict(_pairs(nodes))
    step: list[Node] = []
    ends: set[Node] = set()
    for node in nodes:
        step.append(node)
        if node in leave:
            ends.add(leave[node])
        ends.discard(node)
        if not ends:
            yield step
            step = []


def _run(
    run: Interpreter, step: Sequence[Node], leave: Mapping[Node, Node], feed: Iterator, *, until: Any = None
) -> None:
    """Compute the nodes of a step; whatever ends it, every state that was entered is left again.

    until: (node, function): stop before this node, and call the function while the states are open.
    """
    entered: list[Node] = []
    try:
        for node in step:
            if until is not None and node is until[0]:
                return until[1]()
            run.env[node] = next(feed) if node.op == "placeholder" else run.run_node(node)
            if node in leave:
                entered.append(node)
            elif entered and node is leave[entered[-1]]:
                entered.pop()
    finally:
        for node in reversed(entered):
            run.run_node(leave[node])


def _look_ahead(
    run: Interpreter, step: Sequence[Node], leave: Mapping[Node, Node], node: Node, source: Node
) -> Tensor:
    """The value of ``source`` that ``node`` will see in the midst of a step, with what vmap hides of it."""
    env, found = dict(run.env), []
    _run(run, step, leave, iter(()), until=(node, lambda: found.append(_plain(run.env[source]))))
    run.env = env
    return found[0]


def _plain(value: Tensor) -> Tensor:
    while torch._C._functorch.is_batchedtensor(value):
        level = torch._C._functorch.maybe_get_level(value)
        value, dim = torch._C._functorch._unwrap_batched(value, level)
        value = value.movedim(dim or 0, 0)
    return value


def _second_moment(inputs: Iterable[Tensor], masks: Iterable[Tensor | None]) -> tuple[Tensor, bool]:
    """X^T X / rows over the real rows of all inputs, and whether it is known which those are."""
    total, tokens, told = None, 0, True
    for x, mask in zip(inputs, masks, strict=True):
        rows = real_rows(x, mask)
        told &= rows is not None
        rows = (x.reshape(-1, x.shape[-1]) if rows is None else rows).float()
        product = rows.t() @ rows
        total = product if total is None else total.add_(product)
        tokens += rows.shape[0]
    assert total is not None
    return total / max(1, tokens), told


def _flatten(module: GraphModule, batch: Any) -> list:
    if isinstance(batch, Reading):
        return pytree.tree_leaves((batch.args, batch.kwargs))
    args, kwargs = as_call(batch)
    _, names = call_signature(module.graph._codegen.pytree_info.in_spec)  # type: ignore[attr-defined]
    # the exported order of keyword inputs, not the caller's
    return pytree.tree_leaves((args, {k: kwargs[k] for k in names} if kwargs else {}))


def _last_uses(module: GraphModule) -> dict[Node, list[Node]]:
    last: dict[Node, list[Node]] = {}
    seen: set[Node] = set()
    for node in reversed(module.graph.nodes):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                last.setdefault(node, []).append(used)
        if node.op != "output" and not node.users:
            last.setdefault(node, []).append(node)
    return last
