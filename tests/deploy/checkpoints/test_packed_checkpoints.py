"""Packed checkpoints: exact both ways, the same bytes twice, never dense while loading, and damaged ones refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import GREEDY, IDS, SITES, edit_json, pack_to, remembered, sparse_model
from safetensors.torch import load_file, save_file
from tiny_checkpoint import byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import sparseforge_fx as sf
from sparseforge_fx.deploy.checkpoints import packed_files, packed_state, save
from sparseforge_fx.deploy.lowering.sparse_modules import SparseLinear
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels import cpu, packed, sparse_linear
from sparseforge_fx.models.dense import load_dense, write_checkpoint

SITE = "model.layers.0.mlp.up_proj"


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def unpack(folder, dense):
    model, tokenizer = sf.load(folder)
    write_checkpoint(model.dequantize(), tokenizer, dense)


# -- there and back --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", torch.bfloat16), ("gpt2", torch.float16), ("opt", torch.float32), ("gpt2", torch.bfloat16)],
)
def test_exact_both_ways(tmp_path, name, dtype):
    model = sparse_model(name, dtype)
    write_checkpoint(model, byte_tokenizer(), tmp_path / "dense")
    report = sf.save_packed(model, byte_tokenizer(), tmp_path / "packed")
    assert len(report["sites"]) == SITES[name] and [s["name"] for s in report["skipped"]] == ["lm_head"]
    share = 9 / 16 if dtype.itemsize == 2 else 17 / 32
    assert report["lowered_bytes"] == share * report["dense_bytes"]
    assert not hasattr(model.config, "quantization_config") and not model.config.to_dict().get("quantization_config")
    unpack(tmp_path / "packed", tmp_path / "again")
    want, got = tensors(tmp_path / "dense"), tensors(tmp_path / "again")
    assert want.keys() == got.keys()
    assert all(torch.equal(want[k], got[k]) and want[k].dtype == got[k].dtype == dtype for k in want)
    assert "quant" not in (tmp_path / "again" / "config.json").read_text()
    sf.save_packed(*sf.load(tmp_path / "again"), tmp_path / "twice")
    first, second = contents(tmp_path / "packed"), contents(tmp_path / "twice")
    assert first.keys() == second.keys()
    assert all(first[k] == second[k] for k in first if not k.startswith("tokenizer"))


def test_a_second_export_gives_the_same_bytes_shards_included(tmp_path):
    for name in ("a", "b"):
        pack_to(tmp_path / name, max_shard_size="20KB")
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b") and sum(n.endswith(".safetensors") for n in first) > 2
    model, _ = sf.load(tmp_path / "a")
    assert torch.equal(model(IDS).logits, sf.load(pack_to(tmp_path / "whole"))[0](IDS).logits)
    sf.lower_modules(dense := sparse_model("llama"), gate=False)
    sf.save_packed(dense, byte_tokenizer(), tmp_path / "lowered", max_shard_size="20KB")  # packed already
    assert first == contents(tmp_path / "lowered")


@pytest.mark.parametrize("name", list(SITES))
def test_no_packed_weight_is_ever_dense(tmp_path, name, monkeypatch):
    pack_to(tmp_path / "p", name)

    def forbidden(*_, **__):
        raise AssertionError("a dense weight was built")

    for home, function in ((packed, "unpack"), (sparse_linear, "unpack"), (cpu, "rows_dense"), (packed_state, "pack")):
        monkeypatch.setattr(home, function, forbidden)
    model, tokenizer = sf.load(tmp_path / "p")
    found = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    assert len(found) == SITES[name] and not any(m.weight_values.is_meta for m in found.values())
    assert not {f"{n}.weight" for n in found} & {n for n, _ in model.named_parameters()}
    assert tokenizer.decode(tokenizer("two of four").input_ids) == "two of four" and not model.training


def test_a_fresh_process_computes_the_same(tmp_path):
    code = """
