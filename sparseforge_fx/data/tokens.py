"""Text in, batches of token ids out: read, cut, mix, tokenise once into a memory-mapped file, draw by batch number.

Everything is a pure function of (source, tokenizer, options, seed, batch number): a run killed at step k resumes at
step k with the same batches, and without reading those before it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparseforge_fx.data.chats import leading_bos
from sparseforge_fx.data.sources import open_sources, stable_hash
from sparseforge_fx.data.text import load_text
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.files import new_file
from sparseforge_fx.progress import counted

CACHE_FORMAT = 2  # part of every cache name: raise it when the same inputs would give other tokens


# ------------------------------------------------------------------------------------------------------ packed tokens
class TokenData:
    """Token ids packed to sequences of one length: no padding, every position real, the remainder left over.

    Args:
        ids: 1-D integer array [tokens] or tensor; a memory map (`np.memmap`, `np.load(mmap_mode="r")`) stays one.
        length: tokens per sequence.
        bos: a token in front of every sequence, one of its `length`; it is not among `ids`.
        notes: sentences on what of the text is not among them.

    `len(data)` is the number of full sequences.

    Raises:
        SparseForgeError: ids not integer or not 1-D, or fewer than one sequence of them.
    """

    def __init__(self, ids: Any, length: int, bos: int | None = None, notes: Sequence[str] = ()) -> None:
        array = ids.detach().cpu().numpy() if isinstance(ids, torch.Tensor) else ids
        if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
            shape = f"{getattr(array, 'dtype', type(ids).__name__)} {list(getattr(array, 'shape', []))}"
            raise SparseForgeError(
                f"token ids must be a 1-D integer array or tensor, not {shape}: flatten or tokenise first"
            )
        width = length if bos is None else length - 1
        if width < 1:
            raise SparseForgeError(f"length is {length}: a sequence needs at least {1 + length - width} tokens")
        if array.size < width:
            raise SparseForgeError(
                f"the data has {array.size} tokens, fewer than one sequence of {length}: "
                "give more text or a smaller length"
            )
        self.length, self.bos, self.notes = length, bos, tuple(notes)
        self.ids = array  # [tokens], in the stored integer type, with the remainder
        self._sequences = array[: array.size // width * width].reshape(-1, width)  # a view

    def __len__(self) -> int:
        return len(self._sequences)

    @functools.cached_property
    def fingerprint(self) -> str:
        """12 hexadecimal digits that depend on the token ids and the length, not on where or how they are stored."""
        shape = str(self.length) if self.bos is None else f"{self.length} behind {self.bos}"
        digest = hashlib.blake2b(shape.encode(), digest_size=6)
        for start in range(0, self.ids.size, 1 << 20):
            digest.update(np.ascontiguousarray(self.ids[start : start + (1 << 20)], dtype="<i8").tobytes())
        return digest.hexdigest()

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
        text = torch.from_numpy(self._sequences[within].astype(np.int64))
        return {
            "input_ids": text if self.bos is None else torch.cat([text.new_full((batch_size, 1), self.bos), text], 1)
        }


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
    tokens: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    separator: str | None = None,
    text_column: str | None = None,
    max_document_chars: int | None = 3000,
) -> TokenData:
    """Documents of `source` (see `load_text`), shuffled under `seed`, tokenised, joined and packed to `length` tokens.

    Args:
        tokenizer: a transformers tokenizer. Where it puts a beginning-of-sequence token, every sequence begins with
            it; it adds no other special token of its own.
        length: tokens per sequence. It does not change what is stored, so other lengths use the same cache file.
        seed: order of the documents; None keeps file order.
        tokens: exactly so many tokens, if there are that many; no more text is read than this needs.
        cache_dir: where the token file goes; default the Hugging Face home, `$HF_HOME/sparseforge_fx`.
        separator: text after every document; None: the tokenizer's end-of-sequence token, else its separator token.
        text_column, max_document_chars: see `load_text`. Pieces of a cut document are shuffled like documents, and each
            is followed by the separator.

    The file is named by a hash of the sources (names, sizes, modification times; a hub data set by its id alone), the
    tokenizer (vocabulary and rules) and the options; it appears whole or not at all, and the next call memory-maps it.
    A .json of the same name beside it holds the data's `notes`, where there are any.

    Raises:
        SparseForgeError: as `load_text`; no text; too little text; no end-of-sequence token; cache not writable.
    """
    if separator is None and _end(tokenizer) is None:
        raise SparseForgeError(
            "the tokenizer has no end-of-sequence token to put between documents: pass separator='\\n\\n'"
        )
    if tokens is not None and tokens < length:
        raise SparseForgeError(f"tokens={tokens} is less than one sequence: use at least length={length}")
    sources = open_sources(source)
    vocabulary = tokenizer.get_vocab()
    dtype = np.dtype(np.uint16 if max(vocabulary.values()) < 2**16 else np.uint32)
    options = (CACHE_FORMAT, seed, tokens, separator, text_column, max_document_chars)
    key = stable_hash(*(s.identity for s in sources), _tokenizer_identity(tokenizer, vocabulary), options)
    if cache_dir is None:
        from huggingface_hub.constants import HF_HOME

        cache_dir = Path(HF_HOME) / "sparseforge_fx"
    path = Path(cache_dir) / f"tokens-{key}.{dtype.name}.bin"
    notes = path.with_suffix(".json")
    if not path.exists():
        told: list[str] = []
        documents = load_text(
            source,
            text_column,
            seed=seed,
            max_document_chars=max_document_chars,
            stream=tokens is not None,
            tokenizer=tokenizer,
            told=told,
        )
        blocks = _token_blocks(documents, tokenizer, separator, tokens)
        nothing = f"{' and '.join(s.name for s in sources)} holds no text: check the source and its text column"
        _write(path, (np.asarray(block, dtype=dtype) for block in blocks), tokens, nothing, notes, told)
    said = json.loads(notes.read_text()) if notes.exists() else ()
    return TokenData(np.memmap(path, dtype=dtype, mode="r"), length, leading_bos(tokenizer), said)


def _end(tokenizer: Any) -> int | None:
    """What ends a document: encoders have a separator token for it."""
    ends = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("eos", "sep"))
    return next((end for end in ends if end is not None), None)


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
        end = [_end(tokenizer)] if separator is None else []
        block = [token for ids in encoded for token in itertools.chain(ids, end)]
        block = block if limit is None else block[: limit - written]
        written += len(block)
        yield block


def _write(
    path: Path, blocks: Iterable[np.ndarray], limit: int | None, nothing: str, notes: Path, told: list[str]
) -> None:
    """Tokens to `path`, which is replaced only by the finished file, and before it what was `told` while they were read
    to `notes`. Raises SparseForgeError `nothing` for none."""
    written = 0
    try:
        with (
            counted("tokenising", limit) as advance,
            new_file(path, shared=True) as partial,
            open(partial, "wb") as file,
        ):
            for block in blocks:
                file.write(block.tobytes())
                written += block.size
                advance(by=block.size)
            if not written:
                raise SparseForgeError(nothing)
            if told:
                with new_file(notes, shared=True) as text:
                    text.write_text(json.dumps(told))
    except OSError as error:
        raise SparseForgeError(
            f"cannot write the token cache in {path.parent} ({error}): choose another cache_dir, or HF_HOME"
        ) from error


def _tokenizer_identity(tokenizer: Any, vocabulary: Mapping[str, int]) -> tuple[Any, ...]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # not built on the `tokenizers` library
        content = repr(sorted(vocabulary.items()))
    else:  # vocabulary, merges, normalisation, pre-tokenisation; less what the last call happened to leave behind
        content = repr(json.loads(backend.to_str()) | {"truncation": None, "padding": None})
    template = stable_hash(getattr(tokenizer, "chat_template", None))
    return (type(tokenizer).__name__, _end(tokenizer), stable_hash(content), template)
