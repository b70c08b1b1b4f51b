"""Where text comes from: files, folders, hub data sets, lists; read, cut and mixed into one stream of documents."""

from __future__ import annotations

import bz2
import csv
import dataclasses
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
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
KINDS = (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet", ".arrow")
PACKERS = (".gz", ".xz", ".bz2", ".zst")  # of the first five
EXTENSIONS = (*KINDS, *(kind + packer for kind in KINDS[:5] for packer in PACKERS))
SHUFFLE_BUFFER = 50_000  # documents held for shuffling, shared by all sources: 150 MB of text at 3000 characters each
STREAM_BUFFER = 10_000  # the same for what comes over the network, because the buffer is filled before the first batch
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:\S*)?")  # owner/name[:config][:split]


# ----------------------------------------------------------------------------------------------- sources of documents
@dataclasses.dataclass(frozen=True)
class Source:
    """One origin of documents. `read(column, stream)` starts again at the first document on every call;
    `identity` says what the documents depend on, for cache names; `unread` are files of a folder that are no text;
    `columns`: are there rows with columns?"""

    name: str
    identity: tuple[Any, ...]
    read: Callable[[Column, bool], Iterator[str]]
    unread: tuple[str, ...] = ()
    columns: bool = True


class Column(NamedTuple):
    """Where in a row its text is: a column's name, or several with commas (None: found), and what writes out a chat."""

    name: str | None = None
    tokenizer: Any = None


def open_sources(source: Any) -> list[Source]:
    """What `load_text` describes as `source`, as a list; a missing file or an unknown extension is found here."""
    if isinstance(source, Path):
        return [_open(str(source))]
    if isinstance(source, str):
        whole = os.path.exists(os.path.expanduser(source))  # a file's own name may have a comma
        names = [name.strip() for name in source.split(",") if name.strip()]
        return [_open(name) for name in ([source] if whole or not names else names)]
    if hasattr(source, "column_names") and not isinstance(source, Mapping):  # datasets.Dataset or IterableDataset
        # Without a fingerprint nothing says whether it is the data set of an earlier run: never reuse a cache file.
        identity = ("dataset", getattr(source, "_fingerprint", None) or os.urandom(8))
        return [Source("the data set", identity, lambda column, stream: _dataset_texts(source, column, "the data set"))]
    if not isinstance(source, list | tuple) or not all(isinstance(entry, str | Path) for entry in source):
        raise SparseForgeError(
            f"text source of type {type(source).__name__} is not understood: pass a file, a folder, a hub id "
            "'owner/name[:config][:split]', a datasets.Dataset, a list of those names, or a list of texts"
        )
    if not source:
        raise SparseForgeError("the list of texts is empty: pass at least one text or file name")
    names_source = [isinstance(entry, Path) or os.path.exists(entry) or _looks_like_source(entry) for entry in source]
    if all(names_source):
        return [_open(str(entry)) for entry in source]
    if any(isinstance(entry, Path) or os.path.isfile(entry) for entry in source):
        culprit = source[names_source.index(False)]
        raise SparseForgeError(
            f"the list mixes files with {culprit[:60]!r}, which is no file, folder or hub id: "
            "pass either names only or texts only"
        )
    digest = stable_hash(*source)
    return [Source("the list of texts", ("texts", digest), lambda column, stream: iter(source), columns=False)]


