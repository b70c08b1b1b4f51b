"""Text sources, packing, cache and batches by step number."""

import bz2
import gzip
import json
import lzma
import os
import random
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast

from sparseforge_fx.data.batches import as_batches, count_rows, count_steps, count_tokens
from sparseforge_fx.data.chats import leading_bos
from sparseforge_fx.data.sources import unused_text
from sparseforge_fx.data.text import _shuffled, load_text
from sparseforge_fx.data.tokens import TokenData, tokenize
from sparseforge_fx.errors import SparseForgeError


def make_tokenizer(merges=(), eos="<eos>", unused=0, puts_bos=False, **options):
    """One token per byte, ids 0-255, merges after them, unused ids, then <eos>. ``puts_bos``: <s> before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: i
        for i, token in enumerate(
            [*alphabet, *("".join(m) for m in merges), *(f"<{i}>" for i in range(unused)), "<eos>"]
        )
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if puts_bos:
        backend.add_special_tokens(["<s>"])
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
        options["bos_token"] = "<s>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, **options)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def counted(sequences, length=3):
    """Sequence i holds only the number i: shows which one was drawn."""
    return TokenData(np.repeat(np.arange(sequences), length), length)


def drawn(batch):
    return batch["input_ids"][:, 0].tolist()


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


# -------------------------------------------------------------------------------------------------------- text sources
def zst_open(path, mode):
    import pyarrow

    return pyarrow.output_stream(str(path), compression="zstd")


def write(path: Path, content) -> Path:
    openers = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": zst_open}
    opener = openers.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write(content.encode())
    return path


def jsonl(texts, column="text"):
    return "".join(json.dumps({"title": "t", column: text}) + "\n" for text in texts)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "a.txt.xz", "A.TXT"])
def test_a_text_file_is_one_document_byte_for_byte(tmp_path, name):
    text = "one\r\n\n two\n\u20ac "
    assert list(load_text(write(tmp_path / name, text))) == [text]


EVERY_KIND = [
    "jsonl",
    "jsonl.gz",
    "jsonl.xz",
    "jsonl.bz2",
    "jsonl.zst",
    "json",
    "json.gz",
    "csv",
    "csv.xz",
    "parquet",
    "arrow",
]


@pytest.mark.parametrize("extension", EVERY_KIND)
def test_rows_are_documents(tmp_path, extension):
    texts = ["one", "two, \u20ac", "three\nlines"]
    path = tmp_path / f"a[1].{extension}"  # brackets would be a pattern to `datasets`
    if extension.startswith("jsonl"):
        write(path, jsonl(texts))
    else:
        import pandas

        frame = pandas.DataFrame({"title": "t", "text": texts, "n": range(3)})
        if extension.startswith("json"):
            frame.to_json(path, orient="records")  # compressed as the name says
        elif extension.startswith("csv"):
            frame.to_csv(path, index=False)
        elif extension == "arrow":
            saved = datasets.Dataset.from_pandas(frame)
            saved.save_to_disk(tmp_path / "saved")
            assert list(load_text(tmp_path / "saved")) == texts
            os.rename(next((tmp_path / "saved").glob("*.arrow")), path)
        else:
            frame.to_parquet(path)
    assert list(load_text(str(path))) == texts
    assert list(load_text(path, limit=2)) == texts[:2]
    assert list(load_text(path, "title")) == ["t"] * 3


@pytest.mark.parametrize(
    ("row", "wanted", "found"),
    [
        ({"title": "a", "content": "b"}, None, "b"),
        ({"id": 1, "Passage": "b", "x": "c"}, None, "b"),
        ({"id": 1, "odd": "b"}, None, "b"),
        ({"text": "a", "other": "b"}, "other", "b"),
        ({"answer": "a", "question": "b"}, None, "b\na"),
        ({"Answer": "a", "Question": "b"}, None, "b\na"),
        ({"instruction": "a", "input": "", "output": "c", "id": "x"}, None, "a\nc"),
        ({"left": "a", "right": "b"}, "right, left", "b\na"),
    ],
)
def test_the_text_column_is_found(tmp_path, row, wanted, found):
    assert list(load_text(write(tmp_path / "a.jsonl", json.dumps(row)), wanted)) == [found]


@pytest.mark.parametrize(
    ("row", "wanted", "message"),
    [
        ({"left": "a", "right": "b"}, None, "stands out.*left, right"),
        ({"left": "a", "right": "b"}, "left,middle", "no column 'left,middle'.*left, right"),
        ({"n": 1}, None, "stands out.*: n"),
        ({"text": "a"}, "txt", "no column 'txt'.*: text"),
        ({"text": ["a"], "n": 1}, None, "list in row 1.*text, n"),
        (["a"], None, "row 1 .* is a list"),
    ],
)
def test_no_text_column_names_the_columns(tmp_path, row, wanted, message):
    with pytest.raises(SparseForgeError, match=message):
        list(load_text(write(tmp_path / "a.jsonl", json.dumps(row)), wanted))


def test_a_folder_is_read_in_sorted_order(tmp_path):
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    write(tmp_path / "b.txt", "2")
    write(tmp_path / "a.jsonl", jsonl(["0", "1"]))
    write(tmp_path / "sub" / "a.txt", "3")
    for ignored in ("README.md", "picture.png", "sub/.git/a.txt"):
        write(tmp_path / ignored, "no data")
    assert list(load_text(tmp_path)) == ["0", "1", "2", "3"]


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path):
    write(tmp_path / "a.txt", "1")
    assert unused_text(tmp_path, None) == []
    for name in ("b.pdf", "c.docx", "README.md", ".hidden"):
        write(tmp_path / name, "no text")
    (told,) = unused_text([str(tmp_path)], None)
    assert "2 files" in told and "b.pdf, c.docx" in told
    assert unused_text(tmp_path / "a.txt", "body") == ["text_column is given and not used: the text has no columns"]
    assert unused_text(write(tmp_path / "a.jsonl", jsonl(["1"])), "text") == []
    (tmp_path / "only").mkdir()
    write(tmp_path / "only" / "d.pdf", "no text")
    with pytest.raises(SparseForgeError, match=r"holds no text file.*d\.pdf"):
        load_text(tmp_path / "only")


def test_splits_of_a_saved_data_set_are_named(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path)
    with pytest.raises(SparseForgeError, match="splits train, test"):
        load_text(tmp_path)
    assert list(load_text(tmp_path / "train")) == ["a"]
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "one")
    assert list(load_text(tmp_path / "one")) == ["a"]


# --------------------------------------------------------------------------------------------------------------- chats
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
OPENAI = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    "row", [{"messages": OPENAI}, {"id": "x", "conversations": SHAREGPT}, {"messages": OPENAI, "prompt": "p", "n": 1}]
)
@pytest.mark.parametrize("kind", ["jsonl", "data set"])
def test_chats_go_through_the_tokenizers_template(tmp_path, row, kind):
    puts = make_tokenizer(puts_bos=True)
    puts.chat_template = TEMPLATE
    source = datasets.Dataset.from_list([row])
    if kind == "jsonl":
        source = write(tmp_path / "a.jsonl", json.dumps(row))
    assert list(load_text(source, tokenizer=puts)) == ["<user>a<assistant>b"]
    data = tokenize(source, puts, length=8, cache_dir=tmp_path)
    assert data.batch(0, 1, None)["input_ids"][0, 0] == puts.bos_token_id and puts.bos_token_id not in data.ids, (
        "once, and in front"
    )
    puts.chat_template = TEMPLATE.replace("<", "[")
    assert list(tokenize(source, puts, length=8, cache_dir=tmp_path).ids) != list(data.ids), "no stale cache"


@pytest.mark.parametrize("kind", ["jsonl", "data set"])
def test_a_system_column_beside_a_chat(tmp_path, kind, tokenizer):
    marked = make_tokenizer(bos_token="<eos>")  # the template's marker, which the tokenizer itself puts nowhere
    marked.chat_template = TEMPLATE
    row = {"system": "s", "conversations": SHAREGPT}
    source = datasets.Dataset.from_list([row])
    if kind == "jsonl":
        source = write(tmp_path / "a.jsonl", json.dumps(row))
    assert list(load_text(source, tokenizer=marked)) == ["<eos><system>s<user>a<assistant>b"]


def test_chats_that_cannot_be_written_out(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": OPENAI}))
    for tok, message in ((None, "no tokenizer"), (tokenizer, "no chat template")):
        with pytest.raises(SparseForgeError, match=f"messages of .* in row 1 is a chat and .*{message}"):
            list(load_text(path, tokenizer=tok))
    strict = make_tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SparseForgeError, match=r"row 1 does not go through .*roles must alternate"):
        list(load_text(path, tokenizer=strict))
    empty = write(tmp_path / "b.jsonl", json.dumps({"messages": []}))
    with pytest.raises(SparseForgeError, match="stands out"):
        list(load_text(empty, tokenizer=strict))


def test_what_ends_a_document(tmp_path):
    """An encoder's tokenizer has a separator token and no end of sequence."""
    encoder = make_tokenizer(eos=None, sep_token="<eos>")
    ids = tokenize(["ab", "cd"], encoder, length=3, seed=None, cache_dir=tmp_path).ids
    assert list(ids[[2, 5]]) == [encoder.sep_token_id] * 2


