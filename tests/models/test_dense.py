"""Models by name: what loads, what is written, and one clear sentence for everything else."""

import contextlib
import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_checkpoint import byte_tokenizer, tiny_llama, write_checkpoint, write_gguf

from sparseforge_fx import SparseForgeError, models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("models") / "dense")


def equal(one, two):
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- folders ---------------------------------------------------------------------------------------------------------
def test_save_and_load_give_the_same_model_and_tokenizer(folder, tmp_path):
    model, tokenizer = models.load_model(folder)
    assert not model.training
    models.save_model(model, tokenizer, tmp_path / "new" / "out")
    again, tokens = models.load_model(tmp_path / "new" / "out")
    assert equal(model, again)
    assert tokens("Hello, world")["input_ids"] == tokenizer("Hello, world")["input_ids"]


def test_the_written_folder_does_not_say_sparse(folder, tmp_path):
    models.save_model(*models.load_model(folder), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"sparsity_config", "quantization_config", "compression_config"} & config.keys()
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_the_checkpoint_decides_the_dtype_unless_told(folder, tmp_path):
    half = tiny_llama().to(torch.bfloat16)
    models.save_model(half, byte_tokenizer(), tmp_path / "half")
    assert models.load_model(tmp_path / "half")[0].dtype == torch.bfloat16
    assert models.load_model(tmp_path / "half", dtype="float32")[0].dtype == torch.float32
    assert models.load_model(folder, dtype=torch.float16)[0].dtype == torch.float16


