"""One stream of documents from all sources: read, cut, shuffled, in turns."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any

from sparseforge_fx.data.rows import Column
from sparseforge_fx.data.sources import open_sources
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.ranges import CountFromZero, checked

SHUFFLE_BUFFER = 50_000  # documents held for shuffling, shared by all sources: 150 MB of text at 3000 characters each
STREAM_BUFFER = 10_000  # the same for what comes over the network, because the buffer is filled before the first batch


@checked
def load_text(
    source: Any,
    text_column: str | None = None,
    limit: CountFromZero | None = None,
    *,
    seed: int | None = None,
    max_document_chars: int | None = None,
    stream: bool = False,
    tokenizer: Any = None,
    told: list[str] | None = None,
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
        told: takes a sentence for rows of which columns of text are not read, while they are.
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
            texts = opened.read(Column(text_column, tokenizer, told), stream)
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
