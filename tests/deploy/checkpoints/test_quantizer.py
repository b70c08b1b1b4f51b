"""from_pretrained of packed checkpoints: pipelines, devices, dtypes, other classes, and loaders that do not know us."""

import shutil
import sys

import pytest
import torch
from packed_models import GREEDY, IDS, SITES, edit_json, pack_to, remembered, sparse_model
from safetensors.torch import load_file
from tiny_checkpoint import byte_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, pipeline
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto

import sparseforge_fx as sf
from sparseforge_fx.deploy import checkpoints, transformers_hook
from sparseforge_fx.deploy.checkpoints.packed_state import packed_linears
from sparseforge_fx.deploy.checkpoints.quantizer import PackedConfig
from sparseforge_fx.deploy.lowering.sparse_modules import SparseLinear
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.layouts import PLANES
from sparseforge_fx.kernels.packed import METHOD
from sparseforge_fx.models.dense import write_checkpoint

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pack_to(tmp_path_factory.mktemp("packed") / "llama")


def test_device_map_and_generate(folder):
    _, logits, text = remembered("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    assert len(packed_linears(model)) == SITES["llama"]
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.generate(IDS, **GREEDY), text)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    other, _ = sf.load(folder, device="cpu")
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_pipeline(folder):
    model, _, _ = remembered("llama")
    tokenizer = byte_tokenizer()
    want = pipeline("text-generation", model=model, tokenizer=tokenizer)("The fox", do_sample=False, max_new_tokens=6)
    assert pipeline("text-generation", model=str(folder))("The fox", do_sample=False, max_new_tokens=6) == want


def test_the_inner_model(folder):
    model, _, _ = remembered("llama")
    inner = AutoModel.from_pretrained(folder)
    assert len(packed_linears(inner)) == SITES["llama"]
    want = model.model(IDS).last_hidden_state
    torch.testing.assert_close(inner(IDS).last_hidden_state, want, rtol=1e-4, atol=1e-5)


def test_a_model_with_another_head(tmp_path):
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 97,
    }
    model = BertForMaskedLM(BertConfig(**size))
    sf.sparsify(model, example_inputs={"input_ids": IDS})
    model.cls.predictions.transform.dense.weight.data[:, ::2] = 0  # belongs to the head: the other model has none
    sf.save_packed(model, None, tmp_path / "p")
    other = BertForSequenceClassification.from_pretrained(tmp_path / "p")
    inner = packed_linears(other)
    assert len(inner) == 6 and all(torch.equal(m.weight, model.get_submodule(n).weight) for n, m in inner.items())


