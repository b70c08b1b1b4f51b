"""Packed tokens: what a sequence is, the order of them, and the cache."""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text_data import counted, drawn, jsonl, make_tokenizer, write
from transformers import PreTrainedTokenizerFast

from sparseforge_fx.data.chats import leading_bos
from sparseforge_fx.data.tokens import TokenData, tokenize
from sparseforge_fx.errors import SparseForgeError


# ------------------------------------------------------------------------------------------- beginning of the sequence
def test_every_sequence_begins_as_the_tokenizer_begins_a_text(tmp_path):
    plain, puts = make_tokenizer(), make_tokenizer(puts_bos=True)
    bos = puts.bos_token_id
    assert leading_bos(plain) is None and leading_bos(puts) == bos
    puts.save_pretrained(tmp_path / "tokenizer")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    assert leading_bos(again) == bos, "whatever its attributes say"
    texts = ["abcdefgh", "ijklmn"]
    one, two = (tokenize(texts, t, length=5, seed=None, cache_dir=tmp_path) for t in (plain, puts))
    assert (two.ids == one.ids).all() and bos not in two.ids
    assert two.batch(0, 3, None)["input_ids"].tolist() == [[bos, *one.ids[4 * i : 4 * i + 4]] for i in range(3)]
    assert two.fingerprint != one.fingerprint and two.ids.size == one.ids.size == 16


def test_a_tokenizer_that_has_a_bos_and_does_not_put_it():
    assert leading_bos(make_tokenizer(bos_token="<eos>")) is None


# ---------------------------------------------------------------------------------------------------------- TokenData
def test_packing_keeps_order_and_leaves_the_remainder(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(11, dtype=np.uint16))
    packed = TokenData(np.load(tmp_path / "ids.npy", mmap_mode="r"), 4)
    assert len(packed) == 2 and packed.ids.size == 11
    assert isinstance(packed.ids, np.memmap)
    batch = packed.batch(0, 2, None)["input_ids"]
    assert batch.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] and batch.dtype == torch.long