def test_datasets_objects_are_sources():
    rows = datasets.Dataset.from_dict({"n": [1, 2], "text": ["a", "b"]})
    assert list(load_text(rows)) == ["a", "b"] == list(load_text(rows.to_iterable_dataset()))
    with pytest.raises(SparseForgeError, match="DatasetDict"):
        load_text(datasets.DatasetDict(train=rows))


@pytest.fixture
def three(tmp_path):
    return [
        write(tmp_path / f"{name}.jsonl", jsonl([f"{name}{i}" for i in range(n)]))
        for name, n in zip("abc", (40, 20, 9), strict=True)
    ]


def test_sources_take_turns_until_each_ends(three):
    mixed = list(load_text(three))
    assert mixed == list(load_text(",".join(map(str, three)))) == list(load_text([str(p) for p in three]))
    assert mixed[:4] == ["a0", "b0", "c0", "a1"]
    assert [text[0] for text in mixed[:27]] == list("abc" * 9)
    assert [text[0] for text in mixed[27:49]] == list("ab" * 11) and mixed[49:] == [f"a{i}" for i in range(20, 40)]


def test_shuffling_is_seeded_complete_and_even(three):
    one, again, other = (list(load_text(three, seed=seed)) for seed in (1, 1, 2))
    assert one == again != other
    assert [text for text in one if text[0] == "a"] != [f"a{i}" for i in range(40)]
    assert sorted(one) == sorted(load_text(three))
    assert [text[0] for text in one[:27]] == list("abc" * 9)


