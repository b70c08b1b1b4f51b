"""SparseGPT on a checkpoint that stays on disk: seconds and memory of a block of a 7B model with random weights; one json.

    python examples/benchmarks/larger_than_memory.py FOLDER [--model llama-7b] [--blocks 1] [--sequences 2] [--length 512]

FOLDER holds the model and the output while it runs (twice the model's bytes) and is emptied at the end. All blocks have the
same random weights: speed does not depend on them. What the whole model and OPT-175B with the authors' 128 x 2048 tokens
would take is the measured block's operations a second, applied to theirs: of every linear [out, in], with t tokens,
2 t in (in + out) for the moments and the product, 4/3 in^3 to factor, out in^2 to update.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from accelerate import init_empty_weights
from common import SHAPES, save, use
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, PretrainedConfig, PreTrainedTokenizerFast

import sparseforge_fx as sf
from sparseforge_fx.report import write_json

SHARD = 1 << 30
AUTHORS = {"model": "opt-175b", "tokens": 128 * 2048, "hours": 4.0, "on": "one A100 80 GB", "source": "arXiv 2301.00774"}
OPT_175B = OPTConfig(hidden_size=12288, ffn_dim=49152, num_hidden_layers=96, num_attention_heads=96)


def main(
    folder: Path, model: str = "llama-7b", blocks: int = 1, sequences: int = 2, length: int = 512, threads: int = 0,
    label: str = "",
) -> None:  # fmt: skip
    use(threads=threads)
    source, output = folder / "model", folder / "sparse"
    config = SHAPES[model]
    size = write_model(config, source)
    ids = torch.randint(0, config.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(0))
    began = time.monotonic()
    report = sf.sparsify_on_disk(
        source, ids, output=output, method="sparsegpt", calibration=sequences, length=length, batch_size=1, blocks=blocks
    )
    seconds = report["block_seconds"]
    per_block = sum(seconds) / len(seconds)
    tokens, layers = sequences * length, config.num_hidden_layers
    rate = operations(config, tokens) / layers / per_block
    save("larger_than_memory", label or f"{model}-{blocks}", {
        "model": model, "bytes": size, "tokens": tokens, "blocks": len(seconds), "of_blocks": report["blocks"],
        "block_seconds": seconds, "seconds": time.monotonic() - began, "compute_dtype": report["compute_dtype"],
        "peak_memory_bytes": report["peak_memory_bytes"], "operations_per_second": rate,
        "predicted_hours": {
            model: per_block * layers / 3600,
            f"{model} on {AUTHORS['tokens']} tokens": operations(config, AUTHORS["tokens"]) / rate / 3600,
            "opt-175b": operations(OPT_175B, AUTHORS["tokens"]) / rate / 3600,
        },
        "authors": AUTHORS,
    })  # fmt: skip
    shutil.rmtree(source)
    for left in folder.glob("sparse*"):
        shutil.rmtree(left)


def operations(config: PretrainedConfig, tokens: int) -> float:
    """Of SparseGPT on all linears but the head, as the text above counts them."""
    total = 0.0
    for _, linear in linears(config):
        out, width = linear.out_features, linear.in_features
        total += 2 * tokens * width * (width + out) + 4 / 3 * width**3 + out * width**2
    return total


def linears(config: PretrainedConfig) -> Iterator[tuple[str, nn.Linear]]:
    model = skeleton(config)
    head = model.get_output_embeddings()
    yield from ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head)


def skeleton(config: PretrainedConfig) -> Any:
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def write_model(config: PretrainedConfig, folder: Path) -> int:
    """Random bfloat16 weights in shards, one at a time in memory. Returns their bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    drawn: dict[tuple, torch.Tensor] = {}
    shards: list[dict[str, torch.Tensor]] = [{}]
    index: dict[str, str] = {}
    model = skeleton(config)
    parameters = dict(model.named_parameters())
    name_of = "model-{:05d}.safetensors".format
    total = held = 0
    for name, parameter in parameters.items():
        key = tuple(parameter.shape)
        if key not in drawn:
            drawn[key] = torch.randn(key, generator=generator).mul_(0.02).to(torch.bfloat16)
        value = torch.ones(key, dtype=torch.bfloat16) if len(key) == 1 else drawn[key].clone()
        if held + value.nbytes > SHARD:
            save_file(shards[-1], folder / name_of(len(shards)), metadata={"format": "pt"})
            shards[-1] = {}
            shards.append({})
            held = 0
        shards[-1][name] = value
        index[name] = name_of(len(shards))
        held, total = held + value.nbytes, total + value.nbytes
    save_file(shards[-1], folder / name_of(len(shards)), metadata={"format": "pt"})
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})
    model.config.save_pretrained(folder)
    unread = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))  # the data are ids
    PreTrainedTokenizerFast(tokenizer_object=unread).save_pretrained(folder)
    return total


if __name__ == "__main__":
    typer.run(main)
