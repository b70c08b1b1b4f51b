"""Text sources, what a row's text is, chats, and the stream of documents."""

import json
import lzma
import os
import random
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_data import jsonl, make_tokenizer, write

from sparseforge_fx.data.sources import unused_text
from sparseforge_fx.data.text import _shuffled, load_text
from sparseforge_fx.data.tokens import tokenize
from sparseforge_fx.errors import SparseForgeError


# -------------------------------------------------------------------------------------------------------- text sources
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


@pytest.mark.parametrize("packer", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", "\ufeffa", ["a"]),
        ("a.jsonl", '\ufeff{"text": "a"}\n', ["a"]),
        ("lines.json", '\n{"text": "a"}\n\n{"text": "b"}', ["a", "b"]),
        ("pretty.json", '\ufeff[\n {"text": "a"},\n {"text": "b"}\n]', ["a", "b"]),
        ("one.json", '{\n"text": "a"}', ["a"]),
        ("texts.json", '["a", "b"]', ["a", "b"]),
        ("mark.csv", "\ufefftext,label\r\na,x\r\nb,y\r\n", ["a", "b"]),
        ("types.csv", "id,odd,empty\n1,a,\n2,,\n3,c,\n", ["a", "c"]),
        ("long.csv", "text\n" + "word " * 40_000 + '\n"b\r\nc"\n', ["word " * 40_000, "b\r\nc"]),
    ],
)
def test_a_packed_file_is_read_as_one_that_is_not(tmp_path, name, content, texts, packer):
    assert list(load_text(write(tmp_path / f"{name}{packer}", content))) == texts


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
        ({"instruction": "a", "context": "b", "response": "c", "category": "x"}, None, "a\nb\nc"),
        ({"question": "a", "answer": "b", "context": "c", "id": "x"}, None, "c\na\nb"),
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


CALLS = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]


@pytest.mark.parametrize("kind", ["jsonl", "data set"])
@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": OPENAI[:1], "completion": OPENAI[1:], "system": "s"}, "<system>s<user>a<assistant>b"),
        ({"prompt": OPENAI[:1], "completion": None}, "<user>a"),
        ({"messages": OPENAI, "tools": [{"name": "f", "more": None}, {"name": "g"}]}, "f;g;<user>a<assistant>b"),
        ({"messages": OPENAI, "tools": '[{"name": "f"}]'}, "f;<user>a<assistant>b"),
        ({"messages": CALLS}, "<user>a<assistant>f"),
    ],
)
def test_all_of_a_chat_goes_through_the_template_once(tmp_path, row, text, kind):
    marked = make_tokenizer()
    marked.chat_template = (
        "{% for t in tools or [] %}{{ t.name }}{{ t.more }};{% endfor %}{% for m in messages %}<{{ m.role }}>"
        "{{ m.tool_calls[0].name if m.tool_calls else m.content }}{% endfor %}"
    )
    path = write(tmp_path / "a.jsonl", json.dumps(row))
    told = []
    assert list(load_text(path if kind == "jsonl" else datasets.Dataset.from_list([row]), tokenizer=marked, told=told)) == [text]  # fmt: skip
    assert told == []


def test_chats_without_turns_or_content(tmp_path):
    plain = make_tokenizer()
    plain.chat_template = TEMPLATE
    rows = [{"messages": []}, {"messages": OPENAI}, {"messages": []}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert list(load_text(path, tokenizer=plain)) == ["<user>a<assistant>b"]
    for turn, why in (({"content": None}, "content: repair"), (CALLS[1], "content but tool_calls, .* does not write")):
        write(path, json.dumps({"messages": [*OPENAI, {"role": "assistant", **turn}]}))
        with pytest.raises(SparseForgeError, match=f"messages of .* in row 1 is a chat with a turn without {why}"):
            list(load_text(path, tokenizer=plain))


def test_a_column_that_comes_later_is_not_lost(tmp_path):
    rows = [{"instruction": "a", "response": "b"}, {"instruction": "c", "context": "d", "response": "e"}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, [*rows, rows[0]])))
    assert list(load_text(path)) == ["a\nb", "c\nd\ne", "a\nb"]


@pytest.mark.parametrize("kind", ["jsonl", "data set"])
@pytest.mark.parametrize(
    ("row", "column", "told"),
    [
        ({"text": "a", "n": 1, "none": None}, None, []),
        ({"text": "a", "title": "b"}, "text", []),
        ({"text": "a", "title": "b", "messages": OPENAI}, None, ["column text, not from title, messages"]),
        ({"question": "a", "answer": "b", "id": "c"}, None, ["columns question, answer, not from id"]),
        ({"messages": OPENAI, "system": "s", "tools": [{"name": "f"}]}, None, ["column messages, not from tools"]),
        ({"messages": OPENAI, "tools": [{"name": "f"}]}, "messages", ["column messages, not from tools"]),
    ],
)
def test_columns_that_are_not_read_are_named(tmp_path, row, column, told, kind):
    plain = make_tokenizer()
    plain.chat_template = TEMPLATE
    source = datasets.Dataset.from_list([row, row])
    if kind == "jsonl":
        source = str(write(tmp_path / "a.jsonl", json.dumps(row) + "\n" + json.dumps(row)))
    for _ in range(2):  # the second reads the tokens that the first has written
        data = tokenize(source, plain, length=1, cache_dir=tmp_path, text_column=column)
        assert list(data.notes) == [f"text is read from the {sentence}" for sentence in told]


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
