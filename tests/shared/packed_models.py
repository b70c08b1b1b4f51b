"""Tiny transformers models whose linears are exactly 2:4, and packed folders of them."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from tiny_checkpoint import byte_tokenizer, tiny_llama
from tiny_models import build
from torch import nn
from transformers.pytorch_utils import Conv1D

import sparseforge_fx as sf
from sparseforge_fx.pattern import TWO_FOUR, hard_mask

SITES = {"llama": 14, "gpt2": 4, "opt": 6}
IDS = torch.tensor([[5, 17, 33, 2, 90, 41, 8]])
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@torch.no_grad()
def sparse_model(name: str, dtype: torch.dtype = torch.float32):
    """``llama`` (tied embeddings), ``gpt2`` (Conv1D) or ``opt``; its head stays dense."""
    torch.manual_seed(0)
    model = tiny_llama(initializer_range=0.2) if name == "llama" else build(name)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and path != "lm_head":
            mask = hard_mask(module.weight.abs(), TWO_FOUR, 0 if isinstance(module, Conv1D) else 1)
            module.weight.copy_(torch.where(mask, module.weight, 0))
    return model.to(dtype).eval()


def pack_to(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **options) -> Path:
    sf.save_packed(sparse_model(name, dtype), byte_tokenizer(), folder, **options)
    return folder


@functools.cache
def remembered(name: str):
    """A model that no test changes, its logits and its greedy text."""
    model = sparse_model(name)
    with torch.no_grad():
        return model, model(IDS).logits, model.generate(IDS, **GREEDY)


def edit_json(path: Path, change) -> None:
    """``change`` works on what is in the file, in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
