"""Text that a language model draws from itself, for runs without data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.modes import eval_mode


@torch.no_grad()
def draw_text(
    model: nn.Module, tokens: int, *, length: int, seed: int = 0, batch: int = 16, keep_start: bool = False
) -> Tensor:
    """Token ids [n, length] sampled from a language model at temperature 1, from its own start token (data-free
    distillation), which stays as the first of them if ``keep_start``."""
    config = getattr(model, "generation_config", None)
    if config is None or not hasattr(model, "generate"):
        raise SparseForgeError(f"{type(model).__name__} cannot generate text: pass data")
    start = config.bos_token_id if config.bos_token_id is not None else config.eos_token_id
    if isinstance(start, list):
        start = start[0]
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    rows = []
    with eval_mode(model), _plain_generation(model):  # dropout would be in the text
        for _ in range(-(-tokens // (batch * length))):
            first = torch.full((batch, 1), start or 0, device=device)
            text = model.generate(  # type: ignore[operator]
                first,
                attention_mask=torch.ones_like(first),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                min_new_tokens=length,
                max_new_tokens=length,
                pad_token_id=start or 0,
            )
            rows.append(text[:, :length] if keep_start else text[:, 1:])
    return torch.cat(rows)


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """Without what the model's own generation_config asks of text for readers: penalties, stop strings, several at
    once. Its end tokens stay, which ``min_new_tokens`` leaves out."""
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)
    try:
        yield
    finally:
        model.generation_config = own
