"""Models that carry PEFT adapters: the base weights become sparse, the adapters stay as they are. Needs PEFT."""

import pytest
import torch
from tiny_models import build

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.adapters import find_adapters
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.passes import find_linears
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.pattern import TWO_FOUR, check_pattern

peft = pytest.importorskip("peft")

KINDS = {
    "lora": peft.LoraConfig(r=8, target_modules="all-linear"),
    "trained biases": peft.LoraConfig(r=8, target_modules="all-linear", bias="all"),
    "a trained head": peft.LoraConfig(r=8, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "ia3": peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": peft.LoHaConfig(r=8, target_modules=["q_proj", "down_proj"]),
    "prompt": peft.PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=32),
}


def wrapped(kind):
    torch.manual_seed(0)
    config = KINDS[kind]
    config.task_type = "CAUSAL_LM"
    return peft.get_peft_model(build("llama of one block"), config).eval()


def quick(model, **options):
    ids = torch.randint(3, 97, (16, 12), generator=torch.Generator().manual_seed(0))
    return sf.sparsify(model, ids, steps=2, length=12, show_progress=False, **options).report


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "prompt"])
def test_base_layers_are_sites_and_adapters_are_not(kind):
    model = wrapped(kind)
    sites = find_linears(capture(model))
    chosen = eligible(sites)
    assert len(chosen) == 7
    own = find_adapters(model).own
    assert own and not own & {id(model.get_parameter(s.fqn)) for s in chosen}
    named = {id(p): n for n, p in model.named_parameters()}
    reasons = {s.fqn: s.reason for s in sites}
    assert all(reasons.get(named[i], "part of a PEFT adapter") == "part of a PEFT adapter" for i in own)
    assert all(model.get_parameter(s.fqn).requires_grad is False for s in chosen)


@pytest.mark.parametrize("options", [{}, {"method": "gmp"}, {"method": "wanda"}], ids=str)
def test_a_run_leaves_adapters_bit_for_bit(options):
    model = wrapped("lora")
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    report = quick(model, **options)
    for name, p in model.named_parameters():
        assert p.requires_grad == before[name][1]
        if "base_layer.weight" in name:
            assert check_pattern(p, TWO_FOUR)
        elif "lora_" in name or "norm" in name:  # PEFT froze the norms: the user's model outside its sites
            assert torch.equal(p, before[name][0]), name
    assert any("PEFT adapters" in n and "7 of them frozen" in n for n in report["notes"])


def test_vectors_of_adapters_do_not_train_either():
    model = wrapped("lora")
    vector = torch.nn.Parameter(torch.ones(32))  # as DoRA's magnitudes
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].register_parameter("scale", vector)
    layer.lora_A["default"].register_forward_pre_hook(lambda m, args: (args[0] * m.scale,))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    quick(model)
    assert torch.equal(vector, torch.ones(32))


def test_an_adapter_named_by_the_user_stays_dense():
    reasons = {s.fqn: s.reason for s in find_linears(capture(wrapped("lora")), include=["*lora_A*"])}
    assert {r for n, r in reasons.items() if "lora_A" in n} == {"part of a PEFT adapter"}
    with pytest.raises(SparseForgeError, match="nothing to prune"):
        quick(wrapped("lora"), include=["*lora_A*"])


def test_adapters_that_read_the_base_weight_are_to_be_merged_first():
    model = peft.get_peft_model(
        build("llama of one block"), peft.LoraConfig(r=8, target_modules="all-linear", use_dora=True)
    )
    with pytest.raises(SparseForgeError, match=r"nothing to prune.*merge_and_unload"):
        quick(model)


def test_merged_adapters_would_fill_the_zeros():
    model = wrapped("lora")
    model.merge_adapter()
    with pytest.raises(SparseForgeError, match=r"merged into it.*merge_and_unload\(\) first"):
        quick(model)
    plain = model.merge_and_unload()
    assert all(check_pattern(plain.get_parameter(s["name"]), TWO_FOUR) for s in quick(plain)["sites"])


def test_several_adapters_and_those_that_transformers_adds():
    model = wrapped("a trained head")
    model.add_adapter("second", peft.LoraConfig(r=4, target_modules=["k_proj"], task_type="CAUSAL_LM"))
    assert all("lora_" not in s.fqn for s in eligible(find_linears(capture(model))))
    model.set_adapter("second")
    names = [s.fqn for s in eligible(find_linears(capture(model)))]
    assert len(names) == 7 and not any("lora_" in n or "modules_to_save" in n for n in names)
    model = build("llama of one block")
    model.add_adapter(peft.LoraConfig(r=8, target_modules=["q_proj"]))
    assert not any("lora_" in s.fqn for s in eligible(find_linears(capture(model))))


def test_frozen_weights_beside_unfrozen_ones_stay_dense_also_under_adapters():
    model = wrapped("lora")
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    layer.weight.requires_grad_(True)  # not PEFT's doing: the user tells base weights apart
    assert [s.fqn.rpartition("model.model.")[2] for s in eligible(find_linears(capture(model)))] == [
        "layers.0.mlp.up_proj.base_layer.weight"
    ]


def test_no_adapters():
    assert not any(find_adapters(build("mlp"))) and not any(find_adapters(None))


def test_the_network_that_makes_prompts_is_an_adapter():
    model = wrapped("prompt")
    assert {id(p) for p in model.prompt_encoder.parameters()} <= find_adapters(model).own


def test_adapters_are_not_quantised():
    model = wrapped("lora")
    merged = model.base_model.model.model.layers[0].mlp.up_proj
    merged.merge()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    report = sf.quantize(model, "int8")
    assert len(report["sites"]) == 7 and not any("lora_" in site["name"] for site in report["sites"])
    reasons = {site["name"]: site["reason"] for site in report["skipped"]}
    assert {r for n, r in reasons.items() if "lora_" in n} == {"part of a PEFT adapter"}
    assert "is merged into it" in next(r for n, r in reasons.items() if n.endswith("up_proj.base_layer"))
    after = dict(model.named_parameters())
    assert before and all(torch.equal(after[n], value) for n, value in before.items())
    merged.unmerge()
    assert model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all()
