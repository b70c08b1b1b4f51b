"""What a run works on: the data as batches, the captured model, its sites, and what is said of the first batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sparseforge_fx.data.batches import Batches
from sparseforge_fx.data.capturing import capture_for
from sparseforge_fx.data.opening import first_batches, open_batches, tell_length, tell_text
from sparseforge_fx.data.reading import Reader
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import as_call
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.config import MethodConfig
from sparseforge_fx.methods.one_shot import LayerwiseConfig
from sparseforge_fx.models.compute_dtype import dtype_of
from sparseforge_fx.models.dense import DTYPES
from sparseforge_fx.passes import LinearSite, find_linears
from sparseforge_fx.passes.globs import unmatched
from sparseforge_fx.training.checkpoint import find_state, load_plain
from sparseforge_fx.training.first_batch import check_batch, check_ids
from sparseforge_fx.training.in_parts import InParts
from sparseforge_fx.training.objective import Objective
from sparseforge_fx.training.planned import planned_sites
from sparseforge_fx.training.prepare import check_sites
from sparseforge_fx.training.recipe import Recipe
from sparseforge_fx.training.teacher import check_same, weights_of


@dataclass
class Run:
    """What :func:`open_run` gives. ``data`` is what was given, ``batches`` what became of it (None: nothing is looked
    at); ``notes`` is the report's list; ``accumulate`` are the micro-batches of a process in a step; ``taught_by`` are
    the weights of a teacher that was given; ``in_parts``: where the weights are while they are on disk."""

    program: Exported
    sites: list[LinearSite]
    reader: Reader
    data: Any
    batches: Batches | None
    notes: list[str]
    accumulate: int
    taught_by: dict[str, Tensor] | None = None
    in_parts: InParts | None = None

    def tensors(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None]:
        """The model's, and the parameters of a teacher that was given, wherever they are; by the program's names."""
        if self.in_parts is not None:
            return self.in_parts.weights(self.program), self.in_parts.teachers(self.program)
        return self.program.state, self.taught_by

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
    state_path: str | Path | None = None,
) -> Run:
    """Read the data as far as the run needs it, capture the model, find its sites, try the first batch (of a model on
    disk, look at its token ids).

    Raises SparseForgeError for whatever does not fit, before a weight changes.
    """
    torch.manual_seed(recipe.seed)
    batches, count = None, 1 if accelerator is None else accelerator.num_processes
    begun = Path(state_path) if state_path is not None and isinstance(config, TrainedConfig) else None
    accumulate, told = _micro_batches(recipe, count, begun)
    if in_parts is not None:
        tokenizer = in_parts.model.tokenizer if tokenizer is None else tokenizer
    if isinstance(config, TrainedConfig | LayerwiseConfig):
        needed = _tokens_needed(recipe, config, accumulate * count)
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
    program = capture_for(model, None if batches is None else batches.batch(0), example_inputs)
    planned: list[str] = []
    if recipe.plan is None:
        sites = find_linears(program, config.pattern, recipe.include, recipe.exclude)
        told += unmatched(model, include=recipe.include, exclude=recipe.exclude)
    else:
        sites, planned = planned_sites(program, recipe.plan, config.pattern)
    check_sites(program, sites)
    unread = tell_text(data, batches, recipe.text_column)
    notes = [*told, *program.notes, *planned, *unread, *tell_length(data, batches, recipe.length)]
    if recipe.dtype is not None and DTYPES.get(recipe.dtype) != (own := dtype_of(model)):
        notes.append(f"dtype {recipe.dtype} is for the command line: the model given computes in {own}")
    learns = isinstance(config, TrainedConfig)
    reader = Reader(program, labels=learns)
    if in_parts is not None:
        assert batches is not None
        check_ids(model, reader.read(*as_call(batches.batch(0))))
        if in_parts.teacher is not None:
            check_same(in_parts.teacher.skeleton, program)
        in_parts.stand_in(program)
        return Run(program, sites, reader, data, batches, notes, accumulate, in_parts=in_parts)
    if batches is not None:
        objective = Objective(recipe.settings(True).objective, getattr(model, "config", None), reader.note)
        check_batch(program, reader, objective if learns else None, batches.batch(0))
    taught_by = None if teacher is None else weights_of(teacher, program)
    return Run(program, sites, reader, data, batches, notes, accumulate, taught_by)


def _tokens_needed(recipe: Recipe, config: TrainedConfig | LayerwiseConfig, micro_batches: int) -> int:
    """Of text: no more is read than the run takes, of so many micro-batches a step."""
    if isinstance(config, LayerwiseConfig):
        return recipe.calibration * recipe.length
    if recipe.tokens is not None:
        return recipe.tokens
    return config.steps * recipe.batch_size * recipe.length * micro_batches


def _micro_batches(recipe: Recipe, count: int, state: Path | None) -> tuple[int, list[str]]:
    """How many micro-batches a process has in a step. A run that goes on on another number of processes has steps of as
    many as it began with, over all processes, and a note says so."""
    begun: Any = {} if state is None or find_state(state) is None else load_plain(state).get("run")
    whole = begun.get("micro_batches") if isinstance(begun, dict) else None
    mine = recipe.accumulate * count
    if not isinstance(whole, int) or whole == mine or begun.get("accumulate") != recipe.accumulate:
        return recipe.accumulate, []  # what else differs is found when the state is read
    if whole % count:
        raise SparseForgeError(
            f"the run was begun with {whole} micro-batches a step, which {count} processes cannot share evenly: "
            f"go on with a number of processes that divides {whole}"
        )
    now = whole // count
    return now, [f"the run goes on on {count} processes, with {now} micro-batches in each of their steps"]