import sys
import sparseforge_fx as sf
assert "torch" not in sys.modules and "transformers" not in sys.modules
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from pathlib import Path
ids, options = torch.tensor(%s), %s
for folder in map(Path, sys.argv[1:]):
    ours, _ = sf.load(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    out = {"stock": stock(ids).logits.detach(), "ours": ours(ids).logits.detach()}
    out |= {"stock_text": stock.generate(ids, **options), "text": ours.generate(ids, **options)}
    save_file({k: v.contiguous() for k, v in out.items()}, folder / "out.st")
""" % (IDS.tolist(), GREEDY)  # noqa: UP031  (braces in the code)
    folders = [pack_to(tmp_path / name, name) for name in SITES]
    root = Path(sf.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, *map(str, folders)], check=True, env=environment, cwd=tmp_path)
    for folder, name in zip(folders, SITES, strict=True):
        _, logits, text = remembered(name)
        out = load_file(folder / "out.st")
        for key in ("ours", "stock"):
            torch.testing.assert_close(out[key], logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(out["text"], text) and torch.equal(out["stock_text"], text)


# -- what cannot be written or is no packed checkpoint -----------------------------------------------------------------
def test_refused_before_anything_is_written(tmp_path):
    model = sparse_model("llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    for bad, folder, match in [
        (torch.nn.Linear(4, 4), "new", "no transformers model"),
        (model, "full", "not empty"),
        (model.model.embed_tokens, "new", "no transformers model"),
    ]:
        with pytest.raises(SparseForgeError, match=match):
            sf.save_packed(bad, None, tmp_path / folder)
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    with pytest.raises(SparseForgeError, match=r"nothing to pack.*not 2:4"):
        sf.save_packed(model, None, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    pack_to(tmp_path / "p")
    before = contents(tmp_path / "p")

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(save, "digests", fail)
    with pytest.raises(OSError, match="full"):
        pack_to(tmp_path / "p", "opt", overwrite=True)
    assert contents(tmp_path / "p") == before and [p.name for p in tmp_path.iterdir()] == ["p"]


def test_packed_weights_are_refused_where_they_must_be_dense(tmp_path):
    pack_to(tmp_path / "packed")
    with pytest.raises(
        SparseForgeError, match=r"are packed, and must be dense here: load it with sf\.load, then"
    ) as caught:
        load_dense(tmp_path / "packed")
    assert "\n" not in str(caught.value)


def test_without_a_tokenizer(tmp_path):
    sf.save_packed(sparse_model("llama"), None, tmp_path / "p")
    model, tokenizer = sf.load(tmp_path / "p")
    assert tokenizer is None and isinstance(model.lm_head, torch.nn.Linear)
    unpack(tmp_path / "p", tmp_path / "dense")
    assert not list((tmp_path / "dense").glob("*token*"))
    byte_tokenizer().save_pretrained(tmp_path / "p")
    (tmp_path / "p" / "tokenizer.json").write_text("{")
    refuse(tmp_path / "p", "no tokenizer that can be loaded")


def test_weights_that_are_no_numbers_are_not_packed(tmp_path):
    model = sparse_model("llama")
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data[weight != 0] = float("nan")
    with pytest.raises(SparseForgeError, match=r"'model\.layers\.1\.mlp\.up_proj' has NaN or inf"):
        sf.save_packed(model, None, tmp_path / "p")
    assert not list(tmp_path.iterdir())


# -- damaged ones ------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    return pack_to(folder / "single"), pack_to(folder / "sharded", max_shard_size="20KB")


@pytest.fixture
def damaged(originals, tmp_path):
    """(a copy of the single file's folder, a copy of the sharded one), both without checksums."""
    single, sharded = (Path(shutil.copytree(o, tmp_path / o.name)) for o in originals)
    for folder in (single, sharded):
        header(folder, lambda h: h.pop("files"))
    return single, sharded


def header(folder, change):
    edit_json(folder / "config.json", lambda config: change(config["quantization_config"]))


def entry(folder, name, **changes):
    header(folder, lambda h: h["modules"].setdefault(name, {}).update(changes))


def weights(folder, change):
    """Rewrite the tensors of a single file."""
    found = load_file(folder / packed_files.SINGLE)
    change(found)
    save_file(found, folder / packed_files.SINGLE, metadata={"format": "pt"})


def raw(folder, change):
    """Rewrite the json header of a single file as it is, whatever that does to the offsets."""
    path = folder / packed_files.SINGLE
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length])
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def tensor_entry(folder, name, **changes):
    def change(text):
        found = json.loads(text)
        found[name].update(changes)
        return json.dumps(found).encode()

    raw(folder, change)


