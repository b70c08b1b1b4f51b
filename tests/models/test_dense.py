"""Models by name: what loads, what is written, and one clear sentence for everything else."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import byte_tokenizer, tiny_llama, write_checkpoint, write_gguf
from tiny_models import build

from sparseforge_fx.errors import SparseForgeError, SparseForgeWarning
from sparseforge_fx.models import dense as models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "dense")


def equal(one, two):
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- folders ---------------------------------------------------------------------------------------------------------
def test_save_and_load_give_the_same_model_and_tokenizer(folder, tmp_path):
    model, tokenizer = models.load_dense(folder)
    assert not model.training
    models.write_checkpoint(model, tokenizer, tmp_path / "new" / "out")
    again, tokens = models.load_dense(tmp_path / "new" / "out")
    assert equal(model, again)
    assert tokens("Hello, world")["input_ids"] == tokenizer("Hello, world")["input_ids"]


def test_the_written_folder_does_not_say_sparse(folder, tmp_path):
    models.write_checkpoint(*models.load_dense(folder), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"sparsity_config", "quantization_config", "compression_config"} & config.keys()
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_the_checkpoint_decides_the_dtype_unless_told(folder, tmp_path):
    half = tiny_llama().to(torch.bfloat16)
    models.write_checkpoint(half, byte_tokenizer(), tmp_path / "half")
    assert models.load_dense(tmp_path / "half")[0].dtype == torch.bfloat16
    assert models.load_dense(tmp_path / "half", dtype="float32")[0].dtype == torch.float32
    assert models.load_dense(folder, dtype=torch.float16)[0].dtype == torch.float16


def test_the_class_that_wrote_the_checkpoint_loads_it(tmp_path):
    from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

    bert = BertForMaskedLM(
        BertConfig(vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    models.write_checkpoint(bert, byte_tokenizer(), tmp_path / "bert")
    assert type(models.load_dense(tmp_path / "bert")[0]) is BertForMaskedLM
    vit = ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    )
    models.write_checkpoint(vit, None, tmp_path / "vit")
    model, tokenizer = models.load_dense(tmp_path / "vit")
    assert type(model) is ViTForImageClassification and tokenizer is None


@pytest.mark.parametrize("kind", ["llama", "moe", "gemma3", "gpt_oss"])
def test_a_folder_without_a_tokenizer_has_none(tmp_path, kind):
    """Of some kinds transformers makes a tokenizer out of nothing, to which every text is unknown."""
    build(kind).save_pretrained(tmp_path)
    assert models.load_dense(tmp_path)[1] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_skeleton_has_shapes_ties_and_dtype_but_no_weights(tmp_path, dtype):
    tiny_llama().to(dtype).save_pretrained(tmp_path)
    model = models.load_skeleton(tmp_path)
    assert all(p.is_meta and p.dtype == dtype for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.get_default_dtype() == torch.float32


# -- GGUF ------------------------------------------------------------------------------------------------------------
def test_a_gguf_file_loads_as_a_plain_model_that_can_be_saved(tmp_path):
    source = tiny_llama()
    write_gguf(tmp_path / "tiny.gguf", source)
    model, tokenizer = models.load_dense(tmp_path / "tiny.gguf", dtype="float32")
    assert equal(model, source)
    assert tokenizer("fox")["input_ids"] == byte_tokenizer()("fox")["input_ids"]
    assert models.load_dense(tmp_path / "tiny.gguf")[0].dtype == torch.bfloat16
    models.write_checkpoint(model, tokenizer, tmp_path / "out")
    assert equal(models.load_dense(tmp_path / "out")[0], source)
    assert models.locate(tmp_path).gguf  # the only file in the folder
    (tmp_path / "snapshot").mkdir()  # the hub's cache: a link to a file of another name in another folder
    link = tmp_path / "snapshot" / "model.gguf"
    link.symlink_to((tmp_path / "tiny.gguf").rename(tmp_path / "blob"))
    assert models.load_dense(link, dtype="float32")[0].state_dict().keys() == model.state_dict().keys()


# -- errors ----------------------------------------------------------------------------------------------------------
def broken(tmp_path, folder, kind):
    """A path to something that is wrong in one way."""
    here = tmp_path / "model"
    if kind == "empty":
        here.mkdir()
        return here
    if kind == "text file":
        here = tmp_path / "model.bin"
        here.write_text("?")
        return here
    if kind == "gguf":
        here = tmp_path / "model.gguf"
        here.write_text("?")
        return here
    import shutil

    shutil.copytree(folder, here)
    if kind == "cut tokenizer":
        (here / "tokenizer.json").write_text("{")
    elif kind == "no words":  # what transformers makes of a folder with this file alone
        (here / "tokenizer.json").unlink()
        (here / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    elif kind == "no weights":
        (here / "model.safetensors").unlink()
    elif kind == "cut weights":
        content = (here / "model.safetensors").read_bytes()
        (here / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif kind == "missing weights":
        from safetensors.torch import load_file, save_file

        state = load_file(here / "model.safetensors")
        state.pop("model.layers.1.mlp.up_proj.weight")
        save_file(state, here / "model.safetensors", metadata={"format": "pt"})
    else:
        config = json.loads((here / "config.json").read_text())
        if kind == "unknown type":
            config["model_type"] = "no_such_thing"
        if kind == "own code":
            config |= {
                "model_type": "mine",
                "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
            }
            (here / "code.py").write_text("raise SystemExit('this must never run')")
        if kind == "quantised":
            config["quantization_config"] = {"quant_method": "awq", "bits": 4}
        text = json.dumps(config)
        (here / "config.json").write_text(text[:-10] if kind == "bad json" else text)
    return here


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("empty", "no config.json"),
        ("text file", "not a .gguf file"),
        ("gguf", "cannot read"),
        ("cut tokenizer", "no tokenizer that can be loaded"),
        ("no words", "knows no words"),
        ("no weights", "cannot load"),
        ("cut weights", "cannot load"),
        ("missing weights", "lacks 1 weights"),
        ("unknown type", "cannot read the configuration"),
        ("own code", "cannot read the configuration"),
        ("quantised", "quantised"),
        ("bad json", "cannot read the configuration"),
    ],
)
def test_broken_checkpoints_give_one_sentence(tmp_path, folder, kind, says):
    with pytest.raises(SparseForgeError, match=says) as caught:
        models.load_dense(broken(tmp_path, folder, kind))
    assert "\n" not in str(caught.value)


def test_tensors_that_the_model_does_not_read_are_named(tmp_path, folder):
    here = shutil.copytree(folder, tmp_path / "more")
    tensors = load_file(here / "model.safetensors") | {"mtp.0.weight": torch.zeros(3), "mtp.1.weight": torch.zeros(3)}
    save_file(tensors, here / "model.safetensors", metadata={"format": "pt"})
    says = r"more holds 2 tensors that its model does not read, mtp\.0\.weight the first of them"
    with pytest.warns(SparseForgeWarning, match=says):
        model, _ = models.load_dense(here)
    assert "mtp.0.weight" not in model.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparseForgeWarning)
        models.load_dense(folder)


def test_unknown_names_and_dtypes(folder, tmp_path):
    for name in ("./nothing", tmp_path / "nothing", "a/b/c", "x.gguf"):
        with pytest.raises(SparseForgeError, match="there is no model folder or file"):
            models.load_dense(name)
    with pytest.raises(SparseForgeError, match="unknown dtype"):
        models.load_dense(folder, dtype="int8")


# -- the hub ---------------------------------------------------------------------------------------------------------
class Answer:
    def __init__(self, error=None):
        self.error = error

    def model_info(self, name, timeout):
        assert timeout == models.HUB_TIMEOUT
        if self.error is not None:
            raise self.error


def ask(monkeypatch, error, cached=None):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Answer(error))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda name, file: cached)
    return models.locate("owner/name")


def test_a_hub_that_answers_is_used(monkeypatch):
    assert ask(monkeypatch, None) == ("owner/name", {})


def test_a_hub_that_does_not_answer_leaves_the_cache(monkeypatch):
    assert ask(monkeypatch, TimeoutError("slow"), cached="/somewhere/config.json").options == {"local_files_only": True}
    with pytest.raises(SparseForgeError, match="the hub cannot be asked for it"):
        ask(monkeypatch, TimeoutError("slow"))


def test_what_the_hub_refuses(monkeypatch):
    from unittest.mock import Mock

    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    with pytest.raises(SparseForgeError, match="gated"):
        ask(monkeypatch, GatedRepoError("401", response=Mock()))
    with pytest.raises(SparseForgeError, match="no model of that name"):
        ask(monkeypatch, RepositoryNotFoundError("404", response=Mock()))


