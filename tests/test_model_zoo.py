"""Every architecture goes the same way: capture, find, mask, harden; nothing in the project knows its name.

One list. A model that cannot go that way stays in it with the sentence that its user gets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoConfig

SIZE = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GPT = SIZE | {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "rotary_dim": 4}
SEQ2SEQ = SIZE | {
    "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "encoder_layers": 1,
    "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "decoder_start_token_id": 1,
}  # fmt: skip
MOE = SIZE | {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
VISION = SIZE | {"image_size": 16, "patch_size": 8, "num_labels": 3}


class Entry(NamedTuple):
    name: str
    build: Callable[[], nn.Module]
    inputs: dict[str, Any] | None = None
    error: str | None = None  # what capture says, if it cannot
    fixed: str | None = None  # what the notes say, if a dimension had to be fixed


def hf(auto: str, kind: str, settings: dict[str, Any], name: str | None = None, **entry: Any) -> Entry:
    def build() -> nn.Module:
        return getattr(transformers, auto).from_config(AutoConfig.for_model(kind, **settings))

    return Entry(name or kind, build, **entry)


LM, ENCODER, S2S = "AutoModelForCausalLM", "AutoModel", "AutoModelForSeq2SeqLM"
MODELS = [
    hf(LM, "opt", SIZE | {"word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}),
    hf(LM, "gpt2", GPT | {"n_layer": 2}),
    hf(LM, "llama", SIZE | {"num_hidden_layers": 2}),
    hf(LM, "qwen2", SIZE),
    hf(LM, "qwen3", SIZE),
    hf(LM, "gemma3_text", SIZE | {"query_pre_attn_scalar": 8, "sliding_window": 8}),
    hf(LM, "gemma2", SIZE | {"query_pre_attn_scalar": 8, "sliding_window": 8}),
    hf(LM, "mistral", SIZE | {"sliding_window": 8}),
    hf(LM, "gpt_neox", SIZE),
    hf(LM, "phi", SIZE),
    hf(LM, "phi3", SIZE),
    hf(LM, "falcon", SIZE),
    hf(LM, "bloom", GPT),
    hf(LM, "gptj", GPT),
    hf(LM, "gpt_bigcode", GPT),
    hf(LM, "gpt_neo", SIZE | {"num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}),
    hf(LM, "stablelm", SIZE),
    hf(LM, "cohere", SIZE),
    hf(LM, "olmo2", SIZE),
    hf(LM, "granite", SIZE),
    hf(LM, "starcoder2", SIZE),
    hf(LM, "smollm3", SIZE),
    hf(LM, "mpt", SIZE | {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 64}),
    hf(LM, "qwen3_moe", MOE),
    hf(LM, "qwen2_moe", MOE),
    hf(LM, "mixtral", MOE),
    hf(LM, "deepseek_v3", MOE | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 0, "num_key_value_heads": 2}),
    hf(LM, "gpt_oss", MOE | {"sliding_window": 8}),
    hf(LM, "mamba", SIZE | {"state_size": 4, "time_step_rank": 4}),
    hf(LM, "mamba2", SIZE | {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}),
    hf(LM, "recurrent_gemma", SIZE | {"lru_width": 16, "attention_window_size": 8, "num_hidden_layers": 3}),
    hf(LM, "rwkv", SIZE | {"attention_hidden_size": 16}),
    hf(LM, "lfm2", SIZE | {"layer_types": ["conv"], "block_multiple_of":4}),
    hf(ENCODER, "bert", SIZE),
    hf("AutoModelForSequenceClassification", "roberta", SIZE, ),
    hf(ENCODER, "distilbert", SIZE | {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}),
    hf(ENCODER, "deberta-v2", SIZE),
    hf(ENCODER, "modernbert", SIZE),
    hf(ENCODER, "albert", SIZE | {"embedding_size": 8, "num_hidden_layers": 2}),
    hf("AutoModelForImageClassification", "vit", VISION),
    hf(ENCODER, "clip_vision_model", VISION),
    hf(ENCODER, "dinov2", VISION),
    hf(ENCODER, "swin", VISION | {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4}),
    hf("AutoModelForImageClassification", "resnet", VISION | {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}),
    hf(S2S, "t5", SEQ2SEQ),
    hf(S2S, "bart", SEQ2SEQ),
    hf("AutoModelForSpeechSeq2Seq", "whisper", SEQ2SEQ | {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}, inputs={"input_features": torch.randn(2, 8, 16), "decoder_input_ids": torch.ones(2,5,dtype=torch.long)}),
]