def test_a_small_buffer_shuffles_near_and_loses_nothing():
    texts = [str(i) for i in range(100)]
    mixed = list(_shuffled(iter(texts), random.Random(0), 10))
    assert sorted(mixed) == sorted(texts) and mixed != texts
    assert all(texts.index(text) <= place + 10 for place, text in enumerate(mixed))


@settings(deadline=None, max_examples=200)
@given(text=st.text(alphabet="ab \n", max_size=80), limit=st.integers(2, 20))
def test_cutting_loses_nothing(text, limit):
    pieces = list(load_text([text], max_document_chars=limit))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= limit
    assert "" not in pieces or text == ""


def test_cuts_prefer_paragraphs_then_lines_then_words():
    def cut(text):
        return list(load_text([text], max_document_chars=12))

    assert cut("aaaa b\n\nc d\neee") == ["aaaa b\n\n", "c d\neee"]
    assert cut("aaaa bbb\nc ddddd") == ["aaaa bbb\n", "c ddddd"]
    assert cut("aaaa bbb cccccc") == ["aaaa bbb", " cccccc"]
    assert cut("a" * 15) == ["a" * 12, "aaa"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "no file or folder missing.txt"),
        ("/nowhere/at/all", "no file or folder /nowhere"),
        (Path("missing.jsonl"), "no file or folder missing.jsonl"),
        ("{tmp}/x.pdf", "extension of .*x.pdf is unknown"),
        ("{tmp}/empty", "holds no text file"),
        ("some words, no name", "neither a file, a folder nor a hub id"),
        ("", "neither a file"),
        (" , ", "neither a file"),
        ("a/b:c:d:e", "too many parts"),
        ([], "list of texts is empty"),
        (17, "type int"),
        ([1, 2], "type list"),
        (["{tmp}/x.pdf", "plain words"], "mixes files with 'plain words'"),
    ],
)
def test_bad_sources_are_named_at_the_call(tmp_path, source, message):
    write(tmp_path / "x.pdf", "x")
    (tmp_path / "empty").mkdir()

    def fill(entry):
        if isinstance(entry, list):
            return [fill(each) for each in entry]
        return entry.replace("{tmp}", str(tmp_path)) if isinstance(entry, str) else entry

    with pytest.raises(SparseForgeError, match=message):
        load_text(fill(source))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": '),
        ("a.txt", b"\xff\xfe"),
        ("a.txt.gz", b"no gzip"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 99)[:-30]),
        ("a.json", b"{bad"),
        ("a.parquet", b"PAR1"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SparseForgeError, match=f"cannot read .*{name}"):
        list(load_text(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/set", ("org/set", None, "train")),
        ("org/set:cfg", ("org/set", "cfg", "train")),
        ("org/set:test", ("org/set", None, "test")),
        ("org/set:cfg:validation", ("org/set", "cfg", "validation")),
        ("org/set::odd_split", ("org/set", None, "odd_split")),
        ("set:train[:10%]", ("set", None, "train[:10%]")),
    ],
)
def test_hub_names(monkeypatch, name, expected):
    import datasets

    asked = []

    def fake(repository, config, split, streaming):
        asked.append((repository, config, split))
        assert streaming == ("[" not in split)
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert list(load_text(name, stream=True)) == ["a"]
    assert asked == [expected]


def test_hub_out_of_reach_is_one_sentence(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("Couldn't reach 'org/set' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        SparseForgeError, match=r"^cannot load the hub data set 'org/set' \(Couldn't reach .*network"
    ) as caught:
        list(load_text("org/set"))
    assert "\n" not in str(caught.value)


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
    assert counting.count == done and len(os.listdir(tmp_path / "cache")) == 1


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
    files = len(os.listdir(tmp_path / "cache"))
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
    import datasets

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
    assert [count_steps(data, tokens, 1) for tokens in (1, 4, 8, 9, 12, 13, 18)] == [1, 1, 2, 3, 3, 4, 6]
    assert [count_steps(data, tokens, 2) for tokens in (8, 12, 13, 18)] == [1, 1, 2, 3]  # steps of 8, 5, 5
    assert abs(count_steps(data, 9 * 1024, 1) - 3 * 1024) <= 1  # beyond what is counted one by one


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
