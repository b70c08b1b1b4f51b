"""A model is captured as its data needs it: the one place that says what with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparseforge_fx.data.reading import example_of
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.graph.exported import Exported


def capture_for(model: nn.Module, batch: Any, example_inputs: Any = None) -> Exported:
    """The captured model, for batches like this one: with ``example_inputs`` or, without, with the inputs in the batch;
    where token ids are all of them, with ids that capture makes, unless it had to fix sizes at theirs.

    Args:
        batch: the first one; None where no data are looked at.

    Raises SparseForgeError as :func:`capture` does, and for a batch in no form that a model takes.
    """
    inputs = None if batch is None else example_of(model, batch)
    if example_inputs is None and inputs is not None and _are_ids_alone(model, inputs):
        program = capture(model)
        return program if not program.notes else capture(model, inputs)
    return capture(model, inputs if example_inputs is None else example_inputs)


def _are_ids_alone(model: nn.Module, inputs: Any) -> bool:
    ids = inputs[0] if isinstance(inputs, tuple) and len(inputs) == 1 else None
    if isinstance(inputs, Mapping) and set(inputs) == {"input_ids"}:
        ids = inputs["input_ids"]
    is_text = getattr(model, "main_input_name", None) == "input_ids" and isinstance(ids, Tensor) and ids.dim() == 2
    return is_text and not getattr(model.config, "is_encoder_decoder", False)
