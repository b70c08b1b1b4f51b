"""Walk a graph node by node with all calibration batches in step, stopping at every weight that is to be pruned.

Each node is computed once per batch, and each layer sees inputs that the already pruned layers before it produced.
What is alive at one point of the graph is all the memory that it takes, whatever the depth.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from sparseforge_fx.capture import as_call
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.program import Program

#: called at the first use of a weight, before the node runs, with its name and [in, in] X^T X / tokens; may write the
#: weight
Visit = Callable[[str, Tensor], None]


@torch.no_grad()
def layer_by_layer(
    module: GraphModule, weights: Mapping[Node, tuple[str, int]], batches: Sequence, visit: Visit
) -> None:
    """Run ``batches`` through ``module`` in lock step and ``visit`` each weight with its inputs' second moments.

    Args:
        module: a flat GraphModule (``Program.module()``).
        weights: node that multiplies by a weight -> (the weight's name, argument index of the node's input).
            A weight with several nodes is visited at the first.
        batches: the calibration inputs, each in any form that the model takes.
    """
    flat = [_flatten(module, batch) for batch in batches]
    runs = [Interpreter(module, garbage_collect_values=False) for _ in batches]
    feeds = [iter(inputs) for inputs in flat]
    last = _last_uses(module)
    seen: set[str] = set()
    moments: dict[Node, Tensor] = {}
    for run in runs:
        run.env = {}
    for node in module.graph.nodes:
        if node.op == "output":
            break
        if node in weights and weights[node][0] not in seen:
            name, index = weights[node]
            seen.add(name)
            source = node.args[index]
            if source not in moments:
                moments[source] = _second_moment(run.env[source] for run in runs)
            visit(name, moments[source])
        for index, (run, feed) in enumerate(zip(runs, feeds, strict=True)):
            try:
                run.env[node] = next(feed) if node.op == "placeholder" else run.run_node(node)
            except (AssertionError, IndexError) as error:  # a size or a token that the model does not take
                raise SparseForgeError(f"calibration batch {index} does not fit the model: {error}") from error
        for dead in last.get(node, ()):
            moments.pop(dead, None)
            for run in runs:
                run.env.pop(dead, None)


def _second_moment(inputs) -> Tensor:
    total, tokens = None, 0
    for x in inputs:
        x2 = x.reshape(-1, x.shape[-1]).float()
        product = x2.t() @ x2
        total = product if total is None else total.add_(product)
        tokens += x2.shape[0]
    assert total is not None
    return total / max(1, tokens)


def _flatten(module: GraphModule, batch) -> list:
    args, kwargs = as_call(batch)
    _, names = call_signature(module.graph._codegen.pytree_info.in_spec)  # type: ignore[attr-defined]
    # the exported order of keyword inputs, not the caller's
    return pytree.tree_leaves((args, {k: kwargs[k] for k in names} if kwargs else {}))


def call_signature(in_spec: pytree.TreeSpec | None) -> tuple[int, list[str]]:
    """How many positional inputs an exported program takes, and the names of its keyword inputs in their order."""
    if in_spec is None:
        return 0, []
    positional, keyword = in_spec.children() if hasattr(in_spec, "children") else in_spec.children_specs
    return positional.num_children, list(keyword.context or ())


def bind(program: Program, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any], dict[str, Any]]:
    """What a captured program takes out of a batch: positional inputs, keyword inputs; and the whole batch by name.

    Inputs find their places by the names of the model's forward, however they were given and however the model was
    captured; what the program does not take is left out. Raises SparseForgeError if it lacks something, or if padding
    would be taken for text.
    """
    if args and isinstance(args[0], Mapping):
        args, kwargs = (), {**args[0], **kwargs}  # type: ignore[misc]
    count, wanted = call_signature(program.exported.call_spec.in_spec)
    names = _positional_names(program.source, max(count, len(args)))
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    captured = [*names[:count], *wanted]
    missing = [n for n in captured if n not in given]
    if missing:
        raise SparseForgeError(f"the batch lacks {', '.join(missing)}, which the model was captured with")
    mask = given.get("attention_mask")
    if "attention_mask" not in captured and mask is not None and bool((mask == 0).any()):
        raise SparseForgeError(
            "the batch is padded but the model was captured without attention_mask: put one into example_inputs"
        )
    return tuple(given[n] for n in names[:count]), {n: given[n] for n in wanted}, given


def _positional_names(model: nn.Module | None, count: int) -> list[str]:
    """Names of the first ``count`` positional inputs of a model's forward; *args have a number each."""
    names: list[str] = []
    for name, parameter in inspect.signature(model.forward).parameters.items() if model is not None else ():
        if parameter.kind == parameter.VAR_POSITIONAL:
            names += [f"{name}[{i}]" for i in range(count)]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(name)
    return names[:count]


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