def index(folder, change):
    edit_json(folder / packed_files.INDEX, lambda found: change(found["weight_map"]))


def first_shard(folder):
    return min(folder.glob("*-of-*.safetensors"))


def link_out(path):
    path.symlink_to(shutil.move(path, path.parents[1] / "elsewhere.safetensors"))


def swap(one, other):
    between = one.rename(one.with_name("between"))
    other.rename(one)
    between.rename(other)


def truncate(path, drop):
    os.truncate(path, path.stat().st_size - drop)


def flip(path, place, bit=1):
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def configure(folder, **changes):
    edit_json(folder / "config.json", lambda config: config.update(changes))


def nothing_else_is_in(folder, number):
    """A number in the first packed value."""

    def change(found):
        found[V].view(-1)[0] = number

    weights(folder, change)


def all_outside(folder, place):
    """Every shard moves to one other folder, where the index finds it."""
    there = Path(os.path.normpath(folder / place / "elsewhere"))
    there.mkdir()
    for shard in folder.glob("*.safetensors"):
        shard.rename(there / shard.name)
    index(folder, lambda m: m.update({k: os.path.join(place, "elsewhere", v) for k, v in m.items()}))


V, B = f"{SITE}.weight_values", f"{SITE}.weight_bitmask"
SINGLE = {  # damage to a folder of one weight file: what the sentence says
    "cut in the data": (lambda f: truncate(f / "model.safetensors", 7), "bytes of tensors are announced"),
    "cut in the header": (lambda f: os.truncate(f / "model.safetensors", 100), "cut short"),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), "cut short"),
    "longer": (lambda f: (f / "model.safetensors").open("ab").write(b"12345678"), "are there"),
    "absurd header": (lambda f: flip(f / "model.safetensors", 6, 0x7F), "cut short"),
    "no json": (lambda f: flip(f / "model.safetensors", 8), "no json"),
    "deep json": (lambda f: raw(f, lambda _: b"[" * 100_000), "no json"),
    "tensor twice": (lambda f: raw(f, lambda t: t.replace(b"{", b'{"x":1,"x":2,', 1)), "'x' twice"),
    "absurd shape": (lambda f: tensor_entry(f, V, shape=[1 << 62, 1 << 62]), "does not fit its offsets"),
    "negative shape": (lambda f: tensor_entry(f, V, shape=[-64, -16]), "no sense"),
    "absurd number": (lambda f: tensor_entry(f, V, shape=[10**40, 1]), "no sense"),
    "too many dimensions": (lambda f: tensor_entry(f, V, shape=[2] * 20), "does not fit"),
    "unknown dtype": (lambda f: tensor_entry(f, V, dtype="F3"), "no sense"),
    "other dtype": (lambda f: tensor_entry(f, V, dtype="I32"), "is I32"),
    "offsets overlap": (lambda f: tensor_entry(f, V, data_offsets=[0, 4096]), "overlap or leave a gap"),
    "offsets beyond": (lambda f: tensor_entry(f, V, data_offsets=[1 << 50, (1 << 50) + 4096]), "overlap or leave a gap"),
    "offsets back to front": (lambda f: tensor_entry(f, V, data_offsets=[4096, 0]), "does not fit"),
    "no bitmask": (lambda f: weights(f, lambda t: t.pop(B)), "weight_bitmask' is missing"),
    "no values": (lambda f: weights(f, lambda t: t.pop(V)), "weight_values' is missing"),
    "no norm": (lambda f: weights(f, lambda t: t.pop("model.norm.weight")), "'model.norm.weight' of the model is missing"),
    "extra tensor": (lambda f: weights(f, lambda t: t.update(extra=torch.ones(2))), "not in the model"),
    "extra packed": (lambda f: weights(f, lambda t: t.update({"a.weight_values": t[V] + 0})), "no packed module"),
    "packed and dense": (lambda f: weights(f, lambda t: t.update({f"{SITE}.weight": torch.ones(64, 32)})), "and dense"),
    "other shape": (lambda f: weights(f, lambda t: t.update({V: t[V][:8].clone()})), "the header wants"),
    "other norm": (lambda f: weights(f, lambda t: t.update({"model.norm.weight": torch.ones(3)})), "the model wants"),
    "float bitmask": (lambda f: weights(f, lambda t: t.update({B: t[B].float()})), "is F32"),
    "three bits": (lambda f: weights(f, lambda t: t[B].fill_(0x37)), "not exactly two bits"),
    "one bit": (lambda f: weights(f, lambda t: t[B].view(-1)[5:6].fill_(0x31)), "not exactly two bits"),
    "NaN": (lambda f: nothing_else_is_in(f, float("nan")), "has NaN or inf"),
    "infinite": (lambda f: nothing_else_is_in(f, float("-inf")), "has NaN or inf"),
    "norm of integers": (lambda f: weights(f, lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=int)})), "is I64"),
    "future": (lambda f: header(f, lambda h: h.update(format_version=99)), "update sparseforge_fx"),
    "next version": (lambda f: header(f, lambda h: h.update(format_version=packed.FORMAT_VERSION + 1)), "update sparseforge_fx"),
    "no version": (lambda f: header(f, lambda h: h.update(format_version="1")), "no version"),
    "somebody else's": (lambda f: header(f, lambda h: h.update(quant_method="gptq")), "are quantised: give a checkpoint in"),
    "other pattern": (lambda f: header(f, lambda h: h.update(format_version=1, pattern="1:4")), "not '2:4'"),
    "unknown entry": (lambda f: header(f, lambda h: h.update(code="print(1)")), "unknown entry 'code'"),
    "no modules": (lambda f: header(f, lambda h: h.update(modules=[])), "no packed modules"),
    "header shape": (lambda f: entry(f, SITE, shape=[64, 64]), "the header wants"),
    "absurd header shape": (lambda f: entry(f, SITE, shape=[10**30, 4]), "the header wants"),
    "header shape of text": (lambda f: entry(f, SITE, shape="64x32"), "has no dtype, format, shape"),
    "header inputs": (lambda f: entry(f, SITE, shape=[64, 30]), "no multiple of 4"),
    "header dtype": (lambda f: entry(f, SITE, dtype="float8"), "has dtype 'float8'"),
    "module twice": (lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'), "'a' twice"),
    "unknown module": (lambda f: entry(f, "nothing", shape=[4, 4], dtype="float32", format="2:4"), "is missing"),
    "no format": (lambda f: header(f, lambda h: h["modules"][SITE].pop("format")), "has no dtype, format, shape"),
    "unknown format": (lambda f: entry(f, SITE, format="2:4 int3"), "has format '2:4 int3'"),
    "dense format": (lambda f: entry(f, SITE, format="dense"), "in which nothing is packed"),
    "format of codes": (lambda f: entry(f, SITE, format="2:4 int8"), "the header wants"),
    "format no text": (lambda f: entry(f, SITE, format=["2:4"]), "which there is not"),
    "no count": (lambda f: header(f, lambda h: h.update(model_modules="many")), "is no such number"),
    "absurd count": (lambda f: header(f, lambda h: h.update(model_modules=10**9)), "is no such number"),
    "count beyond the tensors": (lambda f: header(f, lambda h: h.update(model_modules=100_000)), "tells of 100000 modules"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config no json": (lambda f: (f / "config.json").write_text("{"), "no json"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "no json object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither"),
    "absurd layers": (lambda f: configure(f, num_hidden_layers=10**9), "tells of 1000000000 layers"),
    "absurd layers of a part": (lambda f: configure(f, text_config={"n_layers": 10**9}), "tells of 1000000000 layers"),
    "too many layers": (lambda f: configure(f, num_hidden_layers=300), "more than 166 modules"),
    "a layer more": (lambda f: configure(f, num_hidden_layers=3), "is missing from the checkpoint"),
    "a layer less": (lambda f: configure(f, num_hidden_layers=1), "is not in this model"),
    "classes of no sense": (lambda f: configure(f, architectures=7), "no names of classes"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json is no file of the packed"),
    "adapter weights": (lambda f: shutil.copy(f / "model.safetensors", f / "adapter_model.safetensors"), "adapter_model"),
    "more weights": (lambda f: shutil.copy(f / "model.safetensors", f / "other.safetensors"), "other.safetensors is no file"),
    "a pickle beside": (lambda f: (f / "pytorch_model.bin").touch(), "pytorch_model.bin is no file"),
    "an index beside": (lambda f: (f / packed_files.INDEX).write_text("{}"), "index.json is no file"),
    "a pipe": (lambda f: ((f / "model.safetensors").unlink(), os.mkfifo(f / "model.safetensors")), "neither"),
    "a link out": (lambda f: link_out(f / "model.safetensors"), "is a link out of its folder"),
    "other class": (lambda f: edit_json(f / "config.json", lambda c: c.update(architectures=["Trainer"])), "which is no model"),
    "class of no sense": (lambda f: edit_json(f / "config.json", lambda c: c.update(architectures=[3])), "no names"),
    "unknown class": (lambda f: edit_json(f / "config.json", lambda c: c.update(architectures=["Foo"])) or
                      weights(f, lambda t: t.pop("model.norm.weight")), "'model.norm.weight' of the model is missing"),
    "absurd width": (lambda f: edit_json(f / "config.json", lambda c: c.update(intermediate_size=1 << 40)), "damaged"),
    "absurd vocabulary": (lambda f: edit_json(f / "config.json", lambda c: c.update(vocab_size=1 << 40)), "the model wants"),
}  # fmt: skip
SHARDED = {
    "outside": (lambda f: index(f, lambda m: m.update({V: "../single/model.safetensors"})), "not opened"),
    "absolute": (lambda f: index(f, lambda m: m.update({V: "/etc/passwd"})), "not opened"),
    "all outside": (lambda f: all_outside(f, ".."), "not opened"),
    "all absolute": (lambda f: all_outside(f, str(f.parent)), "not opened"),
    "all below": (lambda f: all_outside(f, ""), "not opened"),
    "a pickle": (lambda f: index(f, lambda m: m.update({V: "pytorch_model.bin"})), "not opened"),
    "a folder below": (lambda f: index(f, lambda m: m.update({V: "sub/model.safetensors"})), "not opened"),
    "a name with NUL": (lambda f: index(f, lambda m: m.update({V: "a\0.safetensors"})), r"'a\\x00.safetensors' is missing"),
    "no name": (lambda f: index(f, lambda m: m.update({V: ["model.safetensors"]})), "no weight_map of file names"),
    "a pipe": (lambda f: (n := first_shard(f), n.unlink(), os.mkfifo(n)), "is missing"),
    "a shard that is not in the index": (lambda f: shutil.copy(first_shard(f), f / "model-00009-of-00009.safetensors"), "00009"),
    "one file beside": (lambda f: shutil.copy(first_shard(f), f / "model.safetensors"), "is no file of the packed"),
    "shards swapped": (lambda f: swap(*sorted(f.glob("*-of-*.safetensors"))[:2]), "disagree about tensor"),
    "no metadata": (lambda f: edit_json(f / packed_files.INDEX, lambda i: i.pop("metadata")), "has no metadata"),
    "shard missing": (lambda f: first_shard(f).unlink(), "is missing"),
    "entry missing": (lambda f: index(f, lambda m: m.pop(V)), "disagree about tensor"),
    "entry of nothing": (lambda f: index(f, lambda m: m.update(ghost=first_shard(f).name)), "disagree about tensor"),
    "entry of another shard": (lambda f: index(f, lambda m: m.update({V: max(m.values()), B: min(m.values())})), "disagree"),
    "in two shards": (lambda f: shutil.copy(first_shard(f), max(f.glob("*-of-*.safetensors"))), "is in both"),
    "no map": (lambda f: (f / packed_files.INDEX).write_text("{}"), "no weight_map"),
}  # fmt: skip


# from_pretrained of transformers reads config.json and looks for weights before it asks us, and takes any class's
THEIRS = ("somebody else's", "module twice", "no config", "config no json", "config a list", "no weights", "a pipe")
TAKEN = ("other class", "unknown class")


def refuse(folder, match):
    with pytest.raises(SparseForgeError, match=match) as caught:
        sf.load(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


def refuse_at_both_doors(folder, match):
    sentence = refuse(folder, match)
    with pytest.raises(SparseForgeError) as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("case", SINGLE)
def test_damaged(damaged, case):
    damage, match = SINGLE[case]
    damage(damaged[0])
    (refuse if case in (*THEIRS, *TAKEN) else refuse_at_both_doors)(damaged[0], match)


@pytest.mark.parametrize("case", SHARDED)
def test_damaged_shards(damaged, case):
    damage, match = SHARDED[case]
    damage(damaged[1])
    refuse_at_both_doors(damaged[1], match)


def test_checksums(originals, tmp_path):
    folder = Path(shutil.copytree(originals[0], tmp_path / "p"))
    flip(folder / "model.safetensors", -3)
    refuse(folder, "SHA-256 differs")
    header(folder, lambda h: h["files"].update({"other.safetensors": "0" * 64}))
    refuse(folder, "other.safetensors")
    header(folder, lambda h: h.update(files=["model.safetensors"]))
    refuse(folder, "not SHA-256 sums")


def test_links_of_a_cache_and_those_that_a_checksum_vouches_for(originals, damaged, tmp_path):
    home = tmp_path / "models--a--b"
    snapshot = home / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for file in damaged[1].iterdir():  # without checksums
        shutil.copy(file, home / "blobs" / f"{file.name}.blob")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{file.name}.blob")
    want = sf.load(originals[0])[0](IDS).logits
    assert torch.equal(sf.load(snapshot)[0](IDS).logits, want)
    linked = Path(shutil.copytree(originals[0], tmp_path / "linked"))
    link_out(linked / "model.safetensors")
    assert torch.equal(LlamaForCausalLM.from_pretrained(linked)(IDS).logits, want)
    flip(tmp_path / "elsewhere.safetensors", -3)
    refuse_at_both_doors(linked, "SHA-256 differs")


def test_pickles_are_not_loaded(originals, tmp_path):
    folder = Path(shutil.copytree(originals[0], tmp_path / "p"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refuse(folder, "neither")


@settings(max_examples=30)
@given(st.data())
def test_random_flips_load_or_are_refused(originals, tmp_path_factory, data):
    folder = Path(shutil.copytree(originals[0], tmp_path_factory.mktemp("flip") / "p"))
    header(folder, lambda h: h.pop("files"))
    path = folder / data.draw(st.sampled_from(["model.safetensors", "model.safetensors", "config.json"]))
    size = path.stat().st_size
    places = st.one_of(st.integers(0, min(size, 4000) - 1), st.integers(0, size - 1))
    for place in data.draw(st.lists(places, min_size=1, max_size=3)):
        flip(path, place, data.draw(st.integers(1, 255)))
    try:
        model, _ = sf.load(folder)
    except SparseForgeError as error:
        assert "\n" not in str(error)
    else:
        for module in model.modules():
            if isinstance(module, SparseLinear):
                packed.check_packed(module.packed())
