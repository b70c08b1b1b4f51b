"""Text in, batches of token ids out: read, cut, mix, tokenise once into a memory-mapped file, draw by batch number.

Everything is a pure function of (source, tokenizer, options, seed, batch number): a run killed at step k resumes at
step k with the same batches, and without reading those before it.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import gzip
import hashlib
import itertools
import json
import lzma
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DistributedSampler, IterableDataset

from .errors import SparseForgeError

TEXT_COLUMNS = ("text", "content", "passage", "document", "body", "article", "story", "review")
EXTENSIONS = (".txt", ".md", ".jsonl", ".json", ".parquet", ".csv", ".txt.gz", ".txt.xz", ".jsonl.gz", ".jsonl.xz")
SHUFFLE_BUFFER = 50_000  # documents held for shuffling, shared by all sources: 150 MB of text at 3000 characters each
STREAM_BUFFER = 10_000  # the same for what comes over the network, because the buffer is filled before the first batch
CACHE_FORMAT = 1  # part of every cache name: raise it when the same inputs would give other tokens
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:\S*)?")  # owner/name[:config][:split]


# ----------------------------------------------------------------------------------------------- sources of documents
@dataclasses.dataclass(frozen=True)
class Source:
    """One origin of documents. `read(text_column, stream)` starts again at the first document on every call;
    `identity` says what the documents depend on, for cache names."""

    name: str
    identity: tuple[Any, ...]
    read: Callable[[str | None, bool], Iterator[str]]


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
    digest = _digest(*source)
    return [Source("the list of texts", ("texts", digest), lambda column, stream: iter(source))]


def load_text(
    source: Any,
    text_column: str | None = None,
    limit: int | None = None,
    *,
    seed: int | None = None,
    max_document_chars: int | None = None,
    stream: bool = False,
) -> Iterator[str]:
    """Documents of `source`, one str each.

    Args:
        source: a hub id "owner/name[:config][:split]" (default split "train"; "id::test" is the default config); a file
            .txt or .md (one document), .jsonl, .json, .parquet or .csv (one document per row; .txt and .jsonl also as
            .gz or .xz); a folder, whose files are read in sorted order as one source (README.md is passed over); a
            `datasets` object; several of these names, as a list or separated by commas; or a list of texts.
        text_column: column of the rows; by default one of TEXT_COLUMNS, else the only column of text.
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
            texts = opened.read(text_column, stream)
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
    if name and path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and _extension(p))
        visible = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        files = [p for p in visible if p.name != "README.md"]  # a data set from the hub has a card: no data
        if not files:
            raise SparseForgeError(f"the folder {name} holds no text file: expected {', '.join(EXTENSIONS)}")
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

    def read(text_column: str | None, stream: bool) -> Iterator[str]:
        return itertools.chain.from_iterable(_file_texts(p, text_column) for p in files)

    return Source(name, ("files", *stats), read)


def _hub_source(name: str) -> Source:
    # Colons inside brackets belong to the split: "imdb:train[:10%]".
    repository, *rest = re.split(r":(?![^\[]*\])", name)
    if len(rest) > 2:
        raise SparseForgeError(f"{name!r} has too many parts: a hub data set is 'owner/name[:config][:split]'")
    if len(rest) == 1 and re.match(r"(train|test|valid|dev)", rest[0]):
        rest = ["", rest[0]]
    config, split = (*rest, "", "")[:2]
    split = split or "train"

    def read(text_column: str | None, stream: bool) -> Iterator[str]:
        import datasets  # takes over a second to import: only those who need it pay

        try:
            # Slices of splits exist only for downloaded data sets.
            rows = datasets.load_dataset(repository, config or None, split=split, streaming=stream and "[" not in split)
        except Exception as error:  # an open set of types: network, hub, builder, missing config or split
            raise SparseForgeError(
                f"cannot load the hub data set {name!r} ({_first_line(error)}): check id, config, split and network; "
                "there is no local file of that name"
            ) from error
        return _dataset_texts(rows, text_column, name)

    return Source(name, ("hub", repository, config, split), read)


def _extension(path: Path) -> str | None:
    return next((e for e in EXTENSIONS if path.name.lower().endswith(e)), None)


def _looks_like_source(entry: str) -> bool:
    return not re.search(r"\s", entry) and bool(_extension(Path(entry)) or _HUB_ID.fullmatch(entry))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _reading(name: object) -> Iterator[None]:
    try:
        yield
    except SparseForgeError:
        raise
    except Exception as error:  # an open set of types: text decoding, gzip, lzma, json, arrow, pandas, network
        raise SparseForgeError(
            f"cannot read {name} ({type(error).__name__}: {_first_line(error)}): "
            "repair or remove it; text must be UTF-8"
        ) from error


