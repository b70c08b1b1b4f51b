"""Walk a graph node by node with all calibration batches in step, stopping at every weight that is to be pruned.

Each node is computed once per batch, and each layer sees inputs that the already pruned layers before it produced.
What is alive at one point of the graph is all the memory that it takes, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from sparseforge_fx.data.reading import Reading, call_signature
from sparseforge_fx.errors import SparseForgeError, one_line
from sparseforge_fx.graph.capture import as_call
from sparseforge_fx.graph.padding import mask_names, real_rows
from sparseforge_fx.methods.every_token import CannotTell, inputs_of_expert, kept_for
from sparseforge_fx.methods.streamed import Streamed

#: called at the first use of a weight, before the node runs, with its name, [in, in] X^T X / tokens and, in a walk with
#: a twin, Z^T X / tokens, Z being what the twin sees; may write the weight. Of a stack, for one expert after the other,
#: with ``expert=`` an :class:`Expert`
Visit = Callable[..., None]
#: called before, with the name and X^T X / tokens: the order that the weight's inputs have from now on (it then sees to
#: what computes them), or None
Reorder = Callable[[str, Tensor], Tensor | None]


class Read(NamedTuple):
    """How a node multiplies by a weight.

    Attributes:
        name: the weight's.
        input: argument index of the node's input.
        expert: of a stack, the matrix that the node reads; None: all of them, or no stack.
        offsets: node that says where the rows of each expert end; None: each has as many, or no stack.
        experts: of a node that reads all of a stack, how many there are.
    """

    name: str
    input: int
    expert: int | None = None
    offsets: Node | None = None
    experts: int | None = None


class Expert(NamedTuple):
    """Whose inputs a visit tells of: the place in its stack, how many tokens it saw, and whether those are all."""

    place: int
    tokens: int
    every: bool = False


@torch.no_grad()
def layer_by_layer(
    module: GraphModule,
    weights: Mapping[Node, Read | tuple[str, int]],
    batches: Sequence,
    visit: Visit,
    twin: Mapping[str, Tensor] | None = None,
    reorder: Reorder | None = None,
    every_token: bool = False,
    streamed: Streamed | None = None,
) -> set[str]:
    """Run ``batches`` through ``module`` in lock step and ``visit`` each weight with its inputs' second moments.

    Args:
        module: a flat GraphModule (``Program.module()``).
        weights: node that multiplies by a weight -> how (:class:`Read`, or its first two fields). A weight, or a
            matrix of a stack, with several nodes is visited at the first.
        batches: the calibration inputs: Readings, whose padding does not count, or any form that the model takes.
        twin: weights by name with which the same graph runs beside, unvisited: what the visits move away from. It
            doubles work and memory.
        reorder: asked of weights whose input nothing else reads.
        every_token: experts of stacks are told of as if every token came to each of them, where the graph lets that
            be computed (methods/every_token.py); what goes on through the graph is routed as ever.
        streamed: where weights and activations are that are not in memory (methods/streamed.py).

    Returns the names of weights in whose moments padding counts, because their inputs are not the batch's positions.
    """
    names = mask_names(module.graph, module.graph.find_nodes(op="placeholder"))
    padded: set[str] = set() if streamed is None else streamed.padded
    flat = [flat_inputs(module, batch) for batch in batches]
    runs = [Held(module, {} if streamed is None else streamed) for _ in batches]
    twins = [Held(module, twin) for _ in batches] if twin is not None else []
    feeds = [iter(inputs) for inputs in (flat + flat if twins else flat)]
    last = last_uses(module, kept_for(weights) if every_token else {})
    seen: set[tuple[str, int | None]] = set()
    wanted = {(read.name, read.expert) for read in (Read(*given) for given in weights.values())}
    moments: dict[Node, list[Tensor]] = {}
    blind: set[Node] = set()
    done = None if streamed is None else streamed.resume(runs)
    for step in _steps(module.graph):
        if done is not None:
            seen |= {(read.name, read.expert) for n in step if n in weights for read in [Read(*weights[n])]}
            done = None if done in step else done
            continue
        leave = dict(_pairs(step))
        for node in step:
            if node not in weights or ((read := Read(*weights[node])).name, read.expert) in seen:
                continue
            seen.add((read.name, read.expert))
            source = node.args[read.input]
            assert isinstance(source, Node)
            rows = names.get(source)
            masks = [rows.of(b.real) if rows is not None and isinstance(b, Reading) else None for b in batches]
            see = _seen_by(step, leave, node, source)
            if read.experts is not None:
                if not _visit_experts(read, node, runs, see, visit, masks if every_token else None):
                    padded |= {read.name} if any(m is not None and not bool(m.all()) for m in masks) else set()
                continue
            if source not in moments:
                inputs = [map(see, group) for group in (runs, twins) if group]
                moments[source], known = _second_moments(inputs, masks)
                if not known:
                    blind.add(source)
            if source in blind:
                padded.add(read.name)
            if read.expert is None:
                if reorder is not None and node is step[0] and len(source.users) == 1:  # else it would change twice
                    _put_in_order(reorder(read.name, moments[source][0]), source, runs, moments[source])
                visit(read.name, *moments[source])
            else:
                visit(
                    read.name, *moments[source], expert=Expert(read.expert, sum(see(r)[..., 0].numel() for r in runs))
                )
        if streamed is None and seen >= wanted:
            break  # nobody asks for what comes behind
        _run_all(runs + twins, step, leave, feeds, len(batches), streamed)
        dead = [value for node in step for value in last.get(node, ())]
        _forget(dead, [moments, *(run.env for run in runs + twins)])
        if streamed is not None and streamed.after(step, dead, runs):
            break
    return padded


def _forget(dead: Iterable[Node], stores: Iterable[dict[Node, Any]]) -> None:
    for store in stores:
        for node in dead:
            store.pop(node, None)


def _run_all(
    runs: Sequence[Interpreter], step: Sequence[Node], leave: Mapping[Node, Node], feeds: Sequence[Iterator],
    batches: int, streamed: Streamed | None,
) -> None:  # fmt: skip
    """Compute a step for one batch after the other."""
    for index, (run, feed) in enumerate(zip(runs, feeds, strict=True)):
        try:
            _run(run, step, leave, feed)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, IndexError, RuntimeError) as error:  # a size or a token that it does not take
            told = f"calibration batch {index % batches} does not fit the model: {one_line(error)}"
            raise SparseForgeError(told) from error
        if streamed is not None:
            streamed.keep(run, len(runs))


def _put_in_order(order: Tensor | None, source: Node, runs: Sequence[Interpreter], moments: list[Tensor]) -> None:
    """What is known of a weight's inputs, as they come from now on."""
    if order is not None:
        moments[:] = [m[order][:, order] for m in moments]
        for run in runs:
            run.env[source] = run.env[source][..., order]