@pytest.mark.parametrize(
    ("ids", "length", "message"),
    [
        (np.arange(3), 4, "3 tokens, fewer than one sequence of 4"),
        (np.arange(0), 4, "0 tokens"),
        (np.zeros(8), 4, "1-D integer"),
        (torch.zeros(2, 4, dtype=torch.long), 4, r"1-D integer.*\[2, 4\]"),
        ([1, 2, 3], 2, "1-D integer"),
        (np.arange(3), 0, "length is 0"),
    ],
)
def test_unusable_ids_are_refused(ids, length, message):
    with pytest.raises(SparseForgeError, match=message):
        TokenData(ids, length)


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 17), batch_size=st.integers(1, 7), seed=st.one_of(st.none(), st.integers(-3, 2**70)))
def test_every_epoch_draws_every_sequence_once(n, batch_size, seed):
    packed = counted(n)
    seen = [i for k in range(-(-3 * n // batch_size)) for i in drawn(packed.batch(k, batch_size, seed))]
    for epoch in range(3):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))
    # Batch size cuts the same order differently.
    assert seen[:n] == [drawn(packed.batch(k, 1, seed))[0] for k in range(n)]
    if seed is None:
        assert seen[:n] == list(range(n))


def test_order_depends_on_seed_and_epoch():
    packed = counted(50)
    first, again, other = (drawn(packed.batch(0, 50, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert drawn(packed.batch(1, 50, 1)) != first != list(range(50))


def test_a_batch_is_found_without_those_before_it():
    far = 10**15  # walking there would never end
    seen = [i for k in range(far, far + 7) for i in drawn(counted(7).batch(k, 4, 3))]
    begun = -4 * far % 7  # what is left of the epoch that the first of them falls into
    assert sorted(seen[begun : begun + 7]) == sorted(seen[begun + 7 : begun + 14]) == list(range(7))
    with pytest.raises(SparseForgeError, match="batch -1"):
        counted(7).batch(-1, 4, 3)


def test_fingerprint_is_about_the_tokens(tmp_path):
    ids = np.arange(64)
    (tmp_path / "x.bin").write_bytes(ids.astype(np.uint16).tobytes())
    same = [ids, ids.astype(np.int32), torch.from_numpy(ids), np.memmap(tmp_path / "x.bin", np.uint16, "r")]
    assert len({TokenData(each, 8).fingerprint for each in same}) == 1
    changed = ids.copy()
    changed[63] = 0
    prints = {TokenData(ids, 8).fingerprint, TokenData(changed, 8).fingerprint, TokenData(ids, 16).fingerprint}
    assert len(prints) == 3 and all(len(p) == 12 for p in prints)


# ----------------------------------------------------------------------------------------------------------- tokenize
def test_documents_are_joined_by_the_separator(tokenizer, tmp_path):
    texts = ["abc", " ", "", "d\u20ac"]
    packed = tokenize(texts, tokenizer, length=4, seed=None, cache_dir=tmp_path)
    assert tokenizer.decode(packed.ids) == "abc<eos>d\u20ac<eos>"
    assert packed.ids.dtype == np.uint16 and isinstance(packed.ids, np.memmap)
    joined = tokenize(texts, tokenizer, length=4, seed=None, cache_dir=tmp_path, separator="\n\n")
    assert tokenizer.decode(joined.ids) == "abc\n\nd\u20ac\n\n"


def test_documents_are_shuffled_under_the_seed(tokenizer, tmp_path):
    texts = [f"{i:03}" for i in range(300)]
    one, two = (tokenize(texts, tokenizer, length=4, seed=seed, cache_dir=tmp_path) for seed in (1, 2))
    pieces = [tokenizer.decode(p.ids).split("<eos>")[:-1] for p in (one, two)]
    assert pieces[0] != pieces[1] != texts and sorted(pieces[0]) == sorted(pieces[1]) == texts


def test_long_documents_are_cut_before_they_are_shuffled(tokenizer, tmp_path):
    packed = tokenize(["x" * 25, "y" * 25], tokenizer, length=4, cache_dir=tmp_path, max_document_chars=10)
    assert sorted(map(len, tokenizer.decode(packed.ids).split("<eos>")[:-1])) == [5, 5, 10, 10, 10, 10]


class Counting:
    """A tokenizer that counts the texts it is given, and can break at a given one."""

    def __init__(self, inner, break_at=None):
        self.inner, self.break_at, self.count = inner, break_at, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, texts, **options):
        self.count += len(texts)
        if self.break_at is not None and self.count > self.break_at:
            raise KeyboardInterrupt
        return self.inner(texts, **options)


def test_the_token_limit_is_exact_and_stops_the_work(tokenizer, tmp_path):
    counting = Counting(tokenizer)
    packed = tokenize(["abcdefghi"] * 5000, counting, length=8, tokens=2500, cache_dir=tmp_path)
    assert packed.ids.size == 2500 and counting.count <= 600
    with pytest.raises(SparseForgeError, match="tokens=7"):
        tokenize(["abc"], tokenizer, length=8, tokens=7, cache_dir=tmp_path)


def test_the_second_call_reads_the_cache(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl(["abc", "def"]))
    options = {"cache_dir": tmp_path / "cache", "length": 4}
    counting = Counting(tokenizer)
    first = tokenize(path, counting, **options)
    done = counting.count
    assert done == 2 and tokenize(path, counting, **options).fingerprint == first.fingerprint
    tokenizer("abc", truncation=True, max_length=2)  # leaves its traces in the tokenizer
    assert tokenize(path, counting, **{**options, "length": 2}).length == 2
    assert counting.count == done and len(list((tmp_path / "cache").glob("*.bin"))) == 1


@pytest.mark.parametrize(
    "change", ["nothing", "file", "seed", "limit", "separator", "column", "pieces", "merges", "eos"]
)
def test_the_cache_notices_a_change(tmp_path, change):
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "abcabcabc", "title": "abcabcab"}))
    base = {"cache_dir": tmp_path / "cache", "length": 2}
    tokenize(path, Counting(make_tokenizer([("b", "c")], eos="<eos>", pad_token="a")), **base)
    if change == "file":
        os.utime(path, ns=(1, 1))
    changed = {
        "seed": {"seed": 1},
        "limit": {"tokens": 3},
        "separator": {"separator": "\n"},
        "column": {"text_column": "title"},
        "pieces": {"max_document_chars": 4},
    }.get(change, {})
    eos, pad = ("a", "<eos>") if change == "eos" else ("<eos>", "a")  # the same special tokens in other roles
    merges = [("a", "b")] if change == "merges" else [("b", "c")]
    counting = Counting(make_tokenizer(merges, eos=eos, pad_token=pad))
    tokenize(path, counting, **base, **changed)
    files = len(list((tmp_path / "cache").glob("*.bin")))
    assert (files, counting.count > 0) == ((1, False) if change == "nothing" else (2, True))


def test_a_broken_run_leaves_nothing_behind(tokenizer, tmp_path):
    texts = ["abc"] * 1000
    with pytest.raises(KeyboardInterrupt):
        tokenize(texts, Counting(tokenizer, break_at=500), length=4, cache_dir=tmp_path)
    assert os.listdir(tmp_path) == []
    assert tokenize(texts, tokenizer, length=4, cache_dir=tmp_path).ids.size == 4000


def test_large_vocabularies_get_wide_ids(tmp_path):
    wide = make_tokenizer(unused=70_000)
    packed = tokenize(["a"], wide, length=2, cache_dir=tmp_path)
    assert packed.ids.dtype == np.uint32 and packed.ids[:2].tolist() == [*wide("a")["input_ids"], 70_256]


def test_tokenize_says_what_is_missing(tokenizer, tmp_path):
    with pytest.raises(SparseForgeError, match=r"no end-of-sequence token.*separator"):
        tokenize(["abc"], make_tokenizer(eos=None), cache_dir=tmp_path)
    with pytest.raises(SparseForgeError, match="list of texts holds no text"):
        tokenize(["", "\n"], tokenizer, cache_dir=tmp_path)
    assert os.listdir(tmp_path) == []
    with pytest.raises(SparseForgeError, match="4 tokens, fewer than one sequence of 512"):
        tokenize(["abc"], tokenizer, cache_dir=tmp_path)
    write(tmp_path / "file", "")
    with pytest.raises(SparseForgeError, match="cannot write the token cache"):
        tokenize(["abc"], tokenizer, length=2, cache_dir=tmp_path / "file")


def test_long_documents_raise_no_length_warning(tmp_path):
    short = make_tokenizer(model_max_length=4)
    tokenize(["abcdefgh"], short, length=4, cache_dir=tmp_path)
    assert not short.deprecation_warnings
