"""What a run works on: the data as batches, the captured model, its sites, and what is said of the first batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sparseforge_fx.data.batches import Batches, is_text
from sparseforge_fx.data.opening import first_batches, is_self, open_batches, tell_length
from sparseforge_fx.data.reading import Reader
from sparseforge_fx.data.sources import unused_text
from sparseforge_fx.graph.capture import as_call, capture
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.config import MethodConfig
from sparseforge_fx.methods.one_shot import LayerwiseConfig
from sparseforge_fx.models.compute_dtype import dtype_of
from sparseforge_fx.models.dense import DTYPES
from sparseforge_fx.passes import LinearSite, find_linears
from sparseforge_fx.training.first_batch import check_batch, check_ids, example_inputs_of
from sparseforge_fx.training.in_parts import InParts
from sparseforge_fx.training.objective import Objective
from sparseforge_fx.training.planned import planned_sites
from sparseforge_fx.training.prepare import check_sites
from sparseforge_fx.training.recipe import Recipe
from sparseforge_fx.training.teacher import check_same, weights_of


@dataclass
class Run:
    """What :func:`open_run` gives. ``data`` is what was given, ``batches`` what became of it (None: nothing is looked
    at); ``notes`` is the report's list; ``taught_by`` are the weights of a teacher that was given; ``in_parts``: where
    the weights are while they are on disk."""

    program: Exported
    sites: list[LinearSite]
    reader: Reader
    data: Any
    batches: Batches | None
    notes: list[str]
    taught_by: dict[str, Tensor] | None = None
    in_parts: InParts | None = None

    def first(self, sequences: int) -> list[Any]:
        """The first batches that hold so many sequences, none twice; a note where the data has fewer."""
        assert self.batches is not None
        chosen, told = first_batches(self.batches, sequences)
        self.notes += told
        return chosen


def open_run(
    model: nn.Module,
    data: Any,
    recipe: Recipe,
    config: MethodConfig,
    accelerator: Accelerator | None,
    *,
    tokenizer: Any,
    cache_dir: str | Path | None,
    example_inputs: Any,
    teacher: nn.Module | None = None,
    in_parts: InParts | None = None,
) -> Run:
    """Read the data as far as the run needs it, capture the model, find its sites, try the first batch (of a model on
    disk, look at its token ids).

    Raises SparseForgeError for whatever does not fit, before a weight changes.
    """
    torch.manual_seed(recipe.seed)
    batches = None
    if in_parts is not None:
        tokenizer = in_parts.model.tokenizer if tokenizer is None else tokenizer
    if isinstance(config, TrainedConfig | LayerwiseConfig):
        needed = _tokens_needed(recipe, config, accelerator)
        batches = open_batches(
            model,
            data,
            tokenizer,
            tokens=needed,
            batch_size=recipe.batch_size,
            length=recipe.length,
            seed=recipe.seed,
            cache_dir=cache_dir,
            text_column=recipe.text_column,
            separator=recipe.separator,
        )
        if example_inputs is None:
            example_inputs = example_inputs_of(model, batches.batch(0))
    program = capture(model, example_inputs)
    planned: list[str] = []
    if recipe.plan is None:
        sites = find_linears(program, config.pattern, recipe.include, recipe.exclude)
    else:
        sites, planned = planned_sites(program, recipe.plan, config.pattern)
    check_sites(program, sites)
    unread = unused_text(data, recipe.text_column) if is_text(data) and not is_self(data) else ()
    notes = [*program.notes, *planned, *unread, *tell_length(data, batches, recipe.length)]
    if recipe.dtype is not None and DTYPES.get(recipe.dtype) != (own := dtype_of(model)):
        notes.append(f"dtype {recipe.dtype} is for the command line: the model given computes in {own}")
    reader = Reader(program)
    if in_parts is not None:
        assert batches is not None
        check_ids(model, reader.read(*as_call(batches.batch(0))))
        if in_parts.teacher is not None:
            check_same(in_parts.teacher.skeleton, program)
        in_parts.stand_in(program)
        return Run(program, sites, reader, data, batches, notes, in_parts=in_parts)
    if batches is not None:
        objective = Objective(recipe.settings(True).objective, getattr(model, "config", None), reader.note)
        check_batch(program, reader, objective, batches.batch(0))
    return Run(program, sites, reader, data, batches, notes, None if teacher is None else weights_of(teacher, program))


def _tokens_needed(recipe: Recipe, config: TrainedConfig | LayerwiseConfig, accelerator: Accelerator | None) -> int:
    """Of text: no more is read than the run takes."""
    if isinstance(config, LayerwiseConfig):
        return recipe.calibration * recipe.length
    if recipe.tokens is not None:
        return recipe.tokens
    processes = accelerator.num_processes if accelerator is not None else 1
    return config.steps * recipe.batch_size * recipe.length * recipe.accumulate * processes
