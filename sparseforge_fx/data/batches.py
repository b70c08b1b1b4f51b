"""Whatever a user calls data, as batches by step number."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DistributedSampler, IterableDataset

from sparseforge_fx.data.sources import stable_hash
from sparseforge_fx.data.tokens import TokenData, tokenize
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.ranges import Count, checked


# --------------------------------------------------------------------------------------------- batches by step number
class Batches(Protocol):
    """What a training loop draws from."""

    def batch(self, step: int) -> Any:
        """The batch of this step: a dict, tuple or tensor; the same one however often and in whatever order asked."""

    def first_pass(self) -> Iterator[Any]:
        """`batch(0)`, `batch(1)`, ... to the end of the data, without a sequence that comes a second time."""

    def passes(self, batches: int) -> float | None:
        """How often so many batches go over the data; None if its end has not been met."""


def leaves(batch: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(keys and indices on the way, value) of everything in a batch of nested dicts, lists and tuples, in order."""
    if isinstance(batch, Mapping | list | tuple):
        for key, value in batch.items() if isinstance(batch, Mapping) else enumerate(batch):
            yield from leaves(value, (*path, key))
    else:
        yield path, batch


def main_tensor(batch: Any) -> torch.Tensor:
    """What a batch is counted by: `input_ids`, else the first tensor that has rows.

    Raises SparseForgeError if there is none.
    """
    found = list(leaves(batch))
    tensors = [(path, value) for path, value in found if isinstance(value, torch.Tensor) and value.dim()]
    if tensors:
        return next((value for path, value in tensors if path == ("input_ids",)), tensors[0][1])
    kinds = ", ".join(sorted({type(value).__name__ for _, value in found})) or "nothing"
    raise SparseForgeError(
        f"a batch holds no tensor but {kinds}: give dicts, tuples or tensors of torch (of a tokenizer: "
        'return_tensors="pt")'
    )


def count_rows(batch: Any) -> int:
    """Sequences or samples of a batch."""
    return main_tensor(batch).shape[0]


def count_tokens(batch: Any) -> int:
    """Real tokens of a batch: ids or embeddings that its `attention_mask` does not hide; of anything else its rows."""
    first = main_tensor(batch)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    ids = first.dim() == 2 and not first.is_floating_point()
    if (
        isinstance(mask, torch.Tensor)
        and mask.dim() == 2
        and mask.shape == first.shape[:2]
        and (ids or first.dim() == 3)
    ):
        return int((mask != 0).sum())
    return first.numel() if ids else first.shape[0]


COUNTED = 1024  # batches of a run that are counted one by one before it starts


def count_steps(data: Batches, tokens: int, per_step: int) -> int:
    """The most steps, of `per_step` batches each (over all micro-batches and processes), that a budget allows.
    Batches are counted as they come; what lies beyond the first `COUNTED` is taken to be like these.

    Raises a SparseForgeError for a budget that allows none."""
    seen = 0
    steps = max(1, COUNTED // per_step)
    for step in range(steps):
        seen += sum(count_tokens(data.batch(step * per_step + k)) for k in range(per_step))
        if seen > tokens and not step:
            raise SparseForgeError(
                f"tokens {tokens} are less than one step of {seen}: raise them, or make the batches shorter or fewer"
            )
        if seen > tokens:
            return step
    return tokens * steps // max(1, seen)


@checked
def as_batches(
    data: Any,
    tokenizer: Any = None,
    *,
    batch_size: Count,
    length: int,
    seed: int,
    tokens: Count | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    text_column: str | None = None,
    separator: str | None = None,
) -> Batches:
    """Whatever a user calls data, as an object with `.batch(step)`.

    Args:
        data: one of
            - `TokenData` (keeps its own length);
            - text: any `source` of `load_text`, for which `tokenizer`, `tokens`, `cache_dir`, `text_column` and
              `separator` serve as in `tokenize`;
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
    elif is_text(data):
        if tokenizer is None:
            raise SparseForgeError(
                "text data needs a tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...), or copy one's files "
                "into the model's folder"
            )
        data = tokenize(
            data,
            tokenizer,
            length=length,
            seed=seed,
            tokens=tokens,
            cache_dir=cache_dir,
            text_column=text_column,
            separator=separator,
        )
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


def is_text(data: Any) -> bool:
    """Does it name or hold text, which must be tokenised?"""
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

    def first_pass(self) -> Iterator[dict[str, torch.Tensor]]:
        for step, start in enumerate(range(0, len(self.data), self.batch_size)):
            yield {name: rows[: len(self.data) - start] for name, rows in self.batch(step).items()}

    def passes(self, batches: int) -> float:
        return batches * self.batch_size / len(self.data)


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

    def first_pass(self) -> Iterator[Any]:
        for step in itertools.count():
            if self._size is not None and step >= self._size:
                return
            batch = self.batch(step)
            if self._size is not None and step >= self._size:  # the end was met just now
                return
            yield batch

    def passes(self, batches: int) -> float | None:
        return batches / self._size if self._size else None

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
        return int(stable_hash(self._seed, *numbers)[:15], 16)

    @contextmanager
    def _randomness(self, seed: int) -> Iterator[None]:
        """Samplers and data sets without a generator draw from torch's CPU generator: lent to them, then put back."""
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would also reset every GPU
        try:
            yield
        finally:
            torch.set_rng_state(state)
