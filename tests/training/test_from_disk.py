"""Pruning a checkpoint that stays on disk: the same bytes as in memory, whatever ends the run."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoint import byte_tokenizer, write_text

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import has_no_values
from sparseforge_fx.models.compute_dtype import ComputeDtype
from sparseforge_fx.models.dense import load_dense
from sparseforge_fx.models.shards import Shards
from sparseforge_fx.models.streamed import StreamedModel
from sparseforge_fx.training import from_disk
from sparseforge_fx.training.from_disk import sparsify_on_disk
from sparseforge_fx.training.sparsify import sparsify
from sparseforge_fx.training.walk_folder import JOURNAL

HEADS = {"num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 260, "hidden_size": 32}
WIDE = HEADS | {"max_position_embeddings": 128}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**WIDE, intermediate_size=64, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=2, n_positions=128),
    "opt": lambda: transformers.OPTConfig(**WIDE, ffn_dim=64, word_embed_proj_dim=32),
    "mixtral": lambda: transformers.MixtralConfig(
        **WIDE | {"num_hidden_layers": 2}, intermediate_size=64, num_key_value_heads=1, num_local_experts=4
    ),
}
RUN = {"method": "sparsegpt", "length": 32, "calibration": 8}


def write_model(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[kind]()).to(dtype)
    model.save_pretrained(folder, max_shard_size="60KB")
    byte_tokenizer().save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors*")}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(write_text(tmp_path_factory.mktemp("text") / "text.txt", 20))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama") / "model", "llama")


@pytest.fixture(scope="module")
def whole(llama, text, tmp_path_factory):
    """What an undisturbed run gives."""
    output = tmp_path_factory.mktemp("whole") / "sparse"
    return output, sparsify_on_disk(llama, text, output=output, **RUN)


def test_what_is_said_of_the_input_is_not_said_of_the_output(llama, text, tmp_path):
    """A model that was evaluated, timed and planned for: its pages speak of its own weights."""
    folder = shutil.copytree(llama, tmp_path / "model")
    for name in ("report.json", "report.html", "recipe.yaml", "evaluation.json", "benchmark.json", "costs.json", "plan.json"):
        (folder / name).write_text("of the input")
    (folder / "LICENSE").write_text("mine")
    sparsify_on_disk(folder, text, output=tmp_path / "sparse", **RUN | {"method": "magnitude"})
    assert not any(f.read_text() == "of the input" for f in (tmp_path / "sparse").iterdir() if f.suffix in (".json", ".html", ".yaml"))  # fmt: skip
    assert (tmp_path / "sparse" / "LICENSE").read_text() == "mine"
    assert "magnitude" in (tmp_path / "sparse" / "report.html").read_text()


def test_what_of_the_data_is_not_read_is_named(llama, text, tmp_path):
    (tmp_path / "text").mkdir()
    shutil.copy(text, tmp_path / "text" / "a.txt")
    (tmp_path / "text" / "b.pdf").write_text("no text")
    report = sparsify_on_disk(llama, str(tmp_path / "text"), output=tmp_path / "sparse", **RUN | {"calibration": 1})
    assert any("not read, as they are no text: b.pdf" in note for note in report["notes"])


def test_branches_beside_the_weights_are_not_left_out_in_silence(llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    file = sorted(folder.glob("*.safetensors"))[0]
    branch = "model.layers.0.self_attn.q_proj.slorb"
    save_file(load_file(file) | {f"{branch}.x": torch.zeros(2, 8), f"{branch}.s": torch.zeros(32, 2)}, file)
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())
    names["weight_map"] |= {f"{branch}.{leaf}": file.name for leaf in "xs"}
    index.write_text(json.dumps(names))
    with pytest.raises(SparseForgeError, match=r"low-rank branches .* left out from disk: load the model whole"):
        StreamedModel(folder)


@pytest.mark.parametrize(
    ("kind", "method", "activations"),
    [("llama", "sparsegpt", 1), ("gpt2", "wanda", None), ("opt", "alps", None), ("mixtral", "sparsegpt", None)],
)
def test_equals_the_run_in_memory_to_the_bit(tmp_path, text, kind, method, activations):
    source = write_model(tmp_path / "model", kind)
    options = RUN | {"method": method}
    report = sparsify_on_disk(source, text, output=tmp_path / "sparse", activation_bytes=activations, **options)
    model, tokenizer = load_dense(source)
    inside = sparsify(model, text, tokenizer=tokenizer, **options)
    inside.save(tmp_path / "inside", tokenizer)
    ours, theirs = tensors(tmp_path / "sparse"), tensors(tmp_path / "inside")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert {f.name for f in source.iterdir()} < {f.name for f in (tmp_path / "sparse").iterdir()}
    assert shards(source).keys() == shards(tmp_path / "sparse").keys()
    for part in ("density", "layer_notes", "experts", "config", "sites", "calibration_sequences"):
        assert report.get(part) == inside.report.get(part), part


def test_half_precision_that_is_computed_in_float32(tmp_path, text, monkeypatch):
    """As on a CPU without instructions for bfloat16; a resumed run does not measure again."""
    source, options = write_model(tmp_path / "model", "llama", torch.bfloat16), RUN | {"method": "alps"}
    fast = ComputeDtype(torch.float32, torch.bfloat16, {"bfloat16": 2.0, "float32": 1.0})
    monkeypatch.setattr(from_disk, "choose_dtype", lambda *_: fast)
    sparsify_on_disk(source, text, output=tmp_path / "sparse", blocks=1, **options)
    monkeypatch.setattr(from_disk, "choose_dtype", lambda *_: pytest.fail("measured again"))
    report = sparsify_on_disk(source, text, output=tmp_path / "sparse", resume=True, **options)
    assert report["compute_dtype"] == fast.describe() and report["notes"][0].startswith("computed in float32")
    model, tokenizer = load_dense(source, dtype="float32")
    inside = sparsify(model, text, tokenizer=tokenizer, **options).model.to(torch.bfloat16).state_dict()
    ours = tensors(tmp_path / "sparse")
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    assert [name for name, value in ours.items() if not torch.equal(value, inside[name])] == []


def test_magnitude_walks_no_graph(tmp_path, llama):
    sparsify_on_disk(llama, output=tmp_path / "sparse", method="magnitude")
    inside = sparsify(load_dense(llama)[0], method="magnitude").model.state_dict()
    assert all(torch.equal(value, inside[name]) for name, value in tensors(tmp_path / "sparse").items())


def killed(go, at: int) -> None:
    """``go`` in a process of its own that ends without a word in the midst of its write number ``at``."""
    child = os.fork()
    if child == 0:
        write, count = Shards.write, 0

        def counted(self, name, value):
            nonlocal count
            count += 1
            if count == at:
                write(self, name, torch.full_like(value, 7.0))
                os._exit(9)
            write(self, name, value)

        Shards.write = counted
        try:
            go()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_killed_and_resumed_gives_the_same_bytes_and_report(tmp_path, llama, text, whole):
    def go():
        return sparsify_on_disk(llama, text, output=tmp_path / "sparse", resume=True, **RUN)

    killed(go, 2)  # before the first border
    killed(go, 10)  # within the second block
    border = json.loads((tmp_path / "sparse.unfinished" / JOURNAL).read_text())["border"]
    report = go()
    assert border == 1
    assert shards(tmp_path / "sparse") == shards(whole[0])
    assert report["density"] == whole[1]["density"]
    assert len(report["block_seconds"]) == report["blocks"] == 3
    assert not (tmp_path / "sparse.unfinished").exists()


def test_some_blocks_then_the_rest(tmp_path, llama, text, whole):
    report = sparsify_on_disk(llama, text, output=tmp_path / "sparse", blocks=1, **RUN)
    assert len(report["block_seconds"]) == 1
    assert not (tmp_path / "sparse").exists()
    with pytest.raises(SparseForgeError, match="not finished"):
        sparsify_on_disk(llama, text, output=tmp_path / "sparse", **RUN)
    with pytest.raises(SparseForgeError, match=r"another one .*calibration"):
        sparsify_on_disk(llama, text, output=tmp_path / "sparse", resume=True, **RUN | {"calibration": 4})
    sparsify_on_disk(llama, text, output=tmp_path / "sparse", resume=True, **RUN)
    assert shards(tmp_path / "sparse") == shards(whole[0])


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda file: file.unlink(), "lacks model-0000"),
        (lambda file: file.write_bytes(file.read_bytes()[:-8]), "damaged"),
        (lambda file: file.write_bytes(b"\xff" * 64), "damaged"),
    ],
)
def test_bad_files_are_refused_before_anything_is_written(tmp_path, llama, text, harm, told):
    source = shutil.copytree(llama, tmp_path / "model")
    harm(sorted(source.glob("*.safetensors"))[1])
    with pytest.raises(SparseForgeError, match=told):
        sparsify_on_disk(source, text, output=tmp_path / "sparse", **RUN)
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "sparseforge"}, "is not trained"),
        ({"method": "sparsegpt", "reorder": True}, "reorder needs the whole model"),
        ({"method": "sparsegpt", "values": "int4"}, "values needs the whole model"),
        ({"method": "sparsegpt", "length": 256}, "longer than the model's 128 positions"),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path, llama, text, options, told):
    with pytest.raises(SparseForgeError, match=told):
        sparsify_on_disk(llama, text, output=tmp_path / "sparse", **options)
    assert list(tmp_path.iterdir()) == []


def test_too_short_a_text_is_refused(tmp_path, llama):
    short = tmp_path / "short.txt"
    short.write_text("ab")
    with pytest.raises(SparseForgeError):
        sparsify_on_disk(llama, str(short), output=tmp_path / "sparse", **RUN)


def test_nan_in_a_weight_is_named(tmp_path, llama, text):
    source = shutil.copytree(llama, tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    files = Shards(source)
    files.write(name, torch.full_like(files.read(name), float("nan")))
    with pytest.raises(SparseForgeError, match=f"{name} holds NaN"):
        sparsify_on_disk(source, text, output=tmp_path / "sparse", **RUN)


def test_a_full_disk_is_told_and_resumed(tmp_path, llama, text, whole, monkeypatch):
    write, count = Shards.write, 0

    def full(self, name, value):
        nonlocal count
        count += 1
        if count == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, value)

    monkeypatch.setattr(Shards, "write", full)
    with pytest.raises(SparseForgeError, match="is full: make room there and repeat the command with resume"):
        sparsify_on_disk(llama, text, output=tmp_path / "sparse", **RUN)
    monkeypatch.undo()
    sparsify_on_disk(llama, text, output=tmp_path / "sparse", resume=True, **RUN)
    assert shards(tmp_path / "sparse") == shards(whole[0])


def test_a_file_that_may_not_grow_is_a_full_disk(tmp_path, llama, text):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(SparseForgeError, match="is full"):
            sparsify_on_disk(llama, text, output=tmp_path / "sparse", **RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


LIMITED = """
import resource, sys
from sparseforge_fx.training.from_disk import sparsify_on_disk

