"""What the scripts beside this file share: models and weights, timing in turn, and the json with what a number needs."""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from records import RESULTS
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedModel

from sparseforge_fx.evaluation.perplexity import perplexity
from sparseforge_fx.pattern import TWO_FOUR, hard_mask
from sparseforge_fx.report import environment, write_json

#: published models by their sides, with random weights, where speed is all that is asked and there is no network
SHAPES = {
    "opt-125m": OPTConfig(),
    "opt-1.3b": OPTConfig(hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32),
    "opt-6.7b": OPTConfig(hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32),
    "smollm2-135m": LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    ),
    "llama-7b": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
}  # fmt: skip
CONTEXT = 1024  # tokens of a window whose perplexity is quoted
Run = Callable[[], object]


def use(device: str = "cpu", threads: int = 0) -> None:
    """Leave with a sentence if there is no such device; 0 threads: as many as torch takes."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch.cuda finds no device: leave --device away to measure on the CPU")
    if threads:
        torch.set_num_threads(threads)


def language_model(name: str, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", **how: Any) -> PreTrainedModel:
    """From a folder or the hub; or one of SHAPES."""
    if name not in SHAPES:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **how).eval().to(device)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(copy.deepcopy(SHAPES[name]), dtype=dtype, **how).eval()


def model_and_ids(
    name: str, device: str, batch_size: int, length: int, **how: Any
) -> tuple[PreTrainedModel, torch.Tensor]:
    """A model to train all of but the embedding, and random ids [batch_size, length]."""
    model = language_model(name, device=device, **how)
    model.get_input_embeddings().weight.requires_grad_(False)
    return model, torch.randint(0, model.config.vocab_size, (batch_size, length), device=device)


def windowed_perplexity(model: PreTrainedModel, ids: torch.Tensor, windows: int) -> float:
    """Of the first ``windows`` windows of CONTEXT tokens."""
    return perplexity(model, ids, context=CONTEXT, max_windows=windows).perplexity


def token_ids(text: Path, tokenizer: Any) -> torch.Tensor:
    """[tokens] of a whole file."""
    return tokenizer(text.read_text(), return_tensors="pt", verbose=False).input_ids[0]


def random_two_four(out: int, width: int, device: torch.device | str = "cpu", scale: float = 1.0) -> torch.Tensor:
    """Float32 [out, width], the better two of every four kept."""
    weight = torch.randn(out, width, device=device) * scale
    return weight * hard_mask(weight.abs(), TWO_FOUR)


def in_turn(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each run says of itself, round by round: whatever else the machine does meets all of them."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
    return found


def seconds_in_turn(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, round by round, on a GPU until its work is done."""
    return in_turn({name: timed(run) for name, run in runs.items()}, rounds)


def timed(run: Run) -> Callable[[], float]:
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None

    def seconds() -> float:
        wait()
        clock = time.perf_counter()
        run()
        wait()
        return time.perf_counter() - clock

    return seconds


def medians_and_spread(times: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    return {
        "median_seconds": {name: statistics.median(values) for name, values in times.items()},
        "spread": {name: [min(values), max(values)] for name, values in times.items()},
    }


def save(folder: str, name: str, record: Mapping[str, Any], here: Mapping[str, Any] | None = None) -> None:
    """results/FOLDER/NAME.json: the record, and behind it commit, device and versions: ``here``, or as they are now."""
    write_json(RESULTS / folder / f"{name}.json", {**record, **(environment() if here is None else here)})
