"""Which columns of a row are its text, and rows as texts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from sparseforge_fx.data.chats import CHAT_COLUMNS, chat_text, is_chat
from sparseforge_fx.errors import SparseForgeError, one_line

TEXT_COLUMNS = ("text", "content", "passage", "document", "body", "article", "story", "review")
#: rows of questions and answers, whose columns are one text, a line break between them
PAIRS = (
    ("instruction", "input", "output"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
)


class Column(NamedTuple):
    """Where in a row its text is: a column's name, or several with commas (None: found), and what writes out a chat."""

    name: str | None = None
    tokenizer: Any = None


@contextmanager
def readable(name: object) -> Iterator[None]:
    """Turn whatever goes wrong while ``name`` is read into a SparseForgeError."""
    try:
        yield
    except SparseForgeError:
        raise
    except Exception as error:  # an open set of types: text decoding, gzip, lzma, json, arrow, pandas, network
        raise SparseForgeError(
            f"cannot read {name} ({type(error).__name__}: {one_line(error)}): "
            "repair or remove it; text must be UTF-8"
        ) from error


def dataset_texts(rows: Any, column: Column, name: str) -> Iterator[str]:
    """The texts of a ``datasets`` object; ``name`` is what errors call it."""
    with readable(name):
        for first in itertools.islice(iter(rows), 1):
            found = _text_columns(first, column.name, name)
            column = column._replace(name=",".join(found))
            kept = [*found, *(["system"] if "system" in first and is_chat(first[found[0]]) else [])]
            yield from row_texts(rows.select_columns(kept), column, name)  # images and such are never decoded


def row_texts(rows: Iterable[Any], column: Column, name: str) -> Iterator[str]:
    """The texts of mappings; rows without any give none. Raises SparseForgeError that counts rows from 1."""
    found: tuple[str, ...] = ()
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise SparseForgeError(
                f"row {number} of {name} is a {type(row).__name__}: rows must be objects with a text column"
            )
        if not found or not set(found) <= set(row):
            found = _text_columns(row, ",".join(found) or column.name, name)
        parts = []
        for one in found:
            text = row[one]
            if is_chat(text):
                text = chat_text(text, column.tokenizer, f"{one} of {name} in row {number}", row.get("system"))
            if text is not None and not isinstance(text, str):
                raise SparseForgeError(
                    f"column {one!r} of {name} holds {type(text).__name__} in row {number}: name a column of text "
                    f"with text_column (columns: {', '.join(map(str, row))})"
                )
            parts += [text] if text else []
        if parts:
            yield "\n".join(parts)


def _text_columns(row: Mapping[str, Any], wanted: str | None, name: str) -> tuple[str, ...]:
    """Names of the columns that make a row's text."""
    if wanted is None:
        by_name = [c for known in TEXT_COLUMNS for c in row if str(c).lower() == known]
        chats = [c for known in CHAT_COLUMNS for c in row if str(c).lower() == known and is_chat(row[c])]
        by_type = [c for c in row if isinstance(row[c], str)]
        lower = {str(c).lower(): c for c in row}
        pairs = [tuple(lower[c] for c in pair) for pair in PAIRS if set(pair) <= set(lower)]
        if by_name or chats:
            return ((by_name or chats)[0],)
        if len(by_type) == 1 or pairs:
            return pairs[0] if pairs else (by_type[0],)
    else:
        several = tuple(part.strip() for part in wanted.split(","))
        if wanted in row or set(several) <= set(row):
            return (wanted,) if wanted in row else several
    problem = "has no column of text that stands out" if wanted is None else f"has no column {wanted!r}"
    raise SparseForgeError(
        f"{name} {problem}: choose one of its columns with text_column: {', '.join(map(str, row)) or 'none'}"
    )
