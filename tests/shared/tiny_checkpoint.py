"""A tiny random Llama with a byte tokenizer, as a Hugging Face folder: what the command line and the examples load."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. It has seen many foxes.\n\n"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and ``<eos>`` as id 256."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary | {"<eos>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def tiny_llama(**changes) -> LlamaForCausalLM:
    """Two layers, 32 wide, tied embeddings; about 30,000 weights."""
    torch.manual_seed(0)
    options = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "eos_token_id": 256,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "bos_token_id": None}
    return LlamaForCausalLM(
        LlamaConfig(**options | heads | {"tie_word_embeddings": True, "pad_token_id": 256} | changes)
    )


def write_checkpoint(folder: Path, **changes) -> Path:
    """The model and its tokenizer in ``folder``."""
    tiny_llama(**changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_text(path: Path, repeats: int = 60) -> Path:
    """A text file of about 100 tokens per repeat."""
    path.write_text(TEXT * repeats)
    return path


def write_gguf(path: Path, model: LlamaForCausalLM) -> Path:
    """A small GGUF file of a tiny Llama, float32, with the byte vocabulary as GPT-2's."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    vocabulary = sorted(byte_tokenizer().get_vocab(), key=byte_tokenizer().get_vocab().get)
    vocabulary += ["zq"]  # transformers wants a merge
    vocabulary += [f"<unused{i}>" for i in range(config.vocab_size - len(vocabulary))]
    writer.add_token_list(vocabulary)
    writer.add_token_merges(["z q"])
    writer.add_eos_token_id(256)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    for i, layer in enumerate(model.model.layers):
        for name, short in names.items():
            weight = layer.get_submodule(name).weight.detach()
            count = heads.get(name.rpartition(".")[2])
            if count:  # llama.cpp keeps rotary halves interleaved
                weight = weight.reshape(count, 2, -1, config.hidden_size).transpose(1, 2).reshape(weight.shape)
            writer.add_tensor(f"blk.{i}.{short}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
