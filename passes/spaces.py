"""Spaces of vectors in a graph: what writes them, what reads them, and what is between (find_rotations.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Axis(NamedTuple):
    """A dimension of a tensor along which there are vectors of a space."""

    fqn: str
    dim: int


class Norm(NamedTuple):
    """Vectors are multiplied by ``scale + offset`` and ``shift`` is added, if there is one, before they are read.

    Attributes:
        readers: what reads them, and nothing else does.
    """

    scale: str
    offset: float
    shift: str | None
    readers: tuple[Axis, ...]


class Rotation(NamedTuple):
    """A space whose vectors may be turned by any orthogonal matrix together.

    Attributes:
        width: of its vectors.
        axes: everything that turns: what writes and what reads.
        readers: of these, the weights that read, by the node that multiplies by them.
        norms: with scales that have to go first.
        centred: the matrix must leave the vector of ones as it is.
    """

    width: int
    axes: tuple[Axis, ...]
    readers: dict[str, Axis]
    norms: tuple[Norm, ...]
    centred: bool

    @property
    def names(self) -> list[str]:
        """Of every tensor that is written."""
        norms = {fqn for norm in self.norms for fqn in (norm.scale, norm.shift) if fqn is not None}
        return sorted(norms | {axis.fqn for axis in self.axes})


@dataclass
class Space:
    """A space while the graph is read; those that meet in a sum are joined, and :meth:`root` is what became of them."""

    width: int
    axes: list[Axis] = field(default_factory=list)
    readers: dict[str, Axis] = field(default_factory=dict)
    norms: list[Scaled] = field(default_factory=list)
    centred: bool = False
    reason: str | None = None
    summed: bool = False  # the reason is a sum with something else, as in a residual stream
    joined: Space | None = None

    def root(self) -> Space:
        return self if self.joined is None else self.joined.root()

    def join(self, other: Space) -> None:
        mine, its = self.root(), other.root()
        if mine is its:
            return
        mine.axes += its.axes
        mine.readers |= its.readers
        mine.norms += its.norms
        mine.centred |= its.centred
        mine.reason = mine.reason or its.reason
        mine.summed |= its.summed
        its.joined = mine

    def spoil(self, reason: str, summed: bool = False) -> None:
        """It cannot turn; the first reason stays."""
        root = self.root()
        root.summed |= summed and root.reason is None
        root.reason = root.reason or reason


@dataclass
class Scaled:
    """A :class:`Norm` while the graph is read."""

    scale: str
    offset: float
    shift: str | None = None
    readers: list[Axis] = field(default_factory=list)


class Vectors(NamedTuple):
    """A value whose dimension ``dim``, from the end, has vectors of a space; scaled by a norm, or squared."""

    space: Space
    dim: int
    norm: Scaled | None = None
    squared: bool = False

    @property
    def plain(self) -> bool:
        return self.norm is None and not self.squared


class Table(NamedTuple):
    """A parameter, as it is or plus a number, whose only reader is this value's."""

    fqn: str
    offset: float = 0.0
