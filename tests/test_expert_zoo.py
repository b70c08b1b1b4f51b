"""Every causal language model of transformers that has experts: they are sites, exactly 2:4 afterwards, and the saved
model is the model. Nothing in the project knows their names; what cannot go that way has its reason here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.methods.one_shot import magnitude
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.passes import find_linears, harden_masks, run_passes, train_passes
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.insert_soft_masks import mask_name
from sparseforge_fx.pattern import TWO_FOUR, check_pattern, density

#: every name that some configuration has for the size of a part; each model gets those that it knows
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 8, "sliding_window": 8, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "moe_top_k": 2, "top_k": 2,
    "num_experts_per_token": 2, "top_k_experts": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "moe_latent_size": None, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 0, "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "expert_ffn_hidden_size": 16, "ffn_hidden_size": 32,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
#: what else a model needs to be small, and to have experts at all
OWN: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": ["sparse"] * 2},
    "dbrx": {
        "d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 64, "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "doge": {"is_moe": True, "num_experts": 16},
    "flint": {"mlp_only_layers": []},
    "gemma4_text": {"enable_moe_block": True, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 64},
    "granitemoehybrid": {"layer_types": ["attention"] * 2, "mamba_n_heads": 2, "mamba_d_head": 16},
    "kimi_linear": LATENT,
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 0},
    "longcat_flash": {"num_layers": 1, "moe_topk": 2, "zero_expert_num": 2},
    "qwen3_5_moe_text": LINEAR_ATTENTION,
    "qwen3_next": LINEAR_ATTENTION,
    "qwen4_exp_text": LINEAR_ATTENTION,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
#: models whose experts are no sites -> why
REASONS = {
    "dbrx": r"torch.export cannot take Dbrx.* at .*for expert_idx in expert_hit.*data-dependent",
    "longcat_flash": r"torch.export cannot take LongcatFlash.* at .*for expert_idx_tensor in expert_hit.*data-dependent",
    "doge": r"read by aten.embedding.default",  # each expert is two rows of two tables
}
#: words of a source that has experts
EXPERTS = re.compile(r"^class \w*(Experts?\w*|CDMoE)\(", re.M)


def kinds() -> list[str]:
    """Model types of causal language models whose source defines experts."""
    folder, found = Path(transformers.__file__).parent / "models", []
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        cls = name if isinstance(name, str) else name[0]
        sources = {folder / k / f"modeling_{k}.py" for k in (kind, kind.removesuffix("_text"))}
        text = next((p.read_text() for p in sources if p.is_file() and f"class {cls}(" in p.read_text()), "")
        if EXPERTS.search(text) and f"{kind}_text" not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            found.append(kind)
    return found


def build(kind: str) -> nn.Module:
    config = AutoConfig.for_model(kind)
    default = config.to_dict() | config.attribute_map
    sizes = SIZES | (LATENT if "kv_lora_rank" in default else {})
    settings = {k: v for k, v in sizes.items() if k in default} | OWN.get(kind, {})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    assert sum(p.numel() for p in model.parameters()) < 4e6
    return model


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("kind", kinds())
def test_experts(kind, tmp_path):
    model = build(kind)
    if kind in REASONS and kind != "doge":
        with pytest.raises(SparseForgeError, match=REASONS[kind]):
            capture(model, dynamic=False)
        return
    program = capture(model, dynamic=False)
    sites = find_linears(program)
    stacks = [s for s in eligible(sites) if s.experts is not None]
    if kind == "doge":
        assert all(re.search(REASONS[kind], s.reason) for s in sites if "embed" in s.fqn)
        return
    mine = {n for n, p in model.named_parameters() if p.dim() == 3 and "conv" not in n and p.shape[0] * p.shape[1] > 4}
    assert mine and {s.fqn for s in stacks} == mine
    for site in eligible(sites):
        assert not re.search(r"(mlp|moe|mixer|ffn|feed_forward|experts)\.(router|gate|shared_expert_gate)\.", site.fqn)

    masked, _ = run_passes(program, train_passes(sites))
    masks = {s.fqn: masked.tensor(mask_name(s.fqn)) for s in eligible(sites)}
    magnitude(
        [MaskedWeight(s.fqn, masked.tensor(s.fqn), masks[s.fqn], s.reduction_dim) for s in eligible(sites)], TWO_FOUR
    )
    addresses = {n: p.data_ptr() for n, p in model.named_parameters()}
    run_passes(masked, [harden_masks])
    assert addresses == {n: p.data_ptr() for n, p in model.named_parameters()}
    for site in eligible(sites):
        weight = model.get_parameter(site.fqn)
        assert check_pattern(weight, TWO_FOUR, site.reduction_dim) and density(weight) == 0.5

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = logits(model, ids)
        assert torch.equal(logits(again, ids), expected)
        report = sf.save_packed(model, None, tmp_path / "packed")
        assert {s["name"] for s in report["sites"] if "experts" in s} >= {s.fqn for s in stacks}
        packed, _ = sf.load(tmp_path / "packed")
        torch.testing.assert_close(logits(packed, ids), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_nine_of_ten():
    found = kinds()
    assert set(REASONS) <= set(found) and len(found) > 50 and len(REASONS) <= 0.1 * len(found)
