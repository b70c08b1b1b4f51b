"""Arguments of ``sparsify`` that were given and have no part in the run: each gets a sentence in the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from sparseforge_fx.data.batches import is_text

TRAINING = ("steps", "tokens", "accumulate", "lr", "w_task", "w_kl", "divergence", "features", "w_features")
TEXT = ("tokenizer", "text_column", "separator", "cache_dir")
PACKING = ("batch_size", "length")


def unused_arguments(
    function: Callable, given: Mapping[str, Any], *, method: str, trains: bool, calibrates: bool, batches: Any
) -> list[str]:
    """A sentence for each argument that differs from its default and is not looked at.

    Args:
        given: the arguments by name.
        trains, calibrates: does the method train, does it look at a calibration set?
        batches: what the data became; None where there is none.
    """
    ids = getattr(batches, "data", None)  # packed token ids, of text or of the user
    defaults = {n: p.default for n, p in signature(function).parameters.items()}
    why: dict[str, str] = {}
    if not trains:
        why |= dict.fromkeys(TRAINING, f"{method} does not train")
        if calibrates:
            why |= dict.fromkeys(("steps", "tokens"), f"{method} looks at calibration= sequences")
    if not calibrates:
        why["calibration"] = "nothing is calibrated in this run"
    if not (trains or calibrates):
        why |= dict.fromkeys(("data", *TEXT, *PACKING), f"{method} looks at the weights alone")
    elif not is_text(given["data"]):
        why |= dict.fromkeys(TEXT, f"the data is {'batches' if ids is None else 'token ids'}, not text")
    if batches is not None and ids is None:
        why |= dict.fromkeys(PACKING, "the data's own batches are taken as they are")
    elif ids is not None and ids.length != given["length"]:
        why["length"] = f"the data's own sequences of {ids.length} are taken as they are"
    differ = [n for n in why if n in given and given[n] is not defaults[n] and _differs(given[n], defaults[n])]
    return [f"{n} is given and not used: {why[n]}" for n in differ]


def _differs(value: Any, default: Any) -> bool:
    plain = isinstance(value, str | int | float | bool | None)
    return not plain or value != default
