"""Analysis: between which operators vectors may be rotated without changing what the model computes. Changes nothing.

What linears and embeddings write and linears read, with nothing between but sums, norms and moves (the residual stream
of a model that norms before its blocks), can be turned by any orthogonal matrix: it cancels between those that write
and those that read, and a norm does not see it. The scale of a norm does; it goes into what reads it first. A
LayerNorm takes the mean away, so that there the matrix must leave the vector of ones as it is. As in SliceGPT (arXiv
2401.15024, section 3) and QuaRot (2404.00456); found here by following vectors through any graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.fx.node import map_arg

from sparseforge_fx.graph.program import Program
from sparseforge_fx.passes.aliases import Elsewhere
from sparseforge_fx.passes.find_channels import COPIES, plain_sizes
from sparseforge_fx.passes.find_linears import LinearSite
from sparseforge_fx.passes.globs import Globs
from sparseforge_fx.passes.operators import LINEAR_OPS, MOVES, op_name
from sparseforge_fx.passes.spaces import Axis, Norm, Rotation, Scaled, Space, Table, Vectors

SCALINGS = {"mul", "div"}
SUMS = {"add", "sub"}
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "convolution"}
NORMS = {"layer_norm": 4, "rms_norm": 3}  # behind the last argument that is a parameter


def find_rotations(program: Program, sites: list[LinearSite], exclude: Globs = ()) -> tuple[list[Rotation], list[str]]:
    """The spaces of ``program`` that may be rotated, and why others that could be, or that are normed, may not.

    Args:
        sites: every matrix that linears multiply by (``find_linears``, whatever its reasons).
        exclude: globs over names of what the graph does not read, and what need not go with the rotated vectors.
    """
    found = _Finder(program, sites)
    elsewhere = Elsewhere(program, exclude)
    spaces = {id(root): root for space in found.spaces if (root := space.root())}
    rotations, held, reasons = [], [], []
    for space in spaces.values():
        if space.reason is None and space.readers and len(space.axes) > len(space.readers):
            norms = tuple(Norm(n.scale, n.offset, n.shift, tuple(n.readers)) for n in space.norms)
            shifts = [Axis(norm.shift, 0) for norm in norms if norm.shift is not None]
            rotation = Rotation(space.width, (*space.axes, *shifts), space.readers, norms, space.centred)
            if (reason := elsewhere.shares({fqn: program.tensor(fqn) for fqn in rotation.names})) is not None:
                held.append(reason)
            elif (reason := elsewhere.may_see(space.width)) is not None:
                held.append(f"{reason}: give batches that use it, or exclude it by name to leave it as it is")
            else:
                rotations.append(rotation)
        elif space.reason is not None and (space.norms or space.summed):
            reasons.append(space.reason)
    return rotations, list(dict.fromkeys([*held, *reasons]))


class _Finder:
    """Follows vectors through a graph, once."""

    def __init__(self, program: Program, sites: list[LinearSite]):
        self.names = program.names(InputKind.PARAMETER)
        self.tensors = {fqn: value for _, fqn, value in program.lifted(InputKind.PARAMETER)}
        storages = Counter(value.untyped_storage()._cdata for _, _, value in program.lifted())
        self.alone = {fqn for fqn, value in self.tensors.items() if storages[value.untyped_storage()._cdata] == 1}
        self.by_node = {use.node: (site, use) for site in sites for use in site.uses}
        self.values: dict[Node, Vectors | Table] = {}
        self.spaces: list[Space] = []
        for node in program.graph.nodes:
            if node.op == "placeholder":
                if self.names.get(node) in self.alone and len(node.users) == 1:
                    self.values[node] = Table(self.names[node])
            elif node.op == "output":
                for value in self._followed(node):
                    value.space.spoil("the model returns its vectors")
            elif isinstance(node.meta.get("val"), Tensor) or op_name(node) in MOVES:
                self._step(node)

    def _followed(self, node: Node) -> Iterator[Vectors]:
        return (v for n in node.all_input_nodes if isinstance(v := self.values.get(n), Vectors))

    def _step(self, node: Node) -> None:
        if op_name(node) == "_assert_tensor_metadata":
            return
        found = self._through(node)
        if found is None:
            for value in self._followed(node):
                summed = op_name(node) in SUMS
                told = "adds what does not turn" if summed else "does more than sums, norms and moves"
                value.space.spoil(f"{node.target} {told} ({node.name})", summed)
        elif isinstance(found, Vectors | Table):
            self.values[node] = found

    def _through(self, node: Node) -> Any:
        """What comes out; True: nothing that has to be followed; None: its inputs are read in an unknown way."""
        name = op_name(node)
        first = self.values.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
        if node.name in self.by_node:
            return self._linear(node)
        if name == "embedding":
            return self._written([(node.args[0], -1)], -1, node)
        if name in CONVOLUTIONS:
            return None if isinstance(first, Vectors) else self._convolution(node)
        if isinstance(first, Table) and len(node.users) == 1:
            if name in COPIES:
                return first
            if name == "add" and isinstance(node.args[1], int | float) and self.tensors[first.fqn].dim() == 1:
                return first._replace(offset=first.offset + node.args[1])
        if name in MOVES or name == "dropout":
            return self._moved(node, first)
        if name == "cat":
            return self._joined(node, node.args[0])
        if name in SUMS:
            return self._sum(node)
        if name in SCALINGS:
            return self._scaled(node)
        if name in NORMS:
            return self._normed(node, first)
        if isinstance(first, Vectors):
            return self._measured(node, name, first)
        return None

    # -- writers and readers -------------------------------------------------------------------------------------------
    def _new(self, width: int, axes: list[Axis]) -> Space:
        self.spaces.append(Space(width, axes))
        return self.spaces[-1]

    def _written(self, tables: list[tuple[Any, int]], dim: int, node: Node) -> Any:
        """Vectors of a new space, computed from parameters alone along these dimensions."""
        axes = []
        for argument, along in tables:
            table = self.values.get(argument)
            if not isinstance(table, Table) or table.offset:
                return True
            axes.append(Axis(table.fqn, along % self.tensors[table.fqn].dim()))
        return Vectors(self._new(int(node.meta["val"].shape[dim]), axes), dim)

    def _linear(self, node: Node) -> Any:
        site, use = self.by_node[node.name]
        given, _, _ = LINEAR_OPS.get(node.target, (0, 1, False))
        x = self.values.get(node.args[given])  # type: ignore[arg-type]
        alone = len(site.uses) == 1 and not site.readers and len(site.shape) == 2 and site.fqn in self.alone
        if isinstance(x, Vectors):
            if not alone or use.left or x.squared or x.dim != -1 or node.target not in LINEAR_OPS:
                return None
            axis = Axis(site.fqn, site.reduction_dim)
            root = x.space.root()
            root.axes.append(axis)
            root.readers[node.name] = axis
            if x.norm is not None:
                x.norm.readers.append(axis)
        if not alone or use.left or node.target not in LINEAR_OPS:
            return True
        axes = [Axis(site.fqn, 1 - site.reduction_dim)]
        bias = self._bias(node)
        if bias is not None:
            table = self.values.get(bias)
            if not isinstance(table, Table) or table.offset or self.tensors[table.fqn].dim() != 1:
                return True
            axes.append(Axis(table.fqn, 0))
        return Vectors(self._new(site.out_features, axes), -1)

    @staticmethod
    def _bias(node: Node) -> Any:
        if node.target == torch.ops.aten.addmm.default:
            return node.args[0]
        return node.args[2] if node.target == torch.ops.aten.linear.default and len(node.args) > 2 else None

    def _convolution(self, node: Node) -> Any:
        tables = [(n, 0) for n in node.args[1:3] if isinstance(n, Node)]
        return self._written(tables, 1 - node.meta["val"].dim(), node)

    # -- moves and sums ------------------------------------------------------------------------------------------------
    def _moved(self, node: Node, first: Any) -> Any:
        """By the numbers of the vectors' entries: they must lie along one dimension still."""
        if isinstance(first, Table):
            width = self.tensors[first.fqn].shape[-1]
            if first.offset or self.tensors[first.fqn].dim() < 2:
                return True
            first = Vectors(self._new(width, [Axis(first.fqn, self.tensors[first.fqn].dim() - 1)]), -1)
        if not isinstance(first, Vectors):
            return True
        source = node.args[0]
        if op_name(node) in COPIES or op_name(node) == "dropout":
            return first
        if not isinstance(node.meta.get("val"), Tensor) or any(n is not source for n in _tensors(node)):
            return None
        rest, named = map_arg((node.args[1:], node.kwargs), lambda n: plain_sizes(n.meta["val"]))
        rest, named = plain_sizes((rest, named))
        shape = plain_sizes(tuple(source.meta["val"].shape))  # type: ignore[union-attr]
        numbers = torch.arange(shape[first.dim]).view([-1] + [1] * (-1 - first.dim)).expand(shape)
        moved = node.target(numbers.contiguous(), *rest, **named)  # type: ignore[operator]
        dim = _along(moved, shape[first.dim])
        return None if dim is None else first._replace(dim=dim)

    def _joined(self, node: Node, inputs: Any) -> Any:
        vectors = [self._vectors(n) for n in inputs]
        if any(v is None or not v.plain or v.dim != vectors[0].dim for v in vectors):  # type: ignore[union-attr]
            return None
        dim = node.args[1] if len(node.args) > 1 else 0
        rank = node.meta["val"].dim()
        if dim % rank == vectors[0].dim % rank:  # type: ignore[union-attr, operator]
            return None
        return self._one(vectors)

    def _vectors(self, node: Any) -> Vectors | None:
        """Of what is followed, or of a parameter with vectors along its last dimension."""
        value = self.values.get(node)
        if isinstance(value, Table):
            if value.offset:
                return None
            shape = self.tensors[value.fqn].shape
            return Vectors(self._new(shape[-1], [Axis(value.fqn, len(shape) - 1)]), -1)
        return value

    @staticmethod
    def _one(vectors: list[Any]) -> Vectors:
        for other in vectors[1:]:
            vectors[0].space.join(other.space)
        return vectors[0]

    def _sum(self, node: Node) -> Any:
        operands = list(node.args[:2])
        followed = [n for n in operands if isinstance(self.values.get(n), Vectors)]  # type: ignore[arg-type]
        if not followed:
            return True
        value = self.values[followed[0]]  # type: ignore[index]
        assert isinstance(value, Vectors)
        other: Any = operands[1 - operands.index(followed[0])]
        if not isinstance(other, Node):
            return None
        if value.norm is not None and value.norm.shift is None and len(followed) == 1:
            table = self.values.get(other)
            if isinstance(table, Table) and not table.offset and op_name(node) == "add":
                value.norm.shift = table.fqn
                return value
        if not value.plain:
            return None
        if len(followed) == 1 and _is_one(other.meta["val"], value.dim):  # what is taken away from every entry
            value.space.root().centred = True
            return value
        vectors = [value, self._vectors(other)]
        if vectors[1] is None or not vectors[1].plain or vectors[1].dim != value.dim:
            return None
        if vectors[1].space.root().width != value.space.root().width:
            return None
        return self._one(vectors)

    # -- norms ---------------------------------------------------------------------------------------------------------
    def _scaled(self, node: Node) -> Any:
        """A product with itself, with one number for each vector, or with a norm's scale."""
        left, right = node.args[:2]
        vectors = [n for n in (left, right) if isinstance(self.values.get(n), Vectors)]  # type: ignore[arg-type]
        if not vectors:
            return True
        value = self.values[vectors[0]]  # type: ignore[index]
        assert isinstance(value, Vectors)
        if left is right:
            return value._replace(squared=True) if value.plain and op_name(node) == "mul" else None
        if len(vectors) > 1 or (op_name(node) == "div" and vectors[0] is not left):
            return None
        other: Any = right if vectors[0] is left else left
        if not isinstance(other, Node) or _is_one(other.meta["val"], value.dim):
            return value
        table = self.values.get(other)
        shaped = isinstance(table, Table) and self.tensors[table.fqn].dim() == 1 and value.dim == -1
        if not shaped or not value.plain or op_name(node) != "mul":
            return None
        assert isinstance(table, Table)
        return self._with_norm(value, Scaled(table.fqn, table.offset))

    def _with_norm(self, value: Vectors, norm: Scaled) -> Vectors:
        value.space.root().norms.append(norm)
        return value._replace(norm=norm)

    def _normed(self, node: Node, first: Any) -> Any:
        if not isinstance(first, Vectors):
            return True
        if not first.plain or first.dim != -1 or list(node.args[1]) != [first.space.root().width]:  # type: ignore[arg-type]
            return None
        if op_name(node) == "layer_norm":
            first.space.root().centred = True
        given = node.args[2 : NORMS[op_name(node)]]
        if not any(isinstance(n, Node) for n in (*given, *node.kwargs.values())):
            return first
        tables = [t for n in given if isinstance(n, Node) and isinstance(t := self.values.get(n), Table)]
        if len(tables) < sum(isinstance(n, Node) for n in given) or given[0] is None or node.kwargs:
            return None
        shift = tables[1].fqn if len(tables) > 1 else None
        return self._with_norm(first, Scaled(tables[0].fqn, tables[0].offset, shift))

    @staticmethod
    def _measured(node: Node, name: str, value: Vectors) -> Any:
        """Lengths and means of vectors, which are the same in any basis."""
        if not (value.plain or value.squared):
            return None
        if name == "square" or (name == "pow" and node.args[1] == 2):
            return value._replace(squared=True) if value.plain else None
        dims = node.args[1] if len(node.args) > 1 else None
        rank = node.all_input_nodes[0].meta["val"].dim()
        alone = isinstance(dims, list | tuple) and len(dims) == 1 and dims[0] % rank == value.dim % rank  # type: ignore[operator]
        if name in ("mean", "sum") and alone:
            if not value.squared:
                value.space.root().centred = True
            return True
        return None


def _tensors(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]


def _is_one(value: Any, dim: int) -> bool:
    """Has it one number for every vector?"""
    return isinstance(value, Tensor) and (value.numel() == 1 or value.dim() < -dim or value.shape[dim] == 1)


def _along(numbers: Any, width: int) -> int | None:
    """The dimension, from the end, along which they are 0, 1, ..., and the same along all others."""
    if not isinstance(numbers, Tensor) or not numbers.numel():
        return None
    for dim in range(-1, -numbers.dim() - 1, -1):
        wanted = torch.arange(width).view([-1] + [1] * (-1 - dim))
        if numbers.shape[dim] == width and torch.equal(numbers, wanted.expand(numbers.shape)):
            return dim
    return None