def _file_texts(path: Path, text_column: str | None) -> Iterator[str]:
    extension = _extension(path) or ""
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    opener = openers.get(path.suffix.lower(), open)
    with _reading(path):
        if extension.startswith((".txt", ".md")):
            with opener(path, "rt", encoding="utf-8", newline="") as file:  # newline="": the bytes as they are
                yield file.read()
        elif extension.startswith(".jsonl"):
            with opener(path, "rt", encoding="utf-8") as file:
                yield from _row_texts((json.loads(line) for line in file if line.strip()), text_column, str(path))
        else:
            import datasets

            pattern = glob.escape(str(path))  # `datasets` takes patterns; brackets in a name must not act as one
            rows = datasets.load_dataset(extension[1:], data_files=pattern, split="train", streaming=True)
            yield from _dataset_texts(rows, text_column, str(path))


def _dataset_texts(rows: Any, text_column: str | None, name: str) -> Iterator[str]:
    with _reading(name):
        for first in itertools.islice(iter(rows), 1):
            column = _text_column(first, text_column, name)
            yield from _row_texts(rows.select_columns([column]), column, name)  # images and the like are never decoded


def _row_texts(rows: Iterable[Any], text_column: str | None, name: str) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise SparseForgeError(
                f"row {number} of {name} is a {type(row).__name__}: rows must be objects with a text column"
            )
        text_column = _text_column(row, text_column, name)
        text = row[text_column]
        if text is None:
            continue
        if not isinstance(text, str):
            raise SparseForgeError(
                f"column {text_column!r} of {name} holds {type(text).__name__} in row {number}: name a column of text "
                f"with text_column (columns: {', '.join(map(str, row))})"
            )
        yield text


def _text_column(row: Mapping[str, Any], wanted: str | None, name: str) -> str:
    if wanted is None:
        by_name = [c for known in TEXT_COLUMNS for c in row if str(c).lower() == known]
        by_type = [c for c in row if isinstance(row[c], str)]
        if by_name:
            return by_name[0]
        if len(by_type) == 1:
            return by_type[0]
    elif wanted in row:
        return wanted
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


