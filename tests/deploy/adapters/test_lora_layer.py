"""LoRA by PEFT beside packed 2:4 weights: found, trained, written, loaded on packed and dense models alike."""

import sys

import pytest
import torch
from adapted_models import TARGET, adapted, layers, lowered
from packed_models import GREEDY, IDS, SITES, pack_to, remembered, sparse_model

import sparseforge_fx as sf
from sparseforge_fx.deploy import adapters, transformers_hook
from sparseforge_fx.deploy.checkpoints.packed_state import packed_linears
from sparseforge_fx.deploy.lowering.sparse_modules import SparseLinear
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.layouts import PLANES

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("name", SITES)
def test_as_beside_the_dense_weight(name):
    got, want = (adapted(m, TARGET[name]) for m in (lowered(name), sparse_model(name)))
    assert all(isinstance(m.base_layer, SparseLinear) for m in layers(got)) and len(layers(got)) == len(layers(want))
    assert {n for n, p in got.named_parameters() if p.requires_grad} == {
        n for n, p in want.named_parameters() if p.requires_grad
    }
    assert not torch.allclose(got(IDS).logits, remembered(name)[1], atol=1e-2)
    torch.testing.assert_close(got(IDS).logits, want(IDS).logits, rtol=1e-4, atol=1e-4)
    for model in (got, want):
        model(IDS, labels=IDS).loss.backward()
    grads = dict(want.named_parameters())
    for path, parameter in got.named_parameters():
        if parameter.requires_grad:
            assert "lora_" in path
            torch.testing.assert_close(parameter.grad, grads[path].grad, rtol=1e-3, atol=1e-5)
    with got.disable_adapter():
        torch.testing.assert_close(got(IDS).logits, remembered(name)[1], rtol=1e-4, atol=1e-5)


def test_training_lowers_the_loss_and_leaves_packed_weights(tmp_path):
    model, _ = sf.load(pack_to(tmp_path / "p"))
    before = {n: m.weight for n, m in packed_linears(model).items()}
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(adapter(IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    after = {n.replace(".base_layer", ""): m.weight for n, m in packed_linears(adapter.get_base_model()).items()}
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_written_and_loaded_on_both(name, tmp_path, recwarn):
    adapter = adapted(lowered(name), TARGET[name])
    adapter.save_pretrained(tmp_path / "adapter")
    pack_to(tmp_path / "packed", name)
    with torch.no_grad():
        want = adapter(IDS).logits
        for base in (sf.load(tmp_path / "packed")[0], lowered(name), sparse_model(name)):
            got = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
            torch.testing.assert_close(got(IDS).logits, want, rtol=1e-4, atol=1e-4)
            assert torch.equal(got.generate(input_ids=IDS, **GREEDY), adapter.generate(input_ids=IDS, **GREEDY))
    assert not [w for w in recwarn if "Unsupported layer type" in str(w.message) or "fan_in_fan_out" in str(w.message)]


def test_adapters_in_bfloat16_and_on_planes():
    model = lowered("llama", torch.bfloat16)
    for module in packed_linears(model).values():
        module.change_layout(PLANES)
    adapter = adapted(model, ["up_proj"])
    layer = layers(adapter)[0]
    assert layer.lora_A["default"].weight.dtype == torch.float32  # PEFT trains adapters of 16-bit models in float32
    assert adapter(IDS).logits.dtype == torch.bfloat16
    adapter(IDS, labels=IDS).loss.backward()
    assert layer.lora_A["default"].weight.grad.abs().sum() > 0


def test_all_linear_finds_packed_and_dense_ones_but_no_head():
    model = sparse_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data.fill_(0.1)  # stays dense
    sf.lower_modules(model, gate=False)
    adapter = adapted(model, "all-linear")
    assert len(layers(adapter)) == SITES["llama"]
    adapter.add_adapter("second", peft.LoraConfig(target_modules="all-linear", r=2))
    assert len(layers(adapter)) == SITES["llama"] and not isinstance(
        adapter.base_model.model.lm_head, torch.nn.ModuleDict
    )


def test_dora():
    torch.manual_seed(0)
    got = adapted(lowered("gpt2"), ["c_attn"], use_dora=True)
    torch.manual_seed(0)
    want = adapted(sparse_model("gpt2"), ["c_attn"], use_dora=True, fan_in_fan_out=True)
    torch.testing.assert_close(got(IDS).logits, want(IDS).logits, rtol=1e-4, atol=1e-4)


def test_nothing_is_merged_into_a_packed_weight():
    adapter = adapted(lowered("llama"), ["q_proj"])
    want = adapter(IDS).logits
    for merge in (adapter.merge_and_unload, adapter.merge_adapter):
        with pytest.raises(SparseForgeError, match=r"packed 2:4.*sf\.merge_lora"):
            merge()
    assert torch.equal(adapter(IDS).logits, want)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base_weight_are_refused(start):
    with pytest.raises(SparseForgeError, match="packed ones are frozen"):
        adapted(lowered("llama"), ["q_proj"], init_lora_weights=start)


def test_registered_if_peft_came_first(monkeypatch):  # in the other tests it came later
    config, utils = peft.LoraConfig, peft.tuners.tuners_utils
    monkeypatch.setattr(config, "__post_init__", config.__post_init__.__wrapped__)
    monkeypatch.setattr(utils, "_maybe_include_all_linear_layers", utils._maybe_include_all_linear_layers.__wrapped__)
    monkeypatch.delitem(sys.modules, "sparseforge_fx.deploy.adapters.lora_layer")
    monkeypatch.setattr(adapters, "lora_layer", None)
    assert config()._custom_modules is None
    transformers_hook.install()
    assert list(config()._custom_modules) == [SparseLinear]


def test_registered_once():
    before, finders = peft.LoraConfig.__post_init__, list(sys.meta_path)
    transformers_hook.install()
    assert peft.LoraConfig.__post_init__ is before and sys.meta_path == finders


@pytest.mark.parametrize("kind", [peft.LoraConfig, peft.LoHaConfig])
@pytest.mark.parametrize("copied", ["up_proj", "mlp"])
def test_a_packed_module_is_not_copied_to_be_trained(kind, copied):
    model = lowered("llama")
    before = list(model.state_dict())
    targets = ["q_proj"] if kind is peft.LoraConfig else ["lm_head"]
    with pytest.raises(SparseForgeError, match=r"modules_to_save has 'model.layers.0.mlp.\w+', which is packed in 2:4"):
        peft.get_peft_model(model, kind(target_modules=targets, modules_to_save=[copied]))
    assert list(model.state_dict()) == before
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            layer.mlp.set_submodule(name, getattr(layer.mlp, name).to_dense())
    adapter = peft.get_peft_model(model, kind(target_modules=targets, modules_to_save=[copied]))
    assert any(p.requires_grad for n, p in adapter.named_parameters() if copied in n)