def test_the_class_that_wrote_the_checkpoint_loads_it(tmp_path):
    from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

    bert = BertForMaskedLM(
        BertConfig(vocab_size=260, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    models.save_model(bert, byte_tokenizer(), tmp_path / "bert")
    assert type(models.load_model(tmp_path / "bert")[0]) is BertForMaskedLM
    vit = ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    )
    models.save_model(vit, None, tmp_path / "vit")
    model, tokenizer = models.load_model(tmp_path / "vit")
    assert type(model) is ViTForImageClassification and tokenizer is None


def test_a_skeleton_has_shapes_and_ties_but_no_weights(folder):
    model = models.load_skeleton(folder)
    assert all(p.is_meta for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight


# -- GGUF ------------------------------------------------------------------------------------------------------------
def test_a_gguf_file_loads_as_a_plain_model_that_can_be_saved(tmp_path):
    source = tiny_llama()
    write_gguf(tmp_path / "tiny.gguf", source)
    model, tokenizer = models.load_model(tmp_path / "tiny.gguf", dtype="float32")
    assert equal(model, source)
    assert tokenizer("fox")["input_ids"] == byte_tokenizer()("fox")["input_ids"]
    assert models.load_model(tmp_path / "tiny.gguf")[0].dtype == torch.bfloat16
    models.save_model(model, tokenizer, tmp_path / "out")
    assert equal(models.load_model(tmp_path / "out")[0], source)
    assert models.locate(tmp_path).gguf  # the only file in the folder


# -- writing ---------------------------------------------------------------------------------------------------------
def test_a_folder_that_is_not_empty_is_not_touched(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(SparseForgeError, match="not empty"):
        models.save_model(*models.load_model(folder), out)
    assert os.listdir(out) == ["precious"] and os.listdir(tmp_path) == ["out"]


def test_overwriting_replaces_the_whole_folder(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    models.save_model(*models.load_model(folder), out, overwrite=True)
    assert (out / "config.json").exists() and not (out / "old").exists()
    assert os.listdir(tmp_path) == ["out"]


def test_a_failure_while_writing_leaves_the_old_folder_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "good").write_text("good")
    with pytest.raises(RuntimeError), models.new_folder(out, overwrite=True) as partial:
        (partial / "bad").write_text("half")
        raise RuntimeError
    assert os.listdir(out) == ["good"] and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_between_the_renames_is_put_right_later(tmp_path, monkeypatch, renames):
    """The new folder was complete: it becomes the folder the next time somebody looks."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    real, done = os.replace, []

    class Killed(BaseException):
        pass

    def replace(a, b):
        if len(done) == renames:
            raise Killed
        done.append((a, b))
        real(a, b)

    def rmtree(path, **options):
        raise Killed

    with pytest.raises(Killed), models.new_folder(out, overwrite=True) as partial:
        (partial / "new").write_text("new")
        monkeypatch.setattr(models.os, "replace", replace)
        monkeypatch.setattr(models.shutil, "rmtree", rmtree)
    monkeypatch.undo()
    models.finish_replacement(out)
    assert os.listdir(out) == ["new"] and os.listdir(tmp_path) == ["out"]


def test_a_file_in_the_place_of_the_folder(folder, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SparseForgeError, match="is a file"):
        models.save_model(*models.load_model(folder), tmp_path / "out", overwrite=True)


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
    if kind == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (here / name).unlink()
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
        ("no tokenizer", "no tokenizer"),
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
        models.load_model(broken(tmp_path, folder, kind))
    assert "\n" not in str(caught.value)


def test_unknown_names_and_dtypes(folder, tmp_path):
    for name in ("./nothing", tmp_path / "nothing", "a/b/c", "x.gguf"):
        with pytest.raises(SparseForgeError, match="there is no model folder or file"):
            models.load_model(name)
    with pytest.raises(SparseForgeError, match="unknown dtype"):
        models.load_model(folder, dtype="int8")


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


# -- output folders that are no plain folders ------------------------------------------------------------------------
def fill(out, name="new", **options):
    with models.new_folder(out, overwrite=True, **options) as folder:
        (folder / name).write_text(name)
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / name).write_text(name)


def whole(out, name="new"):
    return sorted(os.listdir(out)) == [name, "sub"] and os.listdir(out / "sub") == [name]


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "old").write_text("old")
    (tmp_path / "out").symlink_to("elsewhere")
    (tmp_path / "nowhere").symlink_to("made later")
    for link, target in (("out", "elsewhere"), ("nowhere", "made later")):
        fill(tmp_path / link)
        assert (tmp_path / link).is_symlink() and whole(tmp_path / target)
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "made later", "nowhere", "out"]


@pytest.fixture
def mounted(tmp_path):
    """A real mount where this process may make one."""
    out = tmp_path / "mounted"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", str(out)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield out
    subprocess.run(["umount", str(out)], check=True)


def test_a_mount_point_is_filled(mounted):
    (mounted / "lost+found").mkdir()
    models.check_output(mounted)
    fill(mounted, "old")
    fill(mounted)
    (mounted / "lost+found").rmdir()
    assert whole(mounted) and os.listdir(mounted.parent) == ["mounted"]
    with pytest.raises(RuntimeError), models.new_folder(mounted, overwrite=True) as folder:
        (folder / "bad").write_text("half")
        raise RuntimeError
    assert whole(mounted)


def test_a_read_only_mount_is_seen_before_the_work(mounted):
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    for out in (mounted, mounted / "below", mounted / "far" / "below"):
        with pytest.raises(SparseForgeError, match=r"takes no new files \(Read-only") as error:
            models.check_output(out)
        assert "\n" not in str(error.value)


def not_renamed(monkeypatch, out, error):
    real = os.replace

    def replace(a, b):
        if str(out) in (str(a), str(b)):
            raise OSError(error, os.strerror(error))
        real(a, b)

    monkeypatch.setattr(models.os, "replace", replace)


@pytest.mark.parametrize("error", ["EBUSY", "EXDEV"])
def test_a_folder_that_turns_out_to_be_a_mount(tmp_path, monkeypatch, error):
    """Bound from elsewhere on the same disk, it looks like any folder until it is renamed."""
    out = tmp_path / "out"
    fill(out, "old")
    not_renamed(monkeypatch, out, getattr(errno, error))
    fill(out)
    assert whole(out) and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("moves", range(9))
def test_a_kill_while_a_mount_is_filled_is_put_right_later(tmp_path, monkeypatch, moves):
    """Old or new, never a mixture: before the new content was complete the old one stays."""
    out = tmp_path / "out"
    fill(out, "old")
    monkeypatch.setattr(models.os.path, "ismount", lambda path: str(path) == str(out))
    real, done = os.replace, []

    class Killed(BaseException):
        pass

    def replace(a, b):
        if len(done) == moves:
            raise Killed
        done.append(a)
        real(a, b)

    monkeypatch.setattr(models.os, "replace", replace)
    monkeypatch.setattr(models.shutil, "rmtree", lambda path, **options: None)
    with contextlib.suppress(Killed):
        fill(out)
    monkeypatch.undo()
    models.finish_replacement(out)
    assert whole(out, "new" if moves else "old"), os.listdir(out)


def test_a_parent_that_is_a_file_or_not_there(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "far" / "out"):
        with pytest.raises(SparseForgeError, match=r"cannot be written: .*file is a file") as error:
            models.check_output(out)
        assert "\n" not in str(error.value)
    models.check_output(tmp_path / "far" / "out")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
def test_a_parent_that_takes_nothing():
    with pytest.raises(SparseForgeError, match=r"/proc takes no new files"):
        models.check_output(Path("/proc/none/out"))