def load_text(
    source: Any,
    text_column: str | None = None,
    limit: int | None = None,
    *,
    seed: int | None = None,
    max_document_chars: int | None = None,
    stream: bool = False,
    tokenizer: Any = None,
) -> Iterator[str]:
    """Documents of `source`, one str each.

    Args:
        source: a hub id "owner/name[:config][:split]" (default split "train"; "id::test" is the default config); a file
            .txt or .md (one document), .jsonl, .json, .csv (one document per row; these five also as .gz, .xz, .bz2
            or .zst), .parquet or .arrow; a folder, whose files are read in sorted order as one source (README.md is
            passed over), or which `datasets` saved; a `datasets` object; several of these names, as a list or separated
            by commas; or a list of texts.
        text_column: column of the rows, or several with commas, which a line break joins; by default one of
            TEXT_COLUMNS, else one of chats (CHAT_COLUMNS), else one of PAIRS, else the only column of text.
        tokenizer: whose chat template writes chats out.
        limit: stop after so many documents.
        seed: shuffles every source through a buffer (exact up to SHUFFLE_BUFFER documents); None keeps file order.
        max_document_chars: longer documents are cut, at the end of a paragraph, line or word where there is one, into
            pieces of at most this many characters, which from then on count as documents. Nothing is lost:
            the pieces of a document joined are the document. None leaves documents whole.
        stream: read hub data sets over the network as far as needed, instead of downloading and keeping them.

    Several sources take turns, one document each; a source that has ended leaves the rotation. So up to the end of the
    shortest all have given equally many documents: with books beside reviews that is even only because books are cut.

    Raises:
        SparseForgeError: file missing or unreadable, unknown extension, hub not reachable, no text column.
    """
    if max_document_chars is not None and max_document_chars < 2:
        raise SparseForgeError(f"max_document_chars is {max_document_chars}: use at least 2, or None to cut nothing")
    sources = open_sources(source)  # here, not at the first document: a wrong name shows at the call

    def documents() -> Iterator[str]:
        streams = []
        for number, opened in enumerate(sources):
            texts = opened.read(Column(text_column, tokenizer), stream)
            if max_document_chars is not None:
                texts = _cut(texts, max_document_chars)
            if seed is not None:
                held = STREAM_BUFFER if stream and opened.identity[0] == "hub" else SHUFFLE_BUFFER
                texts = _shuffled(texts, random.Random(f"{seed}/{number}"), max(1000, held // len(sources)))
            streams.append(texts)
        while streams:
            running = []
            for texts in streams:
                for text in itertools.islice(texts, 1):
                    running.append(texts)
                    yield text
            streams = running

    return itertools.islice(documents(), limit)


def _open(name: str) -> Source:
    path = Path(os.path.expanduser(name))
    unread: tuple[str, ...] = ()
    if name and path.is_dir():
        if any((path / one).is_file() for one in ("dataset_dict.json", "state.json")):
            return _saved_data_set(path)
        found = sorted(p for p in path.rglob("*") if p.is_file())
        visible = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        visible = [p for p in visible if p.name != "README.md"]  # a data set from the hub has a card: no data
        files = [p for p in visible if _extension(p)]
        unread = tuple(str(p.relative_to(path)) for p in visible if not _extension(p))
        if not files:
            others = f" (there are {', '.join(unread[:3])})" if unread else ""
            raise SparseForgeError(
                f"the folder {name} holds no text file{others}: expected {', '.join(KINDS)}, or packed as "
                f"{', '.join(PACKERS)}"
            )
    elif path.is_file():
        files = [path]
        if not _extension(path):
            raise SparseForgeError(f"the extension of {name} is unknown: use one of {', '.join(EXTENSIONS)}")
    elif _extension(path) or name.startswith(("/", "./", "../", "~")):
        raise SparseForgeError(f"there is no file or folder {name}: check the path (working folder {os.getcwd()})")
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name.split(":")[0]):
        return _hub_source(name)
    else:
        raise SparseForgeError(
            f"{name[:80]!r} is neither a file, a folder nor a hub id 'owner/name[:config][:split]': "
            "to give a text itself, pass it inside a list"
        )
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]

    def read(column: Column, stream: bool) -> Iterator[str]:
        return itertools.chain.from_iterable(_file_texts(p, column) for p in files)

    columns = any(not (_extension(p) or "").startswith((".txt", ".md")) for p in files)
    return Source(name, ("files", *stats), read, unread, columns)


def _saved_data_set(path: Path) -> Source:
    """A folder of `Dataset.save_to_disk`."""
    import datasets

    with _reading(path):
        rows = datasets.load_from_disk(str(path))
    if isinstance(rows, Mapping) and len(rows) == 1:
        (rows,) = rows.values()
    if isinstance(rows, Mapping):
        raise SparseForgeError(f"{path} holds the splits {', '.join(rows)}: name one, {path / next(iter(rows))} say")
    files = sorted(p for p in path.rglob("*") if p.is_file())
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return Source(str(path), ("files", *stats), lambda column, stream: _dataset_texts(rows, column, str(path)))


def unused_text(source: Any, text_column: str | None) -> list[str]:
    """A sentence for each folder among the sources that holds files which are not read, and for a column that nothing
    has."""
    opened = open_sources(source)
    without = text_column is not None and not any(s.columns for s in opened)
    told = ["text_column is given and not used: the text has no columns"] if without else []
    return told + [
        f"{len(s.unread)} files of {s.name} are not read, as they are no text: {', '.join(s.unread[:5])}"
        + (", ..." if len(s.unread) > 5 else "")
        for s in opened
        if s.unread
    ]


