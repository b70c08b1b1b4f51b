"""What ``sparsify`` works on: a model in memory or, where processes share it, a checkpoint that they read in parts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparseforge_fx.errors import SparseForgeError, one_line
from sparseforge_fx.methods.catalog import ONE_SHOT
from sparseforge_fx.methods.one_shot import LAYERWISE
from sparseforge_fx.models.companions import companions
from sparseforge_fx.models.compute_dtype import cast, dtype_of
from sparseforge_fx.models.dense import load_dense
from sparseforge_fx.models.streamed import StreamedModel
from sparseforge_fx.training.processes import Processes, largest
from sparseforge_fx.training.sharded import asked_for

if TYPE_CHECKING:
    from sparseforge_fx.training.recipe import Recipe


WHOLE_START = 16  # bytes of each parameter: the weight, its dense copy, what solves for it, activations beside that


def shares(recipe: Recipe) -> bool:
    """Do processes share the model of this run?"""
    return asked_for() and Processes().several and recipe.method not in ONE_SHOT


def has_room(model: torch.nn.Module, where: torch.device) -> bool:
    """Can every process of this machine hold all of a model, and what a layer-wise start needs beside it?"""
    import psutil

    if where.type == "cuda":
        free = torch.cuda.mem_get_info(where)[0]
    else:
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    (room,) = largest(where, -float(free))  # of the process that has least
    return WHOLE_START * sum(p.numel() for p in model.parameters()) < -room


class Opened:
    """``model`` for :func:`sparseforge_fx.sparsify`, its ``tokenizer``, the ``dtype`` of its weights, and what stands
    ``beside`` these.

    Processes that share a model read it in parts; but a layer-wise start does better in memory, so that where there is
    room for it each of them loads all, unless ``on_disk``.
    """

    def __init__(self, recipe: Recipe, where: torch.device, on_disk: bool = False):
        assert recipe.model is not None
        self._where, self._restore = where, lambda: None
        self.beside: list[Path] = []
        self.model: Any = None
        told = ""
        if shares(recipe):
            try:
                self.model = StreamedModel(recipe.model, where)
            except SparseForgeError as error:
                told = f"note: every process loads the whole model: {one_line(error)}"
        starts = getattr(recipe.config(recipe.data is not None), "start", None) in LAYERWISE
        if self.model is not None and starts and not on_disk and has_room(self.model.skeleton, where):
            self.model = None
        if self.model is None:
            self.model, self.tokenizer = load_dense(recipe.model)  # says what is wrong with the checkpoint itself
            self.dtype, self.beside = dtype_of(self.model), companions(recipe.model)
            if told and Processes().first:
                print(told, file=sys.stderr)
        else:
            self.tokenizer, self.dtype = self.model.tokenizer, dtype_of(self.model.skeleton)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Cast the model, and bring it to its device."""
        if isinstance(self.model, StreamedModel):
            self.model.compute_in(dtype)
            return
        self._restore = cast(self.model, dtype)
        self.model.to(self._where)

    def restore(self, made: Any) -> None:
        """Give what was made of it the checkpoint's dtype, on the CPU, if it is in memory."""
        if not isinstance(self.model, StreamedModel):
            self._restore()
            made.cpu()
