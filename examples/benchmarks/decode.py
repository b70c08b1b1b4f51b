"""Tokens per second of greedy generation and of prefill, a 2:4 model dense beside packed; one json.

    python examples/benchmarks/decode.py MODEL [--batch 1 --batch 8] [--prefill 512] [--compile]

MODEL is a folder, a hub id, or one of the shapes of common.py with random weights. Weights are made 2:4 by magnitude (speed does not depend on
how). Contenders: ``dense`` (the masked dense model), ``modules`` (lower_modules), with --compile also those two under
torch.compile and ``backend`` (torch.compile, backend="sparseforge"), on a GPU with CUDA graphs. They work in turn,
eager ones and compiled ones; medians and quartiles. Prefill is a long prompt and one token after it, by linears that
the gate chose for decoding.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import language_model, save, use

import sparseforge_fx as sf
from sparseforge_fx.deploy.export.throughput import compare, random_prompts, with_transformers


def main(
    model: str,
    batch: Annotated[list[int], typer.Option(help="sequences that are generated together")] = [1, 8],  # noqa: B006
    prompt: int = 32,
    tokens: int = 32,
    prefill: Annotated[int, typer.Option(help="tokens of the long prompt; 0: none")] = 512,
    rounds: int = 5,
    dtype: str = "bfloat16",
    device: str = "cpu",
    threads: int = 0,
    compile: bool = False,
    label: str = "",
) -> None:
    use(device, threads)
    dense = language_model(model, getattr(torch, dtype), device).requires_grad_(False)
    sf.sparsify(dense)
    modules = copy.deepcopy(dense)
    report = sf.lower_modules(modules, tokens=batch)
    contenders = {"dense": dense, "modules": modules}
    if compile:
        for name, source, backend in (
            ("dense, compiled", dense, "inductor"),
            ("modules, compiled", modules, "inductor"),
            ("backend", dense, "sparseforge"),
        ):
            contenders[name] = copy.deepcopy(source)
            options = {"mode": "reduce-overhead" if device == "cuda" else "default"}
            how = {"options": {"tokens": batch, **options}} if backend == "sparseforge" else options
            contenders[name].forward = torch.compile(contenders[name].forward, backend=backend, **how)
    results = {str(rows): measure(contenders, rows, prompt, tokens, rounds) for rows in batch}
    prefilled = measure(contenders, 1, prefill, 1, rounds) if prefill else {}
    for found in prefilled.values():  # one token is made; the tokens that count are the prompt's
        found["tokens_per_second"] *= prefill
        found["quartiles"] = [prefill * q for q in found["quartiles"]]
    record = {
        "model": Path(model).name,
        "dtype": dtype,
        "prompt": prompt,
        "tokens": tokens,
        "rounds": rounds,
        "batches": results,
        "prefill": {"tokens": prefill, "contenders": prefilled} if prefill else None,
        "gate": report["table"],
        "sites": len(report["sites"]),
        "kept_dense": [s for s in report["skipped"] if s["reason"].startswith("gate")],
        "site_bytes": {"dense": report["dense_bytes"], "lowered": report["lowered_bytes"]},
    }
    save("decode", label or f"{Path(model).name}-{dtype}-{device}-{torch.get_num_threads()}threads", record)
    for rows, found in {**results, "prefill": prefilled}.items():
        print(rows, {name: (round(f["tokens_per_second"], 1), round(f["ratio"], 3)) for name, f in found.items()})


def measure(contenders: dict[str, Any], rows: int, prompt: int, tokens: int, rounds: int) -> dict[str, dict]:
    """Tokens per second of each beside ``dense``, compiled ones beside "dense, compiled"; how far the logits are off."""
    dense = contenders["dense"]
    ids = random_prompts(rows, prompt, dense.config.vocab_size, dense.device)
    eager = {n: with_transformers(m) for n, m in contenders.items() if n in ("dense", "modules")}
    found = compare(eager, ids, tokens, rounds)
    compiled = {n: with_transformers(m, static=True) for n, m in contenders.items() if n not in eager}
    if compiled:
        found |= compare(compiled, ids, tokens, rounds)
    with torch.no_grad():
        logits = {name: model(ids).logits.float() for name, model in contenders.items()}
    for name, row in found.items():
        row["logits_relative_error"] = float((logits[name] - logits["dense"]).norm() / logits["dense"].norm())
    return found


if __name__ == "__main__":
    typer.run(main)
