"""One bar while a model is loaded, and it is ours."""

import pytest
from tiny_checkpoint import tiny_llama, write_checkpoint, write_gguf
from transformers import modeling_gguf_pytorch_utils as gguf_weights
from transformers.utils import logging

import sparseforge_fx as sf
from sparseforge_fx.models import dense as models


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("loading")
    write_gguf(root / "tiny.gguf", tiny_llama())
    model, tokenizer = models.load_dense(write_checkpoint(root / "dense"))
    sf.sparsify(model, method="magnitude")
    sf.save_packed(model, tokenizer, root / "packed")
    return root


@pytest.fixture(autouse=True)
def theirs_is_on():
    shown = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    yield
    if not shown:
        logging.disable_progress_bar()


CASES = ["dense", "tiny.gguf", "packed"]


@pytest.mark.parametrize("name", CASES)
def test_a_terminal_sees_one_bar(places, name, monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    sf.load(places / name)
    out, err = capfd.readouterr()
    assert f"{name} " in err and "100%" in err and "it/s" not in err and not out
    assert "Loading weights" not in err and "Converting" not in err


@pytest.mark.parametrize("name", CASES)
def test_a_pipe_sees_nothing(places, name, capfd):
    sf.load(places / name)
    assert capfd.readouterr() == ("", "")


def test_theirs_is_as_it_was_afterwards(places, monkeypatch):
    before = gguf_weights.tqdm
    asked = []
    monkeypatch.setattr(logging, "_tqdm_hook", lambda factory, args, kwargs: asked.append(1) or factory(*args))
    models.load_dense(places / "dense")
    weights = (places / "dense" / "model.safetensors").read_bytes()
    (places / "dense" / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(sf.SparseForgeError):
        models.load_dense(places / "dense")
    assert not asked and list(logging.tqdm([1, 2])) == [1, 2] and asked
    assert gguf_weights.tqdm is before
