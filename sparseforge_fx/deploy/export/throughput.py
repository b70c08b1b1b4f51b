"""Tokens per second of greedy generation, contenders in turn: what the command and the benchmark share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: (prompts [rows, length], new tokens) -> [rows, length + new tokens]
Generate = Callable[[Tensor, int], Tensor]


def with_transformers(model: Any, *, static: bool = False) -> Generate:
    """``model.generate``, greedy, exactly as many new tokens as asked for; ``static``: with a cache of fixed length."""
    cache = {"cache_implementation": "static", "disable_compile": True} if static else {}

    @torch.no_grad()
    def generate(ids: Tensor, tokens: int) -> Tensor:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            stop_strings=None,  # nor by time: they would end before that
            max_time=None,
            num_return_sequences=1,
            return_dict_in_generate=False,
            pad_token_id=0,
            **cache,
        )

    return generate


def random_prompts(rows: int, length: int, vocabulary: int, device: Any = "cpu") -> Tensor:
    """The same ids [rows, length] on every call; small ones, which are often special, left out."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(min(10, vocabulary - 1), vocabulary, (rows, length), generator=generator).to(device)


def compare(contenders: dict[str, Generate], ids: Tensor, tokens: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Tokens per second (median, quartiles) of each, their ratio to the first one's, and whether it writes the same.

    One generation of each is not timed; then they take turns ``rounds`` times.
    """
    texts = {name: generate(ids, tokens) for name, generate in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, generate in contenders.items():
            _wait(ids)
            clock = time.perf_counter()
            generate(ids, tokens)
            _wait(ids)
            times[name].append(time.perf_counter() - clock)
    first = next(iter(contenders))
    made = ids.shape[0] * tokens
    found = {}
    for name, seconds in times.items():
        low, middle, high = statistics.quantiles(seconds, n=4) if rounds > 1 else seconds * 3
        found[name] = {
            "tokens_per_second": made / middle,
            "quartiles": [made / high, made / low],
            "ratio": statistics.median(times[first]) / middle,
            "same_greedy_text": bool(torch.equal(texts[name], texts[first])),
        }
    return found


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
