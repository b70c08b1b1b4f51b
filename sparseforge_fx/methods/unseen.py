"""Inputs that no calibration token ever set (an expert that was never chosen, a unit that never fired): data says
nothing of their weights, so magnitude does. That they cost nothing on this data is no reason to delete them all."""

from __future__ import annotations

import torch
from torch import Tensor


def unseen(moments: Tensor) -> Tensor:
    """Which inputs [in] were zero in every token, by X^T X [in, in]."""
    return moments.diagonal() <= 0


def rank_unseen(scores: Tensor, weight: Tensor, dead: Tensor) -> Tensor:
    """``scores`` (>= 0) [out, in], with the weights of ``dead`` inputs [in] below all others, by magnitude."""
    if not bool(dead.any()):
        return scores
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(dead, -1 / (weight.float().square() + tiny), scores)


def tell_unseen(moments: Tensor) -> str:
    """What the report says of a layer with such inputs; empty for one without."""
    dead = int(unseen(moments).sum())
    if dead == len(moments):
        return "saw no calibration token: pruned by magnitude"
    return (
        f"{dead} of {len(moments)} inputs are zero in all calibration tokens: magnitude decides there" if dead else ""
    )
