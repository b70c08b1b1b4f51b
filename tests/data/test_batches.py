"""Whatever a user calls data, as batches by step number."""


import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from sparseforge_fx.data.batches import as_batches, count_rows, count_steps, count_tokens
from sparseforge_fx.data.tokens import TokenData
from sparseforge_fx.errors import SparseForgeError

# --------------------------------------------------------------------------------------------------------- as_batches
OPTIONS = {"batch_size": 2, "length": 4, "seed": 5}


def test_text_and_ids_become_packed_batches(tokenizer, tmp_path):
    batches = as_batches(["abcdefgh"] * 9, tokenizer, cache_dir=tmp_path, **OPTIONS)
    assert batches.batch(3)["input_ids"].shape == (2, 4)
    flat = as_batches(torch.arange(40), **OPTIONS)
    assert torch.equal(flat.batch(7)["input_ids"], TokenData(np.arange(40), 4).batch(7, 2, 5)["input_ids"])
    rows = as_batches(torch.arange(40).reshape(8, 5), **OPTIONS)
    assert rows.batch(0)["input_ids"].shape == (2, 5) and not (rows.batch(0)["input_ids"][:, 0] % 5).any()
    assert as_batches(list(range(40)), **OPTIONS).batch(0)["input_ids"].shape == (2, 4)
    packed = TokenData(np.arange(40), 8)
    assert torch.equal(as_batches(packed, **OPTIONS).batch(1)["input_ids"], packed.batch(1, 2, 5)["input_ids"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ["some text"], "needs a tokenizer"),
        (lambda: (b for b in [torch.zeros(1)]), "generator can be read only once"),
        (lambda: iter([torch.zeros(1)]), "list_iterator can be read only once"),
        (lambda: [], "holds no batch"),
        (lambda: 3, "type int"),
        (lambda: torch.zeros(4, 4), "1-D integer"),
        (lambda: torch.zeros(2, 2, 2, dtype=torch.long), "1-D integer"),
    ],
)
def test_unusable_data_is_refused(make, message):
    with pytest.raises(SparseForgeError, match=message):
        as_batches(make(), **OPTIONS)


def test_tokenised_data_sets_must_come_as_a_loader(tokenizer):

    with pytest.raises(SparseForgeError, match="DataLoader"):
        as_batches(datasets.Dataset.from_dict({"input_ids": [[1, 2]]}), tokenizer, **OPTIONS)


def test_batches_pass_through_unchanged_and_cycle():
    given_batches = [{"x": torch.zeros(1)}, (torch.ones(1), 2), torch.zeros(3)]
    batches = as_batches(given_batches, **OPTIONS)
    assert [batches.batch(step) for step in range(7)][4] is given_batches[1]
    assert batches.batch(2) is given_batches[2]  # going back
    single = {"input_ids": torch.zeros(2, 4)}
    assert as_batches(single, **OPTIONS).batch(5) is single


class Endless:
    """Re-iterable of unknown length: 0 1 2, 0 1 2, ..."""

    def __iter__(self):
        return iter([0, 1, 2])


class Rows(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(5))

    def __len__(self):
        return 1000  # wrong, as iterable data sets' lengths may be


def test_passes_of_unknown_length_are_counted():
    assert [as_batches(Endless(), **OPTIONS).batch(step) for step in (0, 4, 11)] == [0, 1, 2]
    forward = as_batches(Endless(), **OPTIONS)
    assert [forward.batch(step) for step in (0, 1, 2, 3, 4, 9, 1)] == [0, 1, 2, 0, 1, 0, 1]
    loader = as_batches(DataLoader(Rows(), batch_size=2), **OPTIONS)
    assert [loader.batch(step).tolist() for step in (0, 2, 3)] == [[0, 1], [4], [0, 1]]


def test_data_that_ends_early_is_an_error():
    class Short(Endless):
        def __len__(self):
            return 5

    with pytest.raises(SparseForgeError, match="ended after 3 batches where 5"):
        as_batches(Short(), **OPTIONS).batch(3)