# ------------------------------------------------------------------------------------------------------ packed tokens
class TokenData:
    """Token ids packed to sequences of one length: no padding, every position real, the remainder left over.

    Args:
        ids: 1-D integer array [tokens] or tensor; a memory map (`np.memmap`, `np.load(mmap_mode="r")`) stays one.
        length: tokens per sequence.

    `len(data)` is the number of full sequences, `data[i]` a LongTensor [length]: a map-style data set for a DataLoader.

    Raises:
        SparseForgeError: ids not integer or not 1-D, or fewer than one sequence of them.
    """

    def __init__(self, ids: Any, length: int, *, _rows: np.ndarray | None = None) -> None:
        array = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else ids
        if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
            shape = f"{getattr(array, 'dtype', type(ids).__name__)} {list(getattr(array, 'shape', []))}"
            raise SparseForgeError(
                f"token ids must be a 1-D integer array or tensor, not {shape}: flatten or tokenise first"
            )
        if length < 1:
            raise SparseForgeError(f"length is {length}: a sequence needs at least 1 token")
        if array.size < length:
            raise SparseForgeError(
                f"the data has {array.size} tokens, fewer than one sequence of {length}: "
                "give more text or a smaller length"
            )
        self.length = length
        self._ids = array
        self._sequences = array[: array.size // length * length].reshape(-1, length)  # a view
        self._rows = _rows  # which sequences are part of this data; None: all

    def __len__(self) -> int:
        return len(self._sequences if self._rows is None else self._rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Sequence `index`, LongTensor [length]."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        return self._take(np.array([index % len(self)]))[0]

    def _take(self, indices: np.ndarray) -> torch.Tensor:
        rows = indices if self._rows is None else self._rows[indices]
        return torch.from_numpy(self._sequences[rows].astype(np.int64))

    @property
    def tokens(self) -> int:
        """Number of tokens, with the remainder that fills no sequence."""
        return self._ids.size if self._rows is None else self._rows.size * self.length

    @property
    def ids(self) -> np.ndarray:
        """All token ids in order, [tokens], in the stored integer type; a view unless this is part of a split."""
        return self._ids if self._rows is None else self._sequences[self._rows].reshape(-1)

    @functools.cached_property
    def fingerprint(self) -> str:
        """12 hexadecimal digits that depend on the token ids and the length, not on where or how they are stored."""
        digest = hashlib.blake2b(str(self.length).encode(), digest_size=6)
        ids = self.ids
        for start in range(0, ids.size, 1 << 20):
            digest.update(np.ascontiguousarray(ids[start : start + (1 << 20)], dtype="<i8").tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"TokenData({len(self)} sequences of {self.length}, {self.tokens} tokens)"

    def split(self, held_out: float | int) -> tuple[TokenData, TokenData]:
        """(train, held-out), disjoint, the same on every call. `held_out`: a fraction below 1, or how many sequences.

        Held-out sequences lie evenly over the data, because a mix of sources need not be the same mix at its end. A
        document cut by a sequence's border can have a part on either side: split the sources where that counts.
        """
        total = len(self)
        count = max(1, round(held_out * total)) if isinstance(held_out, float) else held_out
        if count < 1 or count >= total:
            raise SparseForgeError(
                f"held_out={held_out} of {total} sequences leaves one side empty: "
                f"use a fraction in (0, 1) or 1 to {total - 1}"
            )
        chosen = (2 * np.arange(count) + 1) * total // (2 * count)
        mask = np.zeros(total, dtype=bool)
        mask[chosen] = True
        rows = np.arange(total) if self._rows is None else self._rows
        train, held = (TokenData(self._ids, self.length, _rows=rows[part]) for part in (~mask, mask))
        return train, held

    def batch(self, k: int, batch_size: int, seed: int | None) -> dict[str, torch.Tensor]:
        """Batch number `k`: {"input_ids": LongTensor [batch_size, length]}, a pure function of its arguments.

        Sequences follow a new permutation in every epoch (`seed=None`: the stored order). A batch may span two epochs,
        so that each sequence comes exactly once per epoch whatever the batch size.
        """
        if k < 0 or batch_size < 1:
            raise SparseForgeError(f"batch {k} of size {batch_size} does not exist: use k >= 0 and batch_size >= 1")
        positions = np.arange(k * batch_size, (k + 1) * batch_size)
        epochs, within = np.divmod(positions, len(self))
        if seed is not None:
            for epoch in np.unique(epochs):
                here = epochs == epoch
                within[here] = _permutation(len(self), seed, int(epoch))[within[here]]
        return {"input_ids": self._take(within)}

    def batches(self, batch_size: int, seed: int | None = 0, start: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """`batch(start)`, `batch(start + 1)`, ... without end; the batches before `start` are not read."""
        return (self.batch(k, batch_size, seed) for k in itertools.count(start))


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng([seed % 2**64, epoch]).permutation(n)
    order.setflags(write=False)
    return order


def tokenize(
    source: Any,
    tokenizer: Any,
    *,
    length: int = 512,
    seed: int | None = 0,
    limit_tokens: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    separator: str | None = None,
    text_column: str | None = None,
    max_document_chars: int | None = 3000,
) -> TokenData:
    """Documents of `source` (see `load_text`), shuffled under `seed`, tokenised, joined and packed to `length` tokens.

    Args:
        tokenizer: a transformers tokenizer. It adds no special token of its own.
        length: tokens per sequence. It does not change what is stored, so other lengths use the same cache file.
        seed: order of the documents; None keeps file order.
        limit_tokens: exactly so many tokens, if there are that many; no more text is read than this needs.
        cache_dir: where the token file goes; default the Hugging Face home, `$HF_HOME/sparseforge_fx`.
        separator: text after every document; None: the tokenizer's end-of-sequence token.
        text_column, max_document_chars: see `load_text`. Pieces of a cut document are shuffled like documents, and each
            is followed by the separator.

    The file is named by a hash of the sources (names, sizes, modification times; a hub data set by its id alone), the
    tokenizer (vocabulary and rules) and the options; it appears whole or not at all, and the next call memory-maps it.

    Raises:
        SparseForgeError: as `load_text`; no text; too little text; no end-of-sequence token; cache not writable.
    """
    if separator is None and getattr(tokenizer, "eos_token_id", None) is None:
        raise SparseForgeError(
            "the tokenizer has no end-of-sequence token to put between documents: pass separator='\\n\\n'"
        )
    if limit_tokens is not None and limit_tokens < length:
        raise SparseForgeError(f"limit_tokens={limit_tokens} is less than one sequence: use at least length={length}")
    sources = open_sources(source)
    vocabulary = tokenizer.get_vocab()
    dtype = np.dtype(np.uint16 if max(vocabulary.values()) < 2**16 else np.uint32)
    options = (CACHE_FORMAT, seed, limit_tokens, separator, text_column, max_document_chars)
    key = _digest(*(s.identity for s in sources), _tokenizer_identity(tokenizer, vocabulary), options)
    if cache_dir is None:
        from huggingface_hub.constants import HF_HOME

        cache_dir = Path(HF_HOME) / "sparseforge_fx"
    path = Path(cache_dir) / f"tokens-{key}.{dtype.name}.bin"
    if not path.exists():
        documents = load_text(
            source,
            text_column,
            seed=seed,
            max_document_chars=max_document_chars,
            stream=limit_tokens is not None,
        )
        blocks = _token_blocks(documents, tokenizer, separator, limit_tokens)
        if not _write(path, (np.asarray(block, dtype=dtype) for block in blocks), limit_tokens):
            raise SparseForgeError(
                f"{' and '.join(s.name for s in sources)} holds no text: check the source and its text column"
            )
    return TokenData(np.memmap(path, dtype=dtype, mode="r"), length)


def _token_blocks(
    documents: Iterator[str], tokenizer: Any, separator: str | None, limit: int | None
) -> Iterator[list[int]]:
    """Ids of about 200 documents at a time, cut off at `limit` tokens."""
    written = 0
    texts = (text + (separator or "") for text in documents if text.strip())
    while limit is None or written < limit:
        batch = list(itertools.islice(texts, 200))
        if not batch:
            return
        # verbose=False: a document longer than the model's context is no mistake here, it gets packed.
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        end = [tokenizer.eos_token_id] if separator is None else []
        block = [token for ids in encoded for token in itertools.chain(ids, end)]
        block = block if limit is None else block[: limit - written]
        written += len(block)
        yield block


def _write(path: Path, blocks: Iterable[np.ndarray], limit: int | None) -> int:
    """Tokens written to `path`, which is replaced only by the finished file; with none, nothing appears."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    console = Console(stderr=True)
    written, scratch = 0, ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            Progress(
                *Progress.get_default_columns(), MofNCompleteColumn(), console=console, disable=not console.is_terminal
            ) as bar,
            tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name + ".", delete=False) as file,
        ):
            scratch = file.name
            task = bar.add_task("Tokenising", total=limit)
            for block in blocks:
                file.write(block.tobytes())
                written += block.size
                bar.update(task, completed=written)
            file.flush()
            os.fsync(file.fileno())
        if written:
            os.replace(scratch, path)
    except OSError as error:
        raise SparseForgeError(
            f"cannot write the token cache in {path.parent} ({error}): choose another cache_dir"
        ) from error
    finally:
        if scratch and os.path.exists(scratch):
            os.remove(scratch)
    return written


def _tokenizer_identity(tokenizer: Any, vocabulary: Mapping[str, int]) -> tuple[Any, ...]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # not built on the `tokenizers` library
        content = repr(sorted(vocabulary.items()))
    else:  # vocabulary, merges, normalisation, pre-tokenisation; less what the last call happened to leave behind
        content = repr(json.loads(backend.to_str()) | {"truncation": None, "padding": None})
    return (type(tokenizer).__name__, tokenizer.eos_token_id, _digest(content))


def _digest(*parts: Any) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        text = repr(part).encode("utf-8", "backslashreplace")
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------- batches by step number
class Batches(Protocol):
    """What a training loop draws from."""

    def batch(self, step: int) -> Any:
        """The batch of this step: a dict, tuple or tensor; the same one however often and in whatever order asked."""


def as_batches(
    data: Any,
    tokenizer: Any = None,
    *,
    batch_size: int,
    length: int,
    seed: int,
    limit_tokens: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Batches:
    """Whatever a user calls data, as an object with `.batch(step)`.

    Args:
        data: one of
            - `TokenData` (keeps its own length);
            - text: any `source` of `load_text`, for which `tokenizer`, `limit_tokens` and `cache_dir` serve;
            - token ids: integer tensor or array [tokens], or [sequences, length], whose rows then are the sequences;
            - batches: a DataLoader, or anything that can be iterated again and again, of dicts, tuples or tensors. They
              are passed through as they are and cycled; `batch_size` and `length` do not apply. A jump to a later step
              skips batches one by one (within one pass only, where `len` is known). A DataLoader that shuffles is
              given its random numbers by `seed` and step, so that a resumed run sees what an unbroken one does.
            A single dict of tensors is a single batch.

    Raises:
        SparseForgeError: text without tokenizer; a generator or another one-shot iterator; no data; anything unknown.
    """
    if isinstance(data, list) and data and isinstance(data[0], int):  # what `tokenizer.encode` returns
        data = np.asarray(data)
    if isinstance(data, torch.Tensor | np.ndarray):
        rows = data.ndim == 2
        data = TokenData(data.reshape(-1) if rows else data, data.shape[1] if rows else length)
    elif _is_text(data):
        if tokenizer is None:
            raise SparseForgeError("text data needs a tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...)")
        data = tokenize(data, tokenizer, length=length, seed=seed, limit_tokens=limit_tokens, cache_dir=cache_dir)
    if isinstance(data, TokenData):
        return _PackedBatches(data, batch_size, seed)
    if isinstance(data, Mapping):
        data = [data]
    if not isinstance(data, Iterable):
        raise SparseForgeError(
            f"data of type {type(data).__name__} is not understood: "
            "pass text, token ids, a DataLoader or a list of batches"
        )
    if isinstance(data, Iterator):
        raise SparseForgeError(
            f"a {type(data).__name__} can be read only once, so training could neither repeat nor resume: "
            "pass list(...) of it, or a DataLoader"
        )
    return _CycledBatches(data, seed)


def _is_text(data: Any) -> bool:
    if isinstance(data, list | tuple):
        return bool(data) and all(isinstance(entry, str | Path) for entry in data)
    if hasattr(data, "column_names"):
        columns = data.column_names or []
        if "input_ids" in columns:
            raise SparseForgeError(
                "a data set that is tokenised already must come as a DataLoader, which knows its padding"
            )
        return True
    return isinstance(data, str | Path)


@dataclasses.dataclass(frozen=True)
class _PackedBatches:
    data: TokenData
    batch_size: int
    seed: int | None

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        return self.data.batch(step, self.batch_size, self.seed)


class _CycledBatches:
    """Passes over a re-iterable, one after another; keeps one iterator and restarts it only to go back."""

    def __init__(self, loader: Iterable[Any], seed: int) -> None:
        self._loader = loader
        self._seed = seed
        self._iterator: Iterator[Any] = iter(())
        self._epoch, self._next = -1, 0  # the pass under way and the index of its next batch
        self._size: int | None = None  # batches per pass, once known
        if not isinstance(getattr(loader, "dataset", None), IterableDataset):  # those may announce any
            with suppress(TypeError):
                self._size = len(loader)  # type: ignore[arg-type]
        if self._size == 0:
            raise SparseForgeError("the data holds no batch: check the data set, batch_size and drop_last")
        sampler = getattr(loader, "sampler", None)
        self._samplers = [sampler, getattr(loader, "batch_sampler", None)]
        found = [getattr(owner, "generator", None) for owner in (loader, *self._samplers)]
        # The user's own seeds are kept aside before they are first overwritten.
        self._generators = {id(g): (g, g.initial_seed()) for g in found if isinstance(g, torch.Generator)}

    def batch(self, step: int) -> Any:
        if step < 0:
            raise SparseForgeError(f"batch {step} does not exist: steps count from 0")
        while True:
            # With the size known the pass is computed; until then everything belongs to the first one.
            epoch, index = divmod(step, self._size) if self._size else (0, step)
            if epoch != self._epoch or index < self._next:
                self._begin(epoch)
            try:
                while self._next < index:
                    self._fetch()
                return self._fetch()
            except StopIteration:
                if self._size is not None or self._next == 0:
                    raise SparseForgeError(
                        f"the data ended after {self._next} batches where {self._size or 'some'} were expected: "
                        "it must give the same number every time it is iterated"
                    ) from None
                self._size = self._next

    def _begin(self, epoch: int) -> None:
        for sampler in self._samplers:
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(epoch)
        for generator, initial in self._generators.values():
            generator.manual_seed(self._mix(initial, epoch))
        with self._randomness(self._mix(epoch)):
            self._iterator = iter(self._loader)
        self._epoch, self._next = epoch, 0

    def _fetch(self) -> Any:
        with self._randomness(self._mix(self._epoch, self._next)):
            batch = next(self._iterator)
        self._next += 1
        return batch

    def _mix(self, *numbers: int) -> int:
        return int(_digest(self._seed, *numbers)[:15], 16)

    @contextmanager
    def _randomness(self, seed: int) -> Iterator[None]:
        """Samplers and data sets without a generator draw from torch's CPU generator: lent to them, then put back."""
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would also reset every GPU
        try:
            yield
        finally:
            torch.set_rng_state(state)
