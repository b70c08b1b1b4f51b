"""A model with PEFT adapters is saved whole: sparse base weights under their own names, adapters beside. Needs PEFT."""

import pytest
import torch
from tiny_checkpoint import tiny_llama

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.models.beside_adapters import has_adapters
from sparseforge_fx.models.dense import load_skeleton
from sparseforge_fx.pattern import TWO_FOUR, check_pattern

peft = pytest.importorskip("peft")

IDS = torch.randint(3, 200, (8, 16), generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "lora": peft.LoraConfig(r=4, target_modules="all-linear"),
    "a trained head": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "trained tokens": peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 6]),
    "ia3": peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=4),
}


def sparse(model):
    return sf.sparsify(model, IDS, method="wanda", length=16, calibration=4, show_progress=False)


def filled(model):
    """With adapters that change what the model says."""
    for name, p in model.named_parameters():
        if "lora_" in name or "ia3" in name or "token_adapter" in name or "prompt" in name:
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS[:2]).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_peft_model(tmp_path, kind, tied):
    CONFIGS[kind].task_type = "CAUSAL_LM"
    model = filled(peft.get_peft_model(tiny_llama(num_hidden_layers=1, tie_word_embeddings=tied), CONFIGS[kind]))
    result = sparse(model)
    assert any("into a folder adapter" in note for note in result.report["notes"])
    result.save(tmp_path / "out")
    base, _ = sf.load(tmp_path / "out")
    assert not has_adapters(base)
    for site in result.report["sites"]:
        name = site["name"].removeprefix("base_model." if kind == "prompt" else "base_model.model.")
        name = name.replace("base_layer.", "").replace("original_module.", "")
        weight = base.get_parameter(name)
        assert check_pattern(weight, TWO_FOUR) and torch.equal(weight, model.get_parameter(site["name"]))
    again = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize("names", [["default"], ["default", "second"], ["mine"]])
def test_adapters_that_transformers_adds(tmp_path, names):
    model = tiny_llama(num_hidden_layers=1)
    for name in names:
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]), adapter_name=name)
    model.set_adapter(names[-1])
    result, learns = sparse(filled(model)), {n: p.requires_grad for n, p in model.named_parameters()}
    result.save(tmp_path / "out")
    assert model.active_adapters() == names[-1:] and model._hf_peft_config_loaded
    assert learns == {n: p.requires_grad for n, p in model.named_parameters()}
    base, _ = sf.load(tmp_path / "out")
    assert check_pattern(base.model.layers[0].self_attn.q_proj.weight, TWO_FOUR)
    for name in names:
        model.set_adapter(name)
        again, _ = sf.load(tmp_path / "out")
        again.load_adapter(tmp_path / "out" / "adapter" / ("" if name == "default" else name))
        torch.testing.assert_close(logits(again.eval()), logits(model))


def test_packed_checkpoints_have_no_place_for_them(tmp_path):
    model = peft.get_peft_model(tiny_llama(num_hidden_layers=1), CONFIGS["lora"])
    sparse(model)
    with pytest.raises(SparseForgeError, match="carries PEFT adapters"):
        sf.save_packed(model, None, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    sf.save_packed(model.unload(), None, tmp_path / "p")


def test_a_folder_with_an_adapter_is_refused(tmp_path):
    model = peft.get_peft_model(tiny_llama(num_hidden_layers=1), CONFIGS["lora"])
    model.save_pretrained(tmp_path)
    for both in (False, True):
        if both:
            model.unload().save_pretrained(tmp_path)
        for load in (sf.load, load_skeleton, sf.StreamedModel):
            with pytest.raises(SparseForgeError, match=r"holds a PEFT adapter.*merge_and_unload"):
                load(tmp_path)


def test_other_models_have_none(tmp_path):
    assert not has_adapters(tiny_llama(num_hidden_layers=1)) and not has_adapters(None)
