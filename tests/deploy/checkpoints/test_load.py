"""sf.load: one way in, whatever the checkpoint is."""

import pytest
import torch
from packed_models import IDS, pack_to, sparse_model
from tiny_checkpoint import byte_tokenizer, write_gguf
from torch import nn
from transformers import LlamaForCausalLM

import sparseforge_fx as sf
from sparseforge_fx.deploy.checkpoints import load as loading
from sparseforge_fx.deploy.lowering.sparse_modules import SparseLinear
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.models import dense
from sparseforge_fx.models.dense import Location, write_checkpoint

KINDS = {"dense": nn.Linear, "packed": SparseLinear, "tiny.gguf": nn.Linear}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("load")
    write_checkpoint(sparse_model("llama"), byte_tokenizer(), root / "dense")
    pack_to(root / "packed")
    write_gguf(root / "tiny.gguf", sparse_model("llama"))
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_the_same_model(places, kind):
    model, tokenizer = sf.load(places / kind, dtype="float32")
    assert type(model) is LlamaForCausalLM and not model.training
    assert type(model.model.layers[0].mlp.up_proj) is KINDS[kind]
    assert tokenizer("fox").input_ids == byte_tokenizer()("fox").input_ids
    torch.testing.assert_close(model(IDS).logits, sparse_model("llama")(IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_and_device(places, kind):
    model, _ = sf.load(places / kind, dtype=torch.bfloat16, device="cpu")
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    assert sf.load(places / kind, device_map="cpu")[0].device.type == "cpu"
    with pytest.raises(SparseForgeError, match="give one of the two"):
        sf.load(places / kind, device="cpu", device_map="auto")
    with pytest.raises(SparseForgeError, match="unknown dtype"):
        sf.load(places / kind, dtype="int3")


@pytest.mark.parametrize("kind", ["dense", "packed"])
def test_a_hub_id_of_either_kind(places, kind, monkeypatch):
    """The hub is its cache here: what it would give lies in a folder."""
    found = Location("owner/name", {})
    real = dense.transformers.AutoConfig.from_pretrained
    for home in (dense, loading):
        monkeypatch.setattr(home, "locate", lambda name: found)
    monkeypatch.setattr(loading, "_download", lambda where: places / kind)
    monkeypatch.setattr(dense.transformers.AutoConfig, "from_pretrained", lambda name, **o: real(places / kind, **o))
    monkeypatch.setattr(loading, "load_dense", lambda name, **options: ("dense", None))
    model, _ = sf.load("owner/name")
    assert model == "dense" if kind == "dense" else isinstance(model.model.layers[0].mlp.up_proj, SparseLinear)


def test_nothing_there(tmp_path):
    with pytest.raises(SparseForgeError, match="check the path"):
        sf.load(tmp_path / "nowhere" / "at" / "all")
