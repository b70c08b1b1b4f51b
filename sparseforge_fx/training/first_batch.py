"""What is found out about a run's first batch before a weight changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparseforge_fx.data.opening import check_length
from sparseforge_fx.data.reading import LABELS, SPAN, Reader, Reading
from sparseforge_fx.errors import SparseForgeError, one_line
from sparseforge_fx.graph.capture import as_call
from sparseforge_fx.graph.forward import signature_of
from sparseforge_fx.graph.modes import eval_mode
from sparseforge_fx.graph.program import Program
from sparseforge_fx.training.objective import Objective


@torch.no_grad()
def check_batch(program: Program, reader: Reader, objective: Objective | None, batch: Any) -> None:
    """One forward pass, so that data which does not fit is refused, and what is not used is noted, before a weight
    changes. ``objective`` is None where nothing learns: any answer will do."""
    found = reader.read(*as_call(batch))
    model = program.source
    assert model is not None
    check_ids(model, found)
    try:
        output = program.module()(*found.args, **found.kwargs)
    except (RuntimeError, AssertionError, IndexError, TypeError, ValueError) as error:
        shapes = ", ".join(f"{n} {list(v.shape)}" for n, v in found.given.items() if isinstance(v, Tensor))
        raise SparseForgeError(
            f"the model cannot take the first batch of the data ({shapes}): {one_line(error)}"
        ) from error
    dense = None if objective is None else objective.answer(output)
    values = pytree.tree_leaves(output) if dense is None else [dense.value]
    if any(torch.isnan(v).any() for v in values if isinstance(v, Tensor) and v.dim()):
        raise SparseForgeError(
            "the dense model answers the first batch of the data with NaN: check its weights and the data"
        )
    if objective is None or dense is None:
        return
    ours = objective.loss(dense, None, found, task_alone=True)
    if ours is None and objective.weights.task and "labels" not in found.given:
        reader.note("the batches hold no labels: the dense model's answers are all that is learnt from")
    if ours is not None:
        _compare_with_the_models_own(model, batch, found, ours.total, reader)


def check_ids(model: nn.Module, found: Reading) -> None:
    """Raise a SparseForgeError for token ids that the model has no place or no embedding for."""
    ids = found.given.get("input_ids")
    if isinstance(ids, Tensor):
        check_length(model, ids.shape[-1])
        table = _embeddings(model)
        if ids.numel() and table is not None and not 0 <= int(ids.min()) <= int(ids.max()) < table.num_embeddings:
            raise SparseForgeError(
                f"token ids from {int(ids.min())} to {int(ids.max())} do not fit the model's vocabulary of "
                f"{table.num_embeddings}: use the model's own tokenizer"
            )


def _compare_with_the_models_own(model: nn.Module, batch: Any, found: Reading, ours: Tensor, reader: Reader) -> None:
    """A model that makes a loss of labels knows best what they are: say where it differs."""
    takes = signature_of(model).parameters
    labels = [n for n in (*LABELS, *SPAN) if n in takes and found.given.get(n) is not None]
    if not labels:
        return
    try:
        with eval_mode(model):
            output = model(**{n: v for n, v in found.given.items() if n in takes and v is not None})
        theirs = output["loss"] if isinstance(output, Mapping) else getattr(output, "loss", None)
    except Exception:  # an open set: whatever the model raises; without its own loss there is nothing to compare
        theirs = None
    if isinstance(theirs, Tensor) and theirs.numel() == 1 and not torch.isclose(theirs.float(), ours, rtol=0.02):
        reader.note(
            f"on the first batch the model's own loss is {theirs.item():.4g} and the task loss used here is "
            f"{ours.item():.4g}: labels on padding, or weights that only the model knows of, are the usual reasons"
        )


def _embeddings(model: nn.Module) -> nn.Embedding | None:
    """The table that token ids index, where the model says which it is."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # no model of transformers', or one with two towers
        return None
    return table if isinstance(table, nn.Embedding) else None