class Noisy(torch.utils.data.Dataset):
    """Draws from torch's global generator, as augmentations do."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor(float(index)) + torch.rand(())


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_shuffling_loader_is_a_function_of_the_step(own_generator):
    def build(seed=5, own=1):
        generator = torch.Generator().manual_seed(own) if own_generator else None
        loader = DataLoader(Noisy(), batch_size=3, shuffle=True, generator=generator)
        return as_batches(loader, batch_size=1, length=1, seed=seed)

    torch.manual_seed(0)
    straight = build()
    expected = [straight.batch(step) for step in range(9)]
    assert not torch.equal(expected[0].floor(), expected[4].floor())  # another order in the second pass
    torch.manual_seed(1)
    resumed = build()
    for step in (6, 7, 8, 1, 0):  # later, on, across, back
        assert torch.equal(resumed.batch(step), expected[step])
    assert not torch.equal(build(seed=6).batch(0), expected[0])
    if own_generator:
        assert not torch.equal(build(own=2).batch(0).floor(), expected[0].floor())


def test_drawing_batches_leaves_the_global_generator_alone():
    batches = as_batches(DataLoader(Noisy(), batch_size=3, shuffle=True), **OPTIONS)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    batches.batch(2)
    assert torch.equal(torch.rand(3), expected)


# -- counting --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("batch", "tokens", "rows"),
    [
        ({"input_ids": torch.ones(2, 5, dtype=torch.long)}, 10, 2),
        ({"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.tensor([[1] * 5, [0] * 3 + [1] * 2])}, 7, 2),
        ({"name": "a", "labels": torch.ones(3), "input_ids": torch.ones(3, 4, dtype=torch.long)}, 12, 3),
        ({"inputs_embeds": torch.ones(2, 5, 8), "attention_mask": torch.tensor([[1] * 5, [1] + [0] * 4])}, 6, 2),
        ({"pixels": torch.ones(3, 1, 4, 4)}, 3, 3),
        ((torch.tensor(0.5), "text", torch.ones(4, 16)), 4, 4),
        (torch.ones(6, 16), 6, 6),
    ],
)  # fmt: skip
def test_tokens_and_rows_of_a_batch(batch, tokens, rows):
    """Padding does not count; what has no tokens counts its rows; names, texts and scalars are passed over."""
    assert (count_tokens(batch), count_rows(batch)) == (tokens, rows)


def test_a_batch_without_a_tensor():
    with pytest.raises(SparseForgeError, match="no tensor but str"):
        count_rows({"text": "a"})


def test_steps_within_a_budget_by_what_the_batches_hold():
    """Batches of 4, 4 and 1, over and over."""
    data = as_batches([torch.ones(n, 8) for n in (4, 4, 1)], batch_size=7, length=9, seed=0)
    assert [count_steps(data, tokens, 1) for tokens in (4, 8, 9, 12, 13, 18)] == [1, 2, 3, 3, 4, 6]
    assert [count_steps(data, tokens, 2) for tokens in (8, 12, 13, 18)] == [1, 1, 2, 3]  # steps of 8, 5, 5
    assert abs(count_steps(data, 9 * 1024, 1) - 3 * 1024) <= 1  # beyond what is counted one by one
    for tokens, per_step, step in ((1, 1, 4), (7, 2, 8)):
        with pytest.raises(SparseForgeError, match=f"tokens {tokens} are less than one step of {step}: raise them"):
            count_steps(data, tokens, per_step)


@pytest.mark.parametrize("known", [True, False], ids=["with len", "without len"])
def test_first_pass_ends_where_the_data_does(known):
    class Endless:
        def __iter__(self):
            return iter([torch.full((2, 8), float(k)) for k in range(3)])

    data = as_batches(list(Endless()) if known else Endless(), batch_size=1, length=1, seed=0)
    assert data.passes(6) == (2 if known else None)
    assert [b[0, 0].item() for b in data.first_pass()] == [0, 1, 2]
    assert [b[0, 0].item() for b in data.first_pass()] == [0, 1, 2]
    assert data.passes(6) == 2


def test_first_pass_of_sequences_has_none_twice():
    data = as_batches(torch.arange(10 * 7).reshape(10, 7), batch_size=4, length=1, seed=3)
    batches = [b["input_ids"] for b in data.first_pass()]
    assert [len(b) for b in batches] == [4, 4, 2]
    assert sorted(torch.cat(batches)[:, 0].tolist()) == list(range(0, 70, 7))
    assert data.passes(5) == 2