small, large, text, output, whole = sys.argv[1:]
how = {"method": "wanda", "length": 32, "calibration": 4}
sparsify_on_disk(small, text, output=f"{output}-small", **how)  # what is loaded once, and threads, are there now
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
mapped = int(status["VmSize"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (mapped + int(whole) // 4,) * 2)
sparsify_on_disk(large, text, output=output, **how)
"""


@pytest.mark.slow
def test_a_quarter_of_its_bytes_is_enough(tmp_path, text):
    """The address space is what a process cannot cheat on. The graph, about a megabyte a block, is in the quarter."""
    large, sides = tmp_path / "large", {"hidden_size": 768, "intermediate_size": 2112, "num_attention_heads": 8}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(**WIDE | sides | {"num_hidden_layers": 28})
    )
    model.save_pretrained(large, max_shard_size="30MB")
    byte_tokenizer().save_pretrained(large)
    whole = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    folders = [write_model(tmp_path / "small", "llama"), large, text, tmp_path / "sparse", whole]
    command = [sys.executable, "-c", LIMITED, *map(str, folders)]
    run = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    pruned = tensors(tmp_path / "sparse")
    density = [float((v != 0).float().mean()) for name, v in pruned.items() if name.endswith("_proj.weight")]
    assert len(density) == 7 * 28 and set(density) == {0.5}


def test_the_skeleton_has_no_weights_and_every_buffer(llama):
    source, whole = StreamedModel(llama), load_dense(llama)[0]
    assert all(has_no_values(p) for p in source.skeleton.parameters())
    buffers = dict(whole.named_buffers())
    assert buffers and all(torch.equal(source.fetch(name), value) for name, value in buffers.items())


@pytest.mark.parametrize("value", [torch.ones(3), torch.arange(3)], ids=["floats", "integers"])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_buffer_that_no_file_holds_and_loading_leaves_empty_is_refused(llama, monkeypatch, value, persistent):
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
    before = rotary.__init__

    def with_another(self, *args, **options):
        before(self, *args, **options)
        self.register_buffer("scale", value.to(self.inv_freq.device), persistent=persistent)

    monkeypatch.setattr(rotary, "__init__", with_another)
    with pytest.raises(SparseForgeError, match=r"buffer model\.rotary_emb\.scale is neither in the files"):
        StreamedModel(llama)
