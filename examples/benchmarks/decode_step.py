"""One decoding step of a whole language model, dense beside 2:4 in 16 and 8 bits; one json.

    python examples/benchmarks/decode_step.py llama-7b [--batch 1 --batch 16] [--context 128] [--device cuda]

MODEL is a folder, a hub id, or one of the shapes of common.py with random weights: speed does not depend on them. The step
has everything that generating a token has but the choice of it: embedding, attention over a cache of fixed length,
norms, linears, head. On a GPU it is captured in a CUDA graph, as servers run it, so that Python's time is not in it.
Contenders: ``dense``; ``2:4``, what lower_modules makes at these numbers of tokens; ``2:4 int8``, what quantize makes
of the same weights. They work in turn; medians and quartiles.
"""

from __future__ import annotations

import copy
import statistics
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import in_turn, language_model, save, timed, use
from transformers import PreTrainedModel, StaticCache

import sparseforge_fx as sf
from sparseforge_fx.kernels.gpu.timing import Replays
from sparseforge_fx.kernels.packed import why_dense
from sparseforge_fx.pattern import TWO_FOUR, hard_mask

SPARE = 64  # places of the cache: every call fills one


def main(
    model: str,
    batch: Annotated[list[int], typer.Option(help="sequences that are decoded together")] = [1, 16],  # noqa: B006
    context: Annotated[int, typer.Option(help="tokens that are in the cache")] = 128,
    rounds: int = 7,
    device: str = "cpu",
    threads: int = 0,
    label: str = "",
) -> None:
    use(device, threads)
    if not 2 <= rounds <= SPARE - 8:
        raise typer.BadParameter(f"rounds: choose from 2 to {SPARE - 8}, not {rounds}")
    dense = language_model(model, torch.bfloat16, device).requires_grad_(False)
    contenders, notes = make(dense, batch)
    results = {str(rows): measure(contenders, rows, context, rounds) for rows in batch}
    record = {
        "model": Path(model).name,
        "dtype": "bfloat16",
        "context": context,
        "rounds": rounds,
        "graph": device == "cuda",
        "batches": results,
        "bytes": {name: sum(t.nbytes for t in tensors(net)) for name, net in contenders.items()},
        "notes": notes,
    }
    save("decode_step", label or f"{Path(model).name}-{device}-{torch.get_num_threads()}threads", record)
    for rows, found in results.items():
        print(rows, {name: f"{f['milliseconds']:.3f} ms, {f['ratio']:.2f}x" for name, f in found.items()})


def make(dense: PreTrainedModel, batch: list[int]) -> tuple[dict[str, PreTrainedModel], list[str]]:
    """The contenders, the dense one with weights that are 2:4 too; and what the gate kept dense."""
    head = dense.get_output_embeddings()
    for module in dense.modules():
        if isinstance(module, torch.nn.Linear) and module is not head and module.in_features % 4 == 0:
            module.weight.mul_(hard_mask(module.weight.abs().float(), TWO_FOUR))
            assert why_dense(module.weight) is None
    packed, codes = copy.deepcopy(dense), copy.deepcopy(dense)
    report = sf.lower_modules(packed, tokens=batch)
    sf.quantize(codes, "int8", dense=False)
    kept = [f"{s['name']}: {s['reason']}" for s in report["skipped"] if s["reason"].startswith("gate")]
    return {"dense": dense, "2:4": packed, "2:4 int8": codes}, kept


def measure(contenders: dict[str, PreTrainedModel], rows: int, context: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of a step, and how far the logits are from the dense model's."""
    runs, logits = {}, {}
    for name, model in contenders.items():
        step = Step(model, rows, context)
        logits[name] = step().float()
        runs[name] = Replays([step]).seconds if model.device.type == "cuda" else timed(step)
    times = in_turn(runs, rounds)
    base = statistics.median(times["dense"])
    found = {}
    for name, seconds in times.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        found[name] = {
            "milliseconds": 1e3 * middle,
            "quartiles": [1e3 * low, 1e3 * high],
            "tokens_per_second": rows / middle,
            "ratio": base / middle,
            "logits_relative_error": float((logits[name] - logits["dense"]).norm() / logits["dense"].norm()),
        }
    return found


class Step:
    """Calls give the logits [rows, vocabulary] of one more token after ``context`` random ones."""

    def __init__(self, model: PreTrainedModel, rows: int, context: int):
        self.cache = StaticCache(config=model.config, max_cache_len=context + SPARE)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(10, model.config.vocab_size, (rows, context + 1), generator=generator).to(model.device)
        where = torch.arange(context + 1, device=model.device)
        run = partial(model, past_key_values=self.cache, use_cache=True)
        with torch.no_grad():
            run(ids[:, :-1], position_ids=where[None, :-1].expand(rows, -1))
        self.run = partial(run, ids[:, -1:].contiguous(), position_ids=where[None, -1:].expand(rows, -1).contiguous())

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        return self.run().logits[:, -1]


def tensors(model: PreTrainedModel) -> list[torch.Tensor]:
    found = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return list(found.values())


if __name__ == "__main__":
    typer.run(main)