def _hub_source(name: str) -> Source:
    # Colons inside brackets belong to the split: "imdb:train[:10%]".
    repository, *rest = re.split(r":(?![^\[]*\])", name)
    if len(rest) > 2:
        raise SparseForgeError(f"{name!r} has too many parts: a hub data set is 'owner/name[:config][:split]'")
    if len(rest) == 1 and re.match(r"(train|test|valid|dev)", rest[0]):
        rest = ["", rest[0]]
    config, split = (*rest, "", "")[:2]
    split = split or "train"

    def read(column: Column, stream: bool) -> Iterator[str]:
        import datasets  # takes over a second to import: only those who need it pay

        try:
            # Slices of splits exist only for downloaded data sets.
            rows = datasets.load_dataset(repository, config or None, split=split, streaming=stream and "[" not in split)
        except Exception as error:  # an open set of types: network, hub, builder, missing config or split
            raise SparseForgeError(
                f"cannot load the hub data set {name!r} ({one_line(error)}): check id, config, split and network; "
                "there is no local file of that name"
            ) from error
        return _dataset_texts(rows, column, name)

    return Source(name, ("hub", repository, config, split), read)


def _extension(path: Path) -> str | None:
    return next((e for e in sorted(EXTENSIONS, key=len, reverse=True) if path.name.lower().endswith(e)), None)


def _looks_like_source(entry: str) -> bool:
    return not re.search(r"\s", entry) and bool(_extension(Path(entry)) or _HUB_ID.fullmatch(entry))


@contextmanager
def _reading(name: object) -> Iterator[None]:
    try:
        yield
    except SparseForgeError:
        raise
    except Exception as error:  # an open set of types: text decoding, gzip, lzma, json, arrow, pandas, network
        raise SparseForgeError(
            f"cannot read {name} ({type(error).__name__}: {one_line(error)}): "
            "repair or remove it; text must be UTF-8"
        ) from error


def _file_texts(path: Path, column: Column) -> Iterator[str]:
    extension = _extension(path) or ""
    kind = next(k for k in sorted(KINDS, key=len, reverse=True) if extension.startswith(k))
    with _reading(path):
        if kind in (".txt", ".md"):
            with _opened(path, newline="") as file:  # newline="": the bytes as they are
                yield file.read()
        elif kind == ".jsonl":
            with _opened(path) as file:
                yield from _row_texts((json.loads(line) for line in file if line.strip()), column, str(path))
        elif extension != kind:  # `datasets` takes no packed file whose name has brackets in it
            with _opened(path) as file:
                rows: Any = csv.DictReader(file) if kind == ".csv" else json.load(file)
                yield from _row_texts(rows if kind == ".csv" or isinstance(rows, list) else [rows], column, str(path))
        else:
            import datasets

            pattern = glob.escape(str(path))  # `datasets` takes patterns; brackets in a name must not act as one
            rows = datasets.load_dataset(kind[1:], data_files=pattern, split="train", streaming=True)
            yield from _dataset_texts(rows, column, str(path))


def _opened(path: Path, **options: Any) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        return io.TextIOWrapper(pyarrow.input_stream(str(path), compression="zstd"), encoding="utf-8", **options)
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    return openers.get(suffix, open)(path, "rt", encoding="utf-8", **options)


def _dataset_texts(rows: Any, column: Column, name: str) -> Iterator[str]:
    with _reading(name):
        for first in itertools.islice(iter(rows), 1):
            found = _text_columns(first, column.name, name)
            column = column._replace(name=",".join(found))
            kept = [*found, *(["system"] if "system" in first and is_chat(first[found[0]]) else [])]
            yield from _row_texts(rows.select_columns(kept), column, name)  # images and such are never decoded


def _row_texts(rows: Iterable[Any], column: Column, name: str) -> Iterator[str]:
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


def _cut(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        start = 0
        while len(text) - start > limit:
            end = start + limit
            # A blank or line break ends the piece before it, but a space begins the next word's token.
            for mark, kept in (("\n\n", 2), ("\n", 1), (" ", 0)):
                found = text.rfind(mark, start + limit // 2, end)
                if found > start:
                    end = found + kept
                    break
            yield text[start:end]
            start = end
        yield text[start:]


def _shuffled(texts: Iterator[str], rng: random.Random, size: int) -> Iterator[str]:
    buffer = list(itertools.islice(texts, size))
    for text in texts:
        place = rng.randrange(size)
        yield buffer[place]
        buffer[place] = text
    rng.shuffle(buffer)
    yield from buffer


def stable_hash(*parts: Any) -> str:
    """Short stable hash of the parts' reprs, for cache names and fingerprints."""
    state = hashlib.blake2b(digest_size=12)
    for part in parts:
        text = repr(part).encode("utf-8", "backslashreplace")
        state.update(len(text).to_bytes(8, "little") + text)
    return state.hexdigest()
