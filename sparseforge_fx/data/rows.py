"""Which columns of a row are its text, and rows as texts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from sparseforge_fx.data.chats import CHAT_COLUMNS, chat_text, is_chat, tools_of, writes
from sparseforge_fx.errors import SparseForgeError, one_line

TEXT_COLUMNS = ("text", "content", "passage", "document", "body", "article", "story", "review")
#: rows of questions and answers, whose columns are one text, a line break between them (halves of a chat: one chat);
#: those with more columns first
PAIRS = (
    ("instruction", "input", "output"),
    ("instruction", "input", "response"),
    ("instruction", "context", "output"),
    ("instruction", "context", "response"),
    ("context", "question", "answer"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
)
BESIDE = ("system", "tools")  # columns that a chat takes with it


class Column(NamedTuple):
    """Where in a row its text is: a column's name, or several with commas (None: found), what writes out a chat, and a
    list that takes what is to be said of columns that are not read."""

    name: str | None = None
    tokenizer: Any = None
    told: list[str] | None = None


@contextmanager
def readable(name: object) -> Iterator[None]:
    """Turn whatever goes wrong while ``name`` is read into a SparseForgeError."""
    try:
        yield
    except SparseForgeError:
        raise
    except Exception as error:  # an open set of types: text decoding, gzip, lzma, json, arrow, pandas, network
        raise SparseForgeError(
            f"cannot read {name} ({type(error).__name__}: {one_line(error)}): repair or remove it; text must be UTF-8"
        ) from error


def dataset_texts(rows: Any, column: Column, name: str) -> Iterator[str]:
    """The texts of a ``datasets`` object; ``name`` is what errors call it."""
    with readable(name):
        for first in itertools.islice(iter(rows), 1):
            found = _text_columns(first, column.name, name)
            _tell(first, found, column)
            kept = [*found, *(c for c in BESIDE if c in first and c not in found)]
            column = column._replace(name=",".join(found), told=None)
            yield from row_texts(rows.select_columns(kept), column, name)  # images and such are never decoded


def row_texts(rows: Iterable[Any], column: Column, name: str) -> Iterator[str]:
    """The texts of mappings; rows without any give none. Raises SparseForgeError that counts rows from 1."""
    found: tuple[str, ...] = ()
    columns: list[str] = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise SparseForgeError(
                f"row {number} of {name} is a {type(row).__name__}: rows must be objects with a text column"
            )
        if list(row) != columns:
            columns, before = list(row), found
            found = _text_columns(row, column.name, name, before)
            if found != before:
                _tell(row, found, column)
        if text := _text(row, found, column, name, number):
            yield text


def _text(row: Mapping[str, Any], found: Iterable[str], column: Column, name: str, number: int) -> str:
    """Chats that stand side by side are halves of one (a prompt and its completion)."""
    parts: list[str] = []
    given = [one for one in found if row[one] is not None]
    for chat, several in itertools.groupby(given, lambda one: is_chat(row[one])):
        names = list(several)
        if chat:
            turns = [turn for one in names for turn in row[one]]
            what = f"{', '.join(names)} of {name} in row {number}"
            parts += [chat_text(turns, column.tokenizer, what, row.get("system"), tools_of(row))] if turns else []
        elif strange := [one for one in names if not isinstance(row[one], str)]:
            raise SparseForgeError(
                f"column {strange[0]!r} of {name} holds {type(row[strange[0]]).__name__} in row {number}: name a "
                f"column of text with text_column (columns: {', '.join(map(str, row))})"
            )
        else:
            parts += [row[one] for one in names if row[one]]
    return "\n".join(parts)


def _tell(row: Mapping[str, Any], found: tuple[str, ...], column: Column) -> None:
    """Say which columns of text are not read: those beside columns that nobody named, and tools that nothing writes."""
    if column.told is None:
        return
    read = set(found)
    if any(is_chat(row[one]) for one in found):
        read |= {"system"} | ({"tools"} if tools_of(row) and writes("tools", column.tokenizer) else set())
    texts = [c for c in row if (isinstance(row[c], str) or is_chat(row[c])) and row[c]] if column.name is None else []
    texts += ["tools"] if "tools" not in texts and tools_of(row) else []
    left = [str(c) for c in texts if c not in read]
    if left:
        columns, more = f"column{'s' * (len(found) > 1)} {', '.join(found)}", ", ..." * (len(left) > 5)
        sentence = f"text is read from the {columns}, not from {', '.join(left[:5])}{more}"
        column.told.extend({sentence} - set(column.told))


def _text_columns(
    row: Mapping[str, Any], wanted: str | None, name: str, before: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Names of the columns that make a row's text; ``before``: of the row before it, of which a pair may come with one
    column more or less, and anything else stays."""
    lower = {str(c).lower(): c for c in row}
    pairs = [tuple(lower[c] for c in pair) for pair in PAIRS if set(pair) <= set(lower)]
    if wanted is None and before:
        again = [pair for pair in pairs if set(pair) >= set(before) or set(pair) < set(before)]
        if again:
            return again[0]
        wanted = ",".join(before)
    if wanted is None:
        by_name = [c for known in TEXT_COLUMNS for c in row if str(c).lower() == known]
        chats = [c for known in CHAT_COLUMNS for c in row if str(c).lower() == known and is_chat(row[c])]
        by_type = [c for c in row if isinstance(row[c], str)]
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
