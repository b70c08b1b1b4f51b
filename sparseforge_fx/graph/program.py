"""The one representation that passes edit, whatever stands behind it: a graph, and the tensors that its inputs are.

Passes never touch placeholders or a signature by hand: they add, drop, insert and replace through this interface, so
that graph, signature and tensors stay in step. Two things stand behind it: a program of ``torch.export``
(``exported.py``), and a graph that Dynamo captured (``frame.py``).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Self

from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node

from sparseforge_fx.errors import SparseForgeError


class Program(ABC):
    """A captured model under edit.

    Args:
        source: the nn.Module it came from; its Parameters are the program's Parameters (same objects).
        notes: facts about the capture that the user must know (a dimension that had to be fixed, ...).
    """

    def __init__(self, source: nn.Module | None = None, notes: tuple[str, ...] = ()):
        self.source = source
        self.notes = notes

    # -- reading ---------------------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def graph_module(self) -> GraphModule:
        """What owns the graph, and the subgraphs that it calls (the branches of ``torch.cond``)."""

    @property
    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by fully qualified name; the tensors themselves, not copies."""

    @abstractmethod
    def lifted(self, *kinds: InputKind) -> Iterator[tuple[Node, str, Tensor]]:
        """(placeholder, fully qualified name, tensor) of the parameters, buffers and constants of these kinds, or of
        all, in graph order."""

    @abstractmethod
    def user_inputs(self) -> list[Node]:
        """The placeholders of what a caller gives, in graph order."""

    @property
    def graph(self) -> Graph:
        return self.graph_module.graph

    def tensor(self, fqn: str) -> Tensor:
        """The parameter, buffer or constant of that name."""
        return self.state[fqn]

    def names(self, *kinds: InputKind) -> dict[Node, str]:
        """Placeholder -> fully qualified name, of what :meth:`lifted` gives."""
        return {node: fqn for node, fqn, _ in self.lifted(*kinds)}

    def node(self, name: str) -> Node:
        """The node of that name. Raises SparseForgeError if the graph has none."""
        for node in self.graph.nodes:
            if node.name == name:
                return node
        raise SparseForgeError(f"the graph has no node '{name}': find the linears of this very program first")

    def op_counts(self) -> Counter[str]:
        """How often each operator stands in the graph, by its full name (``aten.linear.default``)."""
        return Counter(str(n.target) for n in self.graph.nodes if n.op == "call_function")

    # -- editing ---------------------------------------------------------------------------------------------------
    @abstractmethod
    def copy(self) -> Self:
        """A program with its own graph over the SAME tensors."""

    @abstractmethod
    def add_parameter(self, fqn: str, value: Tensor, *, requires_grad: bool = True) -> Node:
        """Lift a new parameter; returns its placeholder."""

    @abstractmethod
    def add_buffer(self, fqn: str, value: Tensor) -> Node:
        """Lift a new persistent buffer; returns its placeholder."""

    @abstractmethod
    def drop(self, placeholder: Node) -> None:
        """Remove a lifted tensor that nothing reads any more."""

    def insert_before(self, node: Node, target: Callable, *args: Any, value: Any = None) -> Node:
        """Call ``target`` in front of ``node``, under its module stack.

        ``value``: the fake value of the result; None: what ``target`` makes of those of its arguments.
        """
        with self.graph.inserting_before(node):
            return _call_like(node, target, args, value)

    def insert_after(self, node: Node, target: Callable, *args: Any, value: Any = None) -> Node:
        """Call ``target`` right behind ``node``; the rest as for :meth:`insert_before`."""
        with self.graph.inserting_after(node):
            return _call_like(node, target, args, value)

    def redirect(self, old: Node, new: Node) -> None:
        """Let whatever reads ``old``, the program's outputs too, read ``new`` instead, but for ``new`` itself."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def replace(self, old: Node, new: Node) -> None:
        """Let ``new`` stand where ``old`` stood: readers, metadata (module stack included) and outputs."""
        new.meta = copy.copy(old.meta) | {k: v for k, v in new.meta.items() if k == "val"}
        self.redirect(old, new)
        self.graph.erase_node(old)

    @abstractmethod
    def validate(self) -> None:
        """Lint the graph, check it against its signature, regenerate its code."""

    # -- running ---------------------------------------------------------------------------------------------------
    @abstractmethod
    def module(self) -> GraphModule:
        """A GraphModule over this program's tensors."""


def _call_like(like: Node, target: Callable, args: tuple, value: Any) -> Node:
    node = like.graph.call_function(target, args)
    if value is None:
        with enable_python_dispatcher():  # in C++ some operators ask for sizes as numbers, which would fix them (2.11)
            value = target(*_values(args))
    node.meta = {**like.meta, "val": value}
    return node


def _values(args: Any) -> Any:
    if isinstance(args, list | tuple):
        return type(args)(_values(a) for a in args)
    return args.meta["val"] if isinstance(args, Node) else args