def test_another_dtype(folder):
    want = sparse_model("llama").to(torch.bfloat16)
    got = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).dequantize()
    assert all(torch.equal(got.state_dict()[k], v) for k, v in want.state_dict().items())
    assert sf.load(folder, dtype="float16")[0](IDS).logits.dtype == torch.float16
    with pytest.raises(SparseForgeError, match="choose bfloat16, float16 or float32"):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def test_written_again(folder, tmp_path):
    for model in (AutoModelForCausalLM.from_pretrained(folder), sf.load(folder)[0]):
        model.save_pretrained(tmp_path / "again")
        want, got = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
        assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
        _, logits, _ = remembered("llama")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        torch.testing.assert_close(again(IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_packed_again(folder, tmp_path):
    model, tokenizer = sf.load(folder)
    sf.save_packed(model, tokenizer, tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()
    assert torch.equal(model(IDS).logits, sf.load(tmp_path / "again")[0](IDS).logits)


def test_a_loader_that_does_not_know_the_method_stops(folder, monkeypatch):
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, METHOD)
    with pytest.raises(RuntimeError, match="mismatch"):  # and does not run with random weights
        AutoModelForCausalLM.from_pretrained(folder)


def test_what_the_quantizer_refuses(folder, tmp_path):
    header = PackedConfig(**AutoModelForCausalLM.from_pretrained(folder).config.quantization_config.to_dict())
    write_checkpoint(sparse_model("llama"), None, tmp_path / "dense")
    with pytest.raises(SparseForgeError, match=r"sf\.save_packed first"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=header)
    with pytest.raises(SparseForgeError, match="no version"):
        PackedConfig(quant_method=METHOD)
    pack_to(tmp_path / "p", max_shard_size="20KB")
    index = tmp_path / "p" / "model.safetensors.index.json"
    outside = str(folder / "model.safetensors")
    edit_json(index, lambda i: i["weight_map"].update({k: outside for k in list(i["weight_map"])[:1]}))
    with pytest.raises(SparseForgeError, match="not opened"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "p")


OTHER_WAYS = {  # in which from_pretrained does not tell where it looks before it has built a model
    "class": lambda folder: LlamaForCausalLM.from_pretrained(folder),
    "subfolder": lambda folder: AutoModelForCausalLM.from_pretrained(folder.parent, subfolder=folder.name),
    "adapter": lambda folder: AutoModelForCausalLM.from_pretrained(adapter_of(folder)),
}


def adapter_of(folder):
    """A folder of an adapter for it."""
    model = peft.get_peft_model(sparse_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(folder.parent / "adapter")
    edit_json(
        folder.parent / "adapter" / "adapter_config.json", lambda c: c.update(base_model_name_or_path=str(folder))
    )
    return folder.parent / "adapter"


def lie_about_places(folder, place):
    names = f"{place}/model.safetensors"
    edit_json(
        folder / "model.safetensors.index.json", lambda i: i.update(weight_map=dict.fromkeys(i["weight_map"], names))
    )


LIES = {
    "adapter": (lambda f: shutil.copy(adapter_of(f) / "adapter_config.json", f), "adapter_config.json is no file"),
    "pickle": (lambda f: (f / "pytorch_model.bin").touch(), "pytorch_model.bin is no file"),
    "one file": (lambda f: shutil.copy(f.parent / "outside" / "model.safetensors", f), "is no file of the packed"),
    "outside": (lambda f: lie_about_places(f, "../outside"), "not opened"),
    "absolute": (lambda f: lie_about_places(f, f.parent / "outside"), "not opened"),
    "below": (lambda f: lie_about_places(f, shutil.copytree(f.parent / "outside", f / "in").name), "not opened"),
    "layers": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(num_hidden_layers=10**6)),
        "more than 166 modules|tells of 1000000 layers",
    ),
}


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_the_other_ways_in(tmp_path, way):
    folder = pack_to(tmp_path / "p", max_shard_size="20KB")
    assert len(packed_linears(OTHER_WAYS[way](folder))) == SITES["llama"]


@pytest.mark.parametrize(
    ("way", "lie"),
    [(way, lie) for way in OTHER_WAYS for lie in LIES if way != "subfolder" or lie not in ("adapter", "absolute")],
)
def test_lies_at_the_other_ways_in(tmp_path, way, lie):
    folder = pack_to(tmp_path / "p", max_shard_size="20KB")
    for place in (folder, pack_to(tmp_path / "outside")):  # without checksums, both with the same header
        edit_json(place / "config.json", lambda c: c["quantization_config"].pop("files"))
    change, match = LIES[lie]
    change(folder)
    with pytest.raises(SparseForgeError, match=match):
        OTHER_WAYS[way](folder)


def test_registered_if_transformers_came_first(
    monkeypatch,
):  # and if it comes later: a fresh process in test_checkpoints
    for table in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(table, METHOD)
    monkeypatch.delitem(sys.modules, transformers_hook.QUANTIZER)
    monkeypatch.setattr(checkpoints, "quantizer", None)
    finders = list(sys.meta_path)
    transformers_hook.install()
    assert METHOD in auto.AUTO_QUANTIZER_MAPPING and METHOD in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    assert sys.meta_path == finders


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_layouts_and_the_way_back(name):
    model, _, _ = remembered(name)
    planes = sparse_model(name)
    sf.lower_modules(planes, gate=False)
    for path, module in packed_linears(planes).items():
        before = module.packed()
        module.change_layout(PLANES)
        assert module.layout == "planes"
        assert all(torch.equal(a, b) for a, b in zip(module.packed()[:2], before[:2], strict=True))
        dense = module.to_dense()
        assert isinstance(dense, Conv1D if name == "gpt2" else torch.nn.Linear) and isinstance(module, SparseLinear)
        assert torch.equal(dense.weight, model.get_submodule(path).weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{"device": "cuda"}, {"device_map": "auto"}])
def test_on_a_gpu(folder, options):
    model, _ = sf.load(folder, dtype="bfloat16", **options)
    assert {m.layout for m in packed_linears(model).values()} == {"planes"}
    want = sparse_model("llama", torch.bfloat16).cuda()
    torch.testing.assert_close(model(IDS.cuda()).logits, want(IDS.cuda()).logits, rtol=0.05, atol=0.05)
    assert model.generate(IDS.cuda(), **GREEDY).shape == (1, IDS.shape[1] + 8)
