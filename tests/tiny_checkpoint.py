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
