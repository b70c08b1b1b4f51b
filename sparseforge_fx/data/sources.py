"""Where text comes from: files, folders, hub data sets, lists."""

from __future__ import annotations

import bz2
import dataclasses
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sparseforge_fx.data.rows import Column, dataset_texts, readable, row_texts
from sparseforge_fx.errors import SparseForgeError, one_line

KINDS = (".txt", ".md", ".jsonl", ".json", ".csv", ".parquet", ".arrow")
PACKERS = (".gz", ".xz", ".bz2", ".zst")  # of the first five
EXTENSIONS = (*KINDS, *(kind + packer for kind in KINDS[:5] for packer in PACKERS))
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:\S*)?")  # owner/name[:config][:split]


def stable_hash(*parts: Any) -> str:
    """Short stable hash of the parts' reprs, for cache names and fingerprints."""
    state = hashlib.blake2b(digest_size=12)
    for part in parts:
        text = repr(part).encode("utf-8", "backslashreplace")
        state.update(len(text).to_bytes(8, "little") + text)
    return state.hexdigest()


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
        return [Source("the data set", identity, lambda column, stream: dataset_texts(source, column, "the data set"))]
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

    with readable(path):
        rows = datasets.load_from_disk(str(path))
    if isinstance(rows, Mapping) and len(rows) == 1:
        (rows,) = rows.values()
    if isinstance(rows, Mapping):
        raise SparseForgeError(f"{path} holds the splits {', '.join(rows)}: name one, {path / next(iter(rows))} say")
    files = sorted(p for p in path.rglob("*") if p.is_file())
    stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return Source(str(path), ("files", *stats), lambda column, stream: dataset_texts(rows, column, str(path)))


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
        return dataset_texts(rows, column, name)

    return Source(name, ("hub", repository, config, split), read)


def _extension(path: Path) -> str | None:
    return next((e for e in sorted(EXTENSIONS, key=len, reverse=True) if path.name.lower().endswith(e)), None)


def _looks_like_source(entry: str) -> bool:
    return not re.search(r"\s", entry) and bool(_extension(Path(entry)) or _HUB_ID.fullmatch(entry))


def _file_texts(path: Path, column: Column) -> Iterator[str]:
    """A packed file is read as one that is not: the same rows give the same texts."""
    extension = _extension(path) or ""
    kind = next(k for k in sorted(KINDS, key=len, reverse=True) if extension.startswith(k))
    with readable(path):
        if kind in (".txt", ".md"):
            with _opened(path, newline="") as file:  # newline="": the bytes as they are
                yield file.read()
        elif kind in (".jsonl", ".json", ".csv"):
            with _opened(path, newline="" if kind == ".csv" else None) as file:
                yield from row_texts(_rows(file, kind), column, str(path))
        else:
            import datasets

            pattern = glob.escape(str(path))  # `datasets` takes patterns; brackets in a name must not act as one
            rows = datasets.load_dataset(kind[1:], data_files=pattern, split="train", streaming=True)
            yield from dataset_texts(rows, column, str(path))


def _rows(file: Any, kind: str) -> Iterator[Any]:
    """Of .jsonl one value a line; of .json that, or a list, or one object, over any lines; of .csv its table."""
    if kind == ".csv":
        import pandas

        for part in pandas.read_csv(file, chunksize=10_000, low_memory=False):  # a column of a chunk is of one type
            yield from part.astype(object).where(part.notna(), None).to_dict("records")
        return
    lines = (line for line in file if line.strip())
    if kind == ".json":
        first = next(lines, "")
        try:
            found = json.loads(first)
        except json.JSONDecodeError:  # what began there ends on a later line
            found = json.loads(first + file.read())
        for row in found if isinstance(found, list) else [found]:
            yield {"text": row} if isinstance(row, str) else row
    yield from map(json.loads, lines)


def _opened(path: Path, **options: Any) -> Any:
    """As text, without the mark that some programs put before UTF-8."""
    suffix, options = path.suffix.lower(), {"encoding": "utf-8-sig", **options}
    if suffix == ".zst":
        import pyarrow

        return io.TextIOWrapper(pyarrow.input_stream(str(path), compression="zstd"), **options)
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    return openers.get(suffix, open)(path, "rt", **options)
