"""Prompts as token ids: padded on the left, refused where a row would hold nothing or cannot be padded."""

import pytest
from tiny_checkpoint import write_checkpoint
from transformers import AutoTokenizer

from sparseforge_fx.data.prompts import prompt_batch
from sparseforge_fx.errors import SparseForgeError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("prompts") / "model")


def test_rows_end_with_their_prompt(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = prompt_batch(tokenizer, ["The fox", "dog"])
    assert batch.keys() == {"input_ids", "attention_mask"} and batch["input_ids"].shape == batch["attention_mask"].shape
    assert bool(batch["attention_mask"][:, -1].all()) and not bool(batch["attention_mask"][1, 0])
    for row, mask, text in zip(batch["input_ids"], batch["attention_mask"], ["The fox", "dog"], strict=True):
        assert tokenizer.decode(row[mask.bool()]) == text


@pytest.mark.parametrize("prompts", [[], [""], ["dog", ""], ["", "dog"]])
def test_a_prompt_without_tokens_is_refused(folder, prompts):
    with pytest.raises(SparseForgeError, match="has no tokens"):
        prompt_batch(AutoTokenizer.from_pretrained(folder), prompts)


def test_without_a_token_to_pad_with_one_prompt_and_equal_ones_will_do(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token = None
    assert prompt_batch(tokenizer, ["dog"])["input_ids"].shape == (1, 3)
    assert prompt_batch(tokenizer, ["dog", "fox"])["input_ids"].shape == (2, 3)
    with pytest.raises(SparseForgeError, match="no padding token"):
        prompt_batch(tokenizer, ["dog", "The fox"])
