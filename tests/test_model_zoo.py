"""Every architecture goes the same way: capture, find, mask, harden; nothing in the project knows its name.

One list. A model that cannot go that way stays in it, with the sentence that its user gets.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from rounding import rounding
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from sparseforge_fx.deploy.lowering.gate import Gate
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import capture, make_example_inputs
from sparseforge_fx.kernels.layouts import ROWS
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.passes import (
    deploy_passes,
    find_linears,
    harden_masks,
    run_passes,
    train_passes,
)
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.insert_soft_masks import mask_name
from sparseforge_fx.passes.lower_sparse_linears import keep_dense
from sparseforge_fx.passes.operators import LINEAR_OPS
from sparseforge_fx.pattern import TWO_FOUR, hard_mask, to_groups

SIZE = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS = SIZE | {"head_dim": 8}
GPT = SIZE | {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "rotary_dim": 4}
MOE = HEADS | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = MOE | {
    "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "head_dim": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
}  # fmt: skip
SEQ2SEQ = SIZE | {
    "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "encoder_layers": 1,
    "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "decoder_start_token_id": 1,
}  # fmt: skip
VISION = SIZE | {"image_size": 16, "patch_size": 8, "num_labels": 3}


class Entry(NamedTuple):
    name: str
    build: Callable[[], nn.Module]
    inputs: dict[str, Tensor] | None = None  # where none can be made from the config
    note: str = ""  # what the notes of the capture say
    dense: str = ""  # why no linear of the model can be pruned
    error: str = ""  # why it cannot be captured


def hf(auto: str, kind: str, settings: dict[str, Any], name: str = "", **entry: Any) -> Entry:
    def build() -> nn.Module:
        return getattr(transformers, auto).from_config(AutoConfig.for_model(kind, **settings))

    return Entry(name or kind, build, **entry)


LM, BASE, SEQ = "AutoModelForCausalLM", "AutoModel", "AutoModelForSeq2SeqLM"
UNROLLED = "the sequence dimension of input_ids is fixed at 12 by the model"
MODELS = [
    # decoders
    hf(LM, "opt", SIZE | {"word_embed_proj_dim": 16, "ffn_dim": 32}),
    hf(LM, "gpt2", GPT),
    hf(LM, "llama", HEADS | {"num_hidden_layers": 2}),
    hf(LM, "qwen3", HEADS),
    hf(LM, "gemma3_text", HEADS | {"query_pre_attn_scalar": 8, "sliding_window": 8}),
    hf(LM, "mistral", HEADS | {"sliding_window": 8}),
    hf(LM, "gpt_neox", SIZE),
    hf(LM, "phi", SIZE),
    hf(LM, "phi3", SIZE),
    hf(LM, "falcon", SIZE),
    hf(LM, "bloom", GPT),
    hf(LM, "gptj", GPT),
    hf(LM, "gpt_bigcode", GPT),
    hf(LM, "mpt", SIZE | {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 64}),
    hf(LM, "cohere", SIZE),
    hf(LM, "granite", SIZE),
    hf(LM, "olmo2", SIZE),
    # mixtures of experts
    hf(LM, "qwen3_moe", MOE),
    hf(LM, "mixtral", MOE),
    hf(LM, "deepseek_v3", LATENT),
    hf(LM, "gpt_oss", MOE | {"sliding_window": 8}),
    # state spaces and recurrences
    hf(LM, "mamba", SIZE | {"state_size": 4, "time_step_rank": 4}, note=UNROLLED),
    hf(
        LM, "recurrent_gemma", HEADS | {"lru_width": 16, "block_types": ["recurrent"], "use_cache": False},
        note=UNROLLED,
    ),
    # encoders
    hf(BASE, "bert", SIZE),
    hf("AutoModelForSequenceClassification", "roberta", SIZE),
    hf(BASE, "distilbert", SIZE | {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}),
    hf(BASE, "deberta-v2", SIZE),
    hf(BASE, "modernbert", SIZE),
    hf("AutoModelForImageClassification", "vit", VISION),
    hf(BASE, "clip_vision_model", VISION),
    hf(BASE, "dinov2", VISION),
    Entry(
        "torch.nn.TransformerEncoder",
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1),
        inputs={"src": torch.randn(2, 12, 16)},
    ),
    # encoder and decoder
    hf(SEQ, "t5", SEQ2SEQ),
    hf(SEQ, "bart", SEQ2SEQ),
    hf(
        "AutoModelForSpeechSeq2Seq", "whisper",
        SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
        inputs={"input_features": torch.randn(2, 8, 16), "decoder_input_ids": torch.randint(0, 64, (2, 5))},
    ),
    # nothing to prune
    hf(
        "AutoModelForImageClassification", "resnet",
        VISION | {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]}, dense="output layer|read by aten.conv2d",
    ),
    hf(LM, "reformer", SIZE | {"axial_pos_embds": False, "is_decoder": True}, dense="read by wrap_with_set_grad_enabled"),
    # cannot be captured
    hf(
        BASE, "longformer", SIZE | {"attention_window": 4},
        error=r"torch.export cannot take LongformerModel at .*modeling_longformer.py:\d+ .*data-dependent",
    ),
    hf(
        SEQ, "switch_transformers", SEQ2SEQ | {"num_experts": 2},
        error=r"torch.export cannot take Switch.* at .*modeling_switch_transformers.py:\d+ .*'NoneType' object",
    ),
    hf(
        BASE, "clip", {"text_config": SIZE, "vision_config": VISION},
        error=r"CLIPModel itself fails on the example inputs at .*modeling_clip.py:\d+ .*pass inputs that it takes",
    ),
    hf(
        BASE, "wav2vec2", SIZE | {"conv_dim": [8], "conv_stride": [2], "conv_kernel": [3], "num_feat_extract_layers": 1},
        error=r"no rule makes inputs for Wav2Vec2Model \(main input 'input_values'\): pass example_inputs",
    ),
]  # fmt: skip


def first_output(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def step(module: nn.Module, batch: dict[str, Tensor], parameters: list[nn.Parameter]) -> list[Tensor | None]:
    """The output and the gradient of every parameter."""
    output = first_output(module(**batch))
    return [output, *(torch.autograd.grad(output.square().mean(), parameters, allow_unused=True) if parameters else ())]


def check(got: list[Tensor | None], expected: list[Tensor | None], depth: int) -> None:
    """The same outputs, and gradients, but for the rounding of ``depth`` products."""
    for a, b in zip(got, expected, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=rounding(b.dtype, depth) * max(1e-3, b.abs().max().item()))


@pytest.mark.parametrize("entry", MODELS, ids=lambda entry: entry.name)
def test_model(entry: Entry):
    model = entry.build().eval()
    if entry.error:
        with pytest.raises(SparseForgeError, match=entry.error):
            capture(model, entry.inputs)
        return
    program = capture(model, entry.inputs)
    notes = [note for note in program.notes if " is not in the graph: gradients there" not in note]
    assert notes == ([entry.note] if entry.note else [])
    batch = entry.inputs or make_example_inputs(model, batch=3, length=12 if entry.note else 9)

    sites = find_linears(program)
    listed = {id(program.tensor(s.fqn)) for s in sites}
    assert all(id(m.weight) in listed for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    masked, records = run_passes(program, train_passes(sites))
    if entry.dense:
        assert all(re.search(entry.dense, s.reason) for s in sites if s.uses)
        assert records[0].modified == 0 and masked.op_counts() == program.op_counts()
        assert torch.equal(first_output(masked.module()(**batch)), first_output(model(**batch)))
        return

    # the captured program, and a mask of ones: the model, in value and gradient
    assert records[0].modified == sum(len(s.uses) for s in eligible(sites)) > 0
    depth = 2 * sum(len(site.uses) for site in sites)  # as many products of activations, at most, as of weights
    parameters = [p for p in model.parameters() if p.requires_grad]
    captured, expected = step(program.module(), batch, parameters), step(model, batch, parameters)
    check(captured[:1], expected[:1], depth)
    check(captured, expected, 3 * depth)  # forward, and two products for each on the way back
    check(step(masked.module(), batch, parameters), captured, 3 * depth)

    # a hard mask: what the hardened graph and the source model itself compute
    for site in eligible(sites):
        mask = masked.tensor(mask_name(site.fqn))
        mask.copy_(hard_mask(torch.rand_like(mask), TWO_FOUR, site.reduction_dim))
    expected = step(masked.module(), batch, [])
    hardened, _ = run_passes(masked, [harden_masks])
    for site in eligible(sites):
        groups = to_groups(program.tensor(site.fqn), TWO_FOUR, site.reduction_dim)
        assert ((groups != 0).sum(-1) <= 2).all() and (groups != 0).any()
    check(step(hardened.module(), batch, []), expected, depth)
    check(step(model, batch, []), expected, depth)
    counts = [p.op_counts() for p in (hardened, program)]
    assert len({sum(count[str(op)] for op in LINEAR_OPS) for count in counts}) == 1, (
        "plain linears are back, all of them"
    )

    # lowered: the same over packed weights
    chosen = Gate([ROWS], [1], None)
    lowered, _ = run_passes(program, deploy_passes(lambda p: keep_dense(p, find_linears(p)), chosen))
    assert lowered.op_counts()[str(OP)] == sum(len(s.uses) for s in eligible(chosen.sites)) > 0
    check(step(lowered.module(), batch, []), expected, depth)
