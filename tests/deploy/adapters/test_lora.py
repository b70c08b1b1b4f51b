"""merge_lora: the update where a weight is not zero, the pattern as it was, and a report of what fell outside."""

import copy
import sys
import warnings

import pytest
import torch
from adapted_models import TARGET, adapted, layers, lowered
from packed_models import IDS, edit_json, sparse_model
from tiny_checkpoint import byte_tokenizer
from torch import nn
from transformers.pytorch_utils import Conv1D

import sparseforge_fx as sf
from sparseforge_fx.deploy.lowering.modules import SparseLinear, weight_of
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.layouts import PLANES
from sparseforge_fx.pattern import TWO_FOUR, check_pattern

peft = pytest.importorskip("peft")


def by_hand(layer):
    """Weight [out, in], its update by the formula, and both with the update on non-zeros only."""
    weight = weight_of(layer.base_layer).clone()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    update = layer.lora_alpha["default"] / layer.r["default"] * (b @ a)
    return weight, update.detach(), torch.where(weight != 0, weight + update, 0).detach()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_masked(name, packed):
    adapter = adapted(lowered(name) if packed else sparse_model(name), TARGET[name])
    expected = {
        n.removeprefix("base_model.model."): by_hand(m) for n, m in adapter.named_modules() if m in layers(adapter)
    }
    report = sf.merge_lora(adapter)
    model = adapter.get_base_model()
    assert [s["name"] for s in report["sites"]] == list(expected) and report["mode"] == "masked"
    assert not layers(model) and type(model).__name__.endswith(("CausalLM", "LMHeadModel"))
    for site in report["sites"]:
        module = model.get_submodule(site["name"])
        assert isinstance(module, SparseLinear if packed else nn.Linear | Conv1D)
        weight, update, want = expected[site["name"]]
        torch.testing.assert_close(weight_of(module), want)
        assert check_pattern(weight_of(module), TWO_FOUR)
        assert site["outside"] == pytest.approx((update[weight == 0].norm() / update.norm()).item(), rel=1e-5)
        assert site["done"] == "merged where the weight is not zero" and site["pattern"] == "2:4"
        assert site["weight"] == ("packed" if packed else "dense")
        assert [site["out"], site["in"]] == list(weight.shape)
    updates = [(u[w == 0].square().sum(), u.square().sum()) for w, u, _ in expected.values()]
    total = (sum(a for a, _ in updates) / sum(b for _, b in updates)).sqrt().item()
    assert report["outside"] == pytest.approx(total, rel=1e-5) and 0.5 < total < 0.9  # half of the weights are zero


def test_packed_and_dense_get_the_same(tmp_path):
    dense, packed = (adapted(m, "all-linear") for m in (sparse_model("llama"), lowered("llama")))
    for adapter in (dense, packed):
        sf.merge_lora(adapter)
    dense, packed = dense.get_base_model(), packed.get_base_model()
    torch.testing.assert_close(packed(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
    sf.save_packed(packed, byte_tokenizer(), tmp_path / "p")  # and goes on as any other packed model
    assert torch.equal(sf.load(tmp_path / "p")[0](IDS).logits, packed(IDS).logits)


def test_packed_keeps_layout_and_dtype():
    model = lowered("llama", torch.bfloat16)
    up = model.model.layers[0].mlp.up_proj
    up.change_layout(PLANES)
    adapter = adapted(model, ["up_proj"])
    _, _, want = by_hand(layers(adapter)[0])
    sf.merge_lora(adapter)
    assert up.layout == "planes" and up.weight.dtype == torch.bfloat16
    torch.testing.assert_close(up.weight, want.to(torch.bfloat16))
    with pytest.raises(SparseForgeError, match="cannot replace"):
        up.replace_weight(torch.zeros(4, 4))


def test_separate_changes_nothing():
    adapter = adapted(sparse_model("llama"), ["q_proj"])
    before, logits = copy.deepcopy(adapter.state_dict()), adapter(IDS).logits
    report = sf.merge_lora(adapter, "separate")
    assert all(torch.equal(v, before[k]) for k, v in adapter.state_dict().items())
    assert torch.equal(adapter(IDS).logits, logits)
    assert {s["done"] for s in report["sites"]} == {"kept beside"}
    masked = sf.merge_lora(adapter, "masked")
    assert masked["outside"] == report["outside"] > 0


def test_a_weight_without_zeros_takes_all_of_it():
    model = sparse_model("llama")
    model.model.layers[0].self_attn.q_proj.weight.data.normal_()
    adapter = adapted(model, ["q_proj"])
    with torch.no_grad():
        weight, update, _ = by_hand(layers(adapter)[0])
        want = weight + update
    report = sf.merge_lora(adapter)
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight.detach(), want)
    first, second = report["sites"]
    assert (first["outside"], first["pattern"], first["done"]) == (0.0, None, "merged whole")
    assert second["outside"] > 0 and second["pattern"] == "2:4"


def test_several_adapters():
    adapter = adapted(sparse_model("llama"), ["q_proj"])
    adapter.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], r=2, lora_alpha=6))
    layer = layers(adapter)[0]
    nn.init.normal_(layer.lora_B["second"].weight)
    weight, update, _ = by_hand(layer)
    second = 3 * (layer.lora_B["second"].weight @ layer.lora_A["second"].weight).detach()
    both = copy.deepcopy(adapter)
    sf.merge_lora(both, adapters=["default", "second"])
    q = both.get_base_model().model.layers[0].self_attn.q_proj
    torch.testing.assert_close(q.weight.detach(), torch.where(weight != 0, weight + update + second, 0))
    report = sf.merge_lora(adapter, adapters=["second"])
    q = adapter.get_base_model().model.layers[0].self_attn.q_proj
    torch.testing.assert_close(q.weight.detach(), torch.where(weight != 0, weight + second, 0))
    assert report["adapters"] == ["second"]


