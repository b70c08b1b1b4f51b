"""GGUF files through transformers, without its waits: the vocabulary in a header is parsed by arrays.

gguf's own reader makes some ten numpy views for each token of the vocabulary, its score and its type, and transformers
reads the header once for the config, once for the tokenizer and once for the weights: half a minute for 262,144 tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGUFValueType


class _QuickReader(gguf.GGUFReader):
    """The same fields with the same content as the reader that it stands for."""

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = np.asarray(mapped)  # slices of a plain array cost a third of those of a np.memmap

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        item, number, at = GGUFValueType(int(kind[0])), int(count[0]), orig_offs + 12
        parts = [kind, count]
        if item is GGUFValueType.STRING:
            for _ in range(number):
                size = self.data[at : at + 8].view(np.uint64)
                end = at + 8 + int(size[0])
                parts += (size, self.data[at + 8 : end])
                at = end
            where = list(range(3, 2 + 2 * number, 2))  # the characters; before each its length
        elif item in self.gguf_scalar_to_np:
            values = self._get(at, self.gguf_scalar_to_np[item], number)
            parts += list(values.reshape(number, 1))
            at += int(values.nbytes)
            where = list(range(2, 2 + number))
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return at - orig_offs, parts, where, [GGUFValueType.ARRAY, *([item] if number else [])]


@contextmanager
def quick_reader() -> Iterator[None]:
    """transformers' readers of GGUF files are quick inside: it imports the class by name whenever it reads one."""
    theirs = gguf.GGUFReader
    gguf.GGUFReader = _QuickReader  # type: ignore[misc]
    try:
        yield
    finally:
        gguf.GGUFReader = theirs  # type: ignore[misc]
