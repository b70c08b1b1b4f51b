"""Prompts as a model that goes on with them takes them: token ids, padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparseforge_fx.errors import SparseForgeError


def prompt_batch(tokenizer: Any, prompts: Sequence[str]) -> Any:
    """``input_ids`` and ``attention_mask`` [prompts, positions], and what else the tokenizer gives.

    Raises SparseForgeError for a prompt without a token, whose row would be padding alone, and for several of unlike
    lengths where the tokenizer has no token to pad with.
    """
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    counts = [len(ids) for ids in tokenizer(list(prompts))["input_ids"]] if prompts else []
    if not counts or 0 in counts:
        raise SparseForgeError("a prompt has no tokens: give each a word")
    if tokenizer.pad_token is None and len(set(counts)) > 1:
        raise SparseForgeError("the tokenizer has no padding token: give prompts one at a time, or set its pad_token")
    plain: dict[str, Any] = {"return_tensors": "pt", "return_token_type_ids": False}  # which generate() does not take
    return tokenizer(list(prompts), padding=len(set(counts)) > 1, **plain)