class Held(Interpreter):
    """One batch on its way through the graph; weights that are ``held`` go before the module's."""

    def __init__(self, module: GraphModule, held: Mapping[str, Tensor] | Streamed):
        super().__init__(module, garbage_collect_values=False)
        self.held = held
        self.env = {}

    def fetch_attr(self, target: str) -> Any:
        return self.held[target] if target in self.held else super().fetch_attr(target)


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


def _seen_by(
    step: Sequence[Node], leave: Mapping[Node, Node], node: Node, source: Node
) -> Callable[[Interpreter], Tensor]:
    """What a run gives ``node``, which stands in ``step``, for its input ``source``."""
    return lambda run: run.env[source] if node is step[0] else _look_ahead(run, step, leave, node, source)


def _look_ahead(run: Interpreter, step: Sequence[Node], leave: Mapping[Node, Node], node: Node, source: Node) -> Tensor:
    """The value of ``source`` that ``node`` will see in the midst of a step, with what vmap hides of it."""
    env, found = dict(run.env), []
    _run(run, step, leave, iter(()), until=(node, lambda: found.append(_plain(run.env[source]))))
    run.env = env
    return found[0]


def _rows_of(x: Tensor, ends: Tensor | None, expert: int) -> Tensor:
    """The rows of one expert [rows, in]; where every expert gets all tokens, those that are not zero."""
    if ends is None:
        return x[expert][x[expert].any(-1)]
    start, end = [0, *ends.tolist()][expert : expert + 2]
    return x[start:end]