def test_biases_of_adapters():
    adapter = adapted(lowered("opt"), ["fc1"], lora_bias=True)
    layer = layers(adapter)[0]
    want = layer.base_layer.bias + layer.lora_B["default"].bias * layer.scaling["default"]
    sf.merge_lora(adapter)
    assert torch.equal(adapter.get_base_model().model.decoder.layers[0].fc1.bias, want)


def test_modules_that_were_trained_whole():
    model = sparse_model("llama")
    adapter = adapted(model, ["q_proj"], modules_to_save=["up_proj", "lm_head"])
    head = adapter.base_model.model.lm_head.modules_to_save["default"].weight
    up = adapter.base_model.model.model.layers[0].mlp.up_proj
    before, trained = up.original_module.weight.clone(), up.modules_to_save["default"].weight
    for weight in (head, trained):
        weight.data += 1
    wanted = head.clone()
    report = sf.merge_lora(adapter)
    merged = adapter.get_base_model()
    assert torch.equal(merged.lm_head.weight, wanted)
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, torch.where(before != 0, before + 1, 0))
    site = next(s for s in report["sites"] if s["name"].endswith("0.mlp.up_proj"))
    assert site["outside"] == pytest.approx(0.5**0.5, rel=1e-4)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]])
def test_one_of_two_that_are_tied_is_merged_alone(tmp_path, targets):
    model = sparse_model("llama")
    model.lm_head.weight.data[256] = 0.1  # the padding's row is of zeros, which stay
    adapter = adapted(model, targets)
    with torch.no_grad():
        trained = adapter(IDS).logits
        report = sf.merge_lora(adapter)
        torch.testing.assert_close(model(IDS).logits, trained, rtol=1e-4, atol=1e-4)
    assert all("in a copy of its own" in site["done"] for site in report["sites"])
    assert not model.config.tie_word_embeddings and not model.all_tied_weights_keys
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_a_tied_head_that_was_trained_whole_is_no_longer_tied():
    adapter = adapted(sparse_model("llama"), ["q_proj"], modules_to_save=["lm_head"])
    sf.merge_lora(adapter)
    assert not adapter.get_base_model().config.tie_word_embeddings
    adapter = adapted(sparse_model("llama"), ["q_proj"])
    sf.merge_lora(adapter)
    assert adapter.get_base_model().config.tie_word_embeddings


def test_what_is_refused_changes_nothing():
    def refused(match, adapter, *arguments, **options):
        before = copy.deepcopy(adapter.state_dict())
        with pytest.raises(SparseForgeError, match=match):
            sf.merge_lora(adapter, *arguments, **options)
        assert all(torch.equal(v, before[k]) or v.isnan().any() for k, v in adapter.state_dict().items())

    plain = adapted(sparse_model("llama"), ["q_proj"])
    refused("no PeftModel", plain.get_base_model())
    refused("choose 'masked' or 'separate'", plain, "dense")
    refused("no adapter 'other': choose from default", plain, adapters=["other"])
    plain.merge_adapter()
    refused(r"unmerge_adapter\(\)", plain)
    plain.unmerge_adapter()
    layers(plain)[-1].lora_B["default"].weight.data[0, 0] = torch.nan
    refused("NaN or inf", plain)
    refused("no plain LoRA", adapted(lowered("llama"), ["q_proj"], use_dora=True))
    refused("has no bias", adapted(lowered("llama"), ["q_proj"], lora_bias=True))
    ties = adapted(sparse_model("llama"), ["lm_head"])
    ties.get_base_model().all_tied_weights_keys["other.weight"] = "model.embed_tokens.weight"
    refused("one of several that the model ties", ties)
    mixed = sparse_model("llama")
    sf.quantize(mixed, "int8", include="*layers.1.*")
    mixed = adapted(mixed, ["q_proj"])
    refused("'model.layers.1.self_attn.q_proj' is packed in 2:4 int8", mixed)
    refused("trainable tokens", adapted(sparse_model("llama"), ["q_proj"], trainable_token_indices=[1, 2]))


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SparseForgeError, match=r"pip install 'sparseforge-fx\[lora\]'"):
        sf.merge_lora(object())


def test_an_adapter_of_another_model_is_not_merged_in_silence(tmp_path):
    adapted(sparse_model("gpt2"), ["c_fc"]).save_pretrained(tmp_path)
    edit_json(tmp_path / "adapter_config.json", lambda c: c.update(target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that keys are missing, and goes on
        foreign = peft.PeftModel.from_pretrained(sparse_model("llama"), tmp_path)
    for mode in ("masked", "separate"):
        with pytest.raises(SparseForgeError, match="was made for another model"):
            sf.merge_lora(foreign, mode)
