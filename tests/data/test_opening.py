"""Data as the batches that a model is to see: the first of them, text that it draws, sequences that are too long."""

import pytest
import torch
from tiny_checkpoint import byte_tokenizer, tiny_llama

from sparseforge_fx.data.batches import as_batches
from sparseforge_fx.data.opening import (
    LENGTH,
    PACKING,
    TEXT,
    first_batches,
    idle_reading,
    open_batches,
    tell_length,
    tell_text,
)
from sparseforge_fx.errors import SparseForgeError

HOW = {"tokens": 40, "batch_size": 2, "length": 8, "seed": 0}


@pytest.mark.parametrize(
    ("sequences", "rows", "told"),
    [(5, [2, 2, 2], []), (99, [2] * 5, ["asked for 99 calibration sequences, the data has 10"])],
)
def test_the_first_batches(sequences, rows, told):
    batches, said = first_batches(open_batches(None, torch.arange(80).view(10, 8), **HOW), sequences)
    assert [len(b["input_ids"]) for b in batches] == rows and said == told


def test_text_of_the_model_itself():
    ids = open_batches(tiny_llama(), "self", **HOW).batch(0)["input_ids"]
    assert ids.shape == (2, 8) and torch.equal(ids, open_batches(tiny_llama(), "self", **HOW).batch(0)["input_ids"])


def test_what_of_text_is_not_read_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "some words and more", "title": "b"}\n')
    (tmp_path / "b.pdf").write_text("no text")
    batches = open_batches(None, tmp_path, byte_tokenizer(), **HOW, cache_dir=tmp_path / ".cache")
    files, columns = tell_text(tmp_path, batches, None)
    assert "not read, as they are no text: b.pdf" in files and columns.endswith("column text, not from title")
    assert tell_text("self", batches, None) == tell_text(torch.arange(9), batches, None) == []


@pytest.mark.parametrize("data", ["self", ["a text"]])
def test_sequences_that_are_too_long(data):
    with pytest.raises(SparseForgeError, match="sequences of 129 tokens are longer than the model's 128 positions"):
        open_batches(tiny_llama(), data, byte_tokenizer(), **HOW | {"length": 129})


@pytest.mark.parametrize("data", ["self", ["a text"] * 999])
def test_sequences_of_the_default_length_are_as_long_as_the_model_takes(data):
    batches = open_batches(tiny_llama(), data, byte_tokenizer(), **HOW | {"length": LENGTH, "tokens": 2000})
    assert batches.batch(0)["input_ids"].shape == (2, 128)
    assert tell_length(data, batches, LENGTH) == ["sequences have 128 tokens, all that the model has positions for"]
    assert tell_length(data, batches, 128) == tell_length(torch.arange(9), batches, LENGTH) == []
    long = tiny_llama()
    long.config.max_position_embeddings = 2048
    batches = open_batches(long, data, byte_tokenizer(), **HOW | {"length": LENGTH, "tokens": 2000})
    assert batches.batch(0)["input_ids"].shape[1] == LENGTH and tell_length(data, batches, LENGTH) == []


def test_what_has_no_part_in_how_data_are_read():
    rows = as_batches(torch.zeros(4, 8, dtype=torch.long), batch_size=2, length=5, seed=0)
    assert set(idle_reading("self", rows, 8)) == {"text_column", "separator", "cache_dir"}
    assert set(idle_reading(torch.zeros(4, 8), rows, 5)) == {*TEXT, "length"}
    own = as_batches([torch.zeros(4, 8)], batch_size=2, length=5, seed=0)
    assert set(idle_reading([torch.zeros(4, 8)], own, 5)) == {*TEXT, *PACKING}
    assert idle_reading(["a text"], rows, 8) == {}