def _visit_experts(
    read: Read,
    node: Node,
    runs: Sequence[Interpreter],
    see: Callable[[Interpreter], Tensor],
    visit: Visit,
    every_token: Sequence[Tensor | None] | None,
) -> bool:
    """Visit one expert after the other; was padding left out?

    every_token: the masks of padding where each is to be told of as if every token came to it.
    """
    ends = read.offsets
    told = every_token is not None
    for e in range(read.experts or 0):
        rows = None if every_token is None else _inputs_of_all(runs, node, e, every_token)
        every = rows is not None
        if rows is None:
            told = False
            rows = [_rows_of(see(run), None if ends is None else run.env[ends], e) for run in runs]
        found, _ = _second_moments([rows], [None] * len(rows))
        visit(read.name, *found, expert=Expert(e, sum(map(len, rows)), every))
    return told


def _inputs_of_all(
    runs: Sequence[Interpreter], node: Node, expert: int, masks: Sequence[Tensor | None]
) -> list[Tensor] | None:
    """The real rows of every run if all went to one expert; None where that cannot be told."""
    try:
        found = [inputs_of_expert(run, node, expert) for run in runs]
    except CannotTell:
        return None
    return [x if (rows := real_rows(x, mask)) is None else rows for x, mask in zip(found, masks, strict=True)]


def _plain(value: Tensor) -> Tensor:
    while torch._C._functorch.is_batchedtensor(value):
        level = torch._C._functorch.maybe_get_level(value)
        value, dim = torch._C._functorch._unwrap_batched(value, level)
        value = value.movedim(dim or 0, 0)
    return value


def _second_moments(found: Sequence[Iterable[Tensor]], masks: Iterable[Tensor | None]) -> tuple[list[Tensor], bool]:
    """X^T X / rows over the real rows of all inputs X, which come first; with a second group of inputs Z, Z^T X / rows;
    and whether it is known which rows are real."""
    totals: list[Tensor] = []
    tokens, told = 0, True
    for *group, mask in zip(*found, masks, strict=True):
        known = [real_rows(x, mask) for x in group]
        told &= known[0] is not None
        rows = [(x.reshape(-1, x.shape[-1]) if k is None else k).float() for x, k in zip(group, known, strict=True)]
        products = [z.t() @ rows[0] for z in rows]
        totals = [t.add_(p) for t, p in zip(totals, products, strict=True)] if totals else products
        tokens += rows[0].shape[0]
    return [total / max(1, tokens) for total in totals], told


def flat_inputs(module: GraphModule, batch: Any) -> list:
    """A batch in the order of the module's placeholders."""
    if isinstance(batch, Reading):
        return pytree.tree_leaves((batch.args, batch.kwargs))
    args, kwargs = as_call(batch)
    _, names = call_signature(module.graph._codegen.pytree_info.in_spec)  # type: ignore[attr-defined]
    # the exported order of keyword inputs, not the caller's
    return pytree.tree_leaves((args, {k: kwargs[k] for k in names} if kwargs else {}))


def last_uses(module: GraphModule, kept: Mapping[Node, list[Node]]) -> dict[Node, list[Node]]:
    """Node -> whose values nothing reads after it; ``kept``: what a node needs beside its inputs."""
    last: dict[Node, list[Node]] = {}
    seen: set[Node] = set()
    for node in reversed(module.graph.nodes):
        for used in (*node.all_input_nodes, *kept.get(node, ())):
            if used not in seen:
                seen.add(used)
                last.setdefault(node, []).append(used)
        if node.op != "output" and not node.users:
            last.setdefault(node, []).append(node)
    return last
