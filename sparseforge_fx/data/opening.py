"""From whatever a user calls data to the batches that a model is to see."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from sparseforge_fx.data.batches import Batches, as_batches, count_rows, is_text
from sparseforge_fx.data.chats import leading_bos
from sparseforge_fx.data.drawn_text import draw_text
from sparseforge_fx.data.sources import unused_text
from sparseforge_fx.errors import SparseForgeError

SELF = "self"
TEXT = ("tokenizer", "text_column", "separator", "cache_dir")  # arguments that text is read by
PACKING = ("batch_size", "length")  # and those that its sequences are put together by
LENGTH = 512  # of sequences that are cut from text, where nobody says another and the model takes it


def is_self(data: Any) -> bool:
    """Is text wanted that the model draws?"""
    return isinstance(data, str) and data == SELF


def open_batches(
    model: nn.Module,
    data: Any,
    tokenizer: Any = None,
    *,
    tokens: int,
    batch_size: int,
    length: int,
    seed: int,
    cache_dir: str | os.PathLike[str] | None = None,
    text_column: str | None = None,
    separator: str | None = None,
) -> Batches:
    """``data`` as :func:`as_batches` takes it, or ``"self"``: text that the model draws.

    Args:
        tokens: of text, no more is read or drawn.

    Sequences of the default length, 512, are as long as the model takes; other text in longer ones is refused. Raises
    SparseForgeError as :func:`as_batches` does.
    """
    if is_text(data):
        length = text_length(model, length)
    if is_self(data):
        begun = tokenizer is not None and leading_bos(tokenizer) is not None
        data = draw_text(model, tokens, length=length, seed=seed, keep_start=begun)
    return as_batches(
        data,
        tokenizer,
        batch_size=batch_size,
        length=length,
        seed=seed,
        tokens=tokens,
        cache_dir=cache_dir,
        text_column=text_column,
        separator=separator,
    )


def first_batches(batches: Batches, sequences: int) -> tuple[list[Any], list[str]]:
    """The first batches that hold so many sequences, none twice; what to say where the data has fewer."""
    chosen: list[Any] = []
    found, rows = batches.first_pass(), 0
    while rows < sequences:
        batch = next(found, None)
        if batch is None:
            return chosen, [f"asked for {sequences} calibration sequences, the data has {rows}"]
        chosen.append(batch)
        rows += count_rows(batch)
    return chosen, []


def text_length(model: nn.Module, length: int) -> int:
    """Tokens of a sequence of text where ``length`` is asked for: of the default no more than the model takes. Raises
    SparseForgeError for other lengths that it does not."""
    return min(length, positions(model) or length) if length == LENGTH else check_length(model, length)


def check_length(model: nn.Module, length: int) -> int:
    """The length. Raises a SparseForgeError if the model has fewer positions."""
    limit = positions(model)
    if limit is not None and limit < length:
        raise SparseForgeError(
            f"sequences of {length} tokens are longer than the model's {limit} positions: pass length={limit}"
        )
    return length


def tell_text(data: Any, batches: Batches | None, text_column: str | None) -> list[str]:
    """Notes on what of text is not read: files, a column that nothing has, columns of the rows."""
    if not is_text(data) or is_self(data):
        return []
    return [*unused_text(data, text_column), *getattr(getattr(batches, "data", None), "notes", ())]


def idle_reading(data: Any, batches: Batches | None, length: int) -> dict[str, str]:
    """Of the arguments :data:`TEXT` and :data:`PACKING` those that have no part in how this data becomes batches: name
    -> why.

    Args:
        length: the argument.
    """
    ids = getattr(batches, "data", None)  # packed token ids, of text or of the user
    why: dict[str, str] = {}
    if is_self(data):
        why |= dict.fromkeys(("text_column", "separator", "cache_dir"), "the text is drawn from the model")
    elif not is_text(data):
        why |= dict.fromkeys(TEXT, f"the data is {'batches' if ids is None else 'token ids'}, not text")
    if batches is not None and ids is None:
        why |= dict.fromkeys(PACKING, "the data's own batches are taken as they are")
    elif ids is not None and ids.length != length:
        why["length"] = f"the data's own sequences of {ids.length} are taken as they are"
    return why


def tell_length(data: Any, batches: Batches | None, length: int) -> list[str]:
    """A note where ``batches`` of text have shorter sequences than the default."""
    cut = getattr(getattr(batches, "data", None), "length", length) if is_text(data) else length
    return [f"sequences have {cut} tokens, all that the model has positions for"] if cut < length == LENGTH else []


def positions(model: nn.Module) -> int | None:
    """How many its config says that it has; None: it says nothing."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
