"""Sizes of a graph's values as numbers: where the graph takes any, those of its example."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.fx import Node


def hint(size: int | torch.SymInt) -> int:
    """To ask a symbol for its number would pin it."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def numel(value: Tensor) -> int:
    return math.prod(map(hint, value.shape))


def rows(node: Node) -> int:
    """Of what the node gives, [..., features]."""
    value = node.meta["val"]
    return numel(value) // hint(value.shape[-1])
