"""A small mixture of experts, trained for some minutes on real text, pruned by one method after the other; one json each.

    python examples/benchmarks/mixture.py SMALL FOLDER [--tokens 1000000]

SMALL is a folder of small_model.py with its texts. The mixture begins as that model with every MLP eight times (sparse
upcycling, arXiv 2212.05055) and a new router; of each copy a share of the hidden units is drawn anew, so that the experts have
something of their own to begin with (arXiv 2502.19261), and all of it is trained on text that the small model has not seen.
What follows in the same stream prunes. FOLDER gets the mixture; what is there is not made again.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import language_model, token_ids, use
from records import RESULTS
from small_model import SEPARATOR, Training
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import sparseforge_fx as sf
from sparseforge_fx.data.tokens import tokenize
from sparseforge_fx.evaluation.perplexity import perplexity
from sparseforge_fx.report import environment, write_json

EXPERTS, CHOSEN = 8, 2
DRAWN = 0.25  # share of an expert's hidden units that its copy does not keep
#: in the order in which perplexity is expected to fall
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt"},
    "alps": {"method": "alps"},
    "sparseforge annealed": {"method": "sparseforge", "preset": "annealed"},
    "sparseforge alps+kd": {"method": "sparseforge", "preset": "alps+kd"},
    "dense int8": {"values": "int8"},
    "dense int4": {"values": "int4"},
    "alps int8": {"method": "alps", "values": "int8"},
    "alps int4": {"method": "alps", "values": "int4"},
    "plan 0.125": {"method": "alps", "bytes": 0.125},  # between 2:4 int4 and dense int4, of float32
}
PLANNED = ("2:4", "dense int8", "2:4 int8", "dense int4", "2:4 int4")
LINEARS = ["*.experts.*", "*_proj"]


def main(
    small: Path,
    folder: Path,
    tokens: Annotated[int, typer.Option(help="that the mixture is trained on")] = 1_000_000,
    healing: Annotated[int, typer.Option(help="tokens of a method that trains")] = 200_000,
    methods: Annotated[str, typer.Option(help="by commas; default: all")] = ",".join(METHODS),
    batch_size: int = 8,
    length: int = 256,
    lr: float = 1e-3,
    healing_lr: float = 3e-4,
    calibration: int = 128,
    windows: Annotated[int, typer.Option(help="of held-out text")] = 256,
    seed: int = 0,
    threads: int = 0,
    results: Annotated[Path, typer.Option(help="where the json go")] = RESULTS / "mixture",
) -> None:
    """Train the mixture, prune copies of it, write results/mixture/METHOD.json."""
    use(threads=threads)
    tokenizer = AutoTokenizer.from_pretrained(small)
    files = sorted(map(str, (small / "text").glob("further-*.jsonl")))
    corpus = tokenize(files, tokenizer, length=length, seed=seed, tokens=tokens + healing, separator=SEPARATOR)
    ids = torch.cat([corpus.batch(k, 1, seed)["input_ids"] for k in range((tokens + healing) // length)])
    ids, rest = ids[: tokens // length], ids[tokens // length :]
    texts = {which: token_ids(small / f"{which}.txt", tokenizer) for which in ("valid", "test")}

    def scores(net: PreTrainedModel) -> dict[str, float]:
        how: dict[str, Any] = {"context": length, "max_windows": windows, "batch_size": 16}
        return {which: perplexity(net, text, **how).perplexity for which, text in texts.items()}

    asked = {"tokens": tokens, "healing": healing, "length": length, "batch_size": batch_size, "lr": lr, "seed": seed}
    if not (folder / "model.safetensors").exists():
        net = upcycled(language_model(str(small), torch.float32), seed)
        print("upcycled", scores(net), flush=True)  # type: ignore[arg-type]
        trained = train(net, ids, batch_size, lr)
        net.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "training.json", trained | environment() | {"options": asked})
    training = json.loads((folder / "training.json").read_text())
    if training["options"] != asked:  # its text would be pruned with, too
        sys.exit(f"{folder} was trained with {training['options']}: repeat these, or take another folder")
    dense = language_model(str(folder), torch.float32)
    record = {
        "model": "mixture", "parameters": dense.num_parameters(), "experts": [EXPERTS, CHOSEN], "trained_on": training["tokens"],
        "windows": windows, "context": length, "alike": alike(dense), "dense_perplexity": scores(dense),
    }  # fmt: skip
    for name in methods.split(","):
        file = results / f"{name.replace(' ', '-')}.json"
        if file.exists():
            continue
        net = language_model(str(folder), torch.float32)
        how = METHODS[name] | ({"tokens": healing, "lr": healing_lr} if name.startswith("sparseforge") else {})
        values, size = how.pop("values", None), how.pop("bytes", None)
        began = time.monotonic()
        read = {"batch_size": batch_size, "length": length, "calibration": calibration, "seed": seed}
        report: dict[str, Any] = {}
        plan = {}
        if size:
            made = sf.plan(net, rest, bytes=size, formats=PLANNED, include=LINEARS, batch_size=batch_size, length=length)
            plan = {"plan": made}
        if how:
            how |= plan
            report = sf.sparsify(net, None if name == "magnitude" else rest, show_progress=False, **read, **how).report
        if values or plan:
            quantized = plan or {"values": values, "include": LINEARS}
            report = dict(sf.quantize(net, data=rest, **quantized, **read)) | report
        seconds = time.monotonic() - began
        report["sites"] = len(report["sites"])
        report = {key: value for key, value in report.items() if key not in ("passes", "curves", "density", "skipped")}
        if plan:
            report["plan"] = {"bytes": made.bytes, "loss": made.loss, "formats": Counter(map(str, made.formats.values()))}
        found = {"label": name, "seconds": seconds, "tokens": report.get("tokens", 0), "sparse_perplexity": scores(net)}
        write_json(file, record | found | {"report": report})
        print(name, found, flush=True)


def upcycled(dense: LlamaForCausalLM, seed: int) -> MixtralForCausalLM:
    """The mixture that computes what ``dense`` does, but for the hidden units that are drawn anew."""
    old = dense.config
    config = MixtralConfig(
        **{
            name: getattr(old, name)
            for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
                "bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters",
            )
        },
        num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN, router_aux_loss_coef=0.01,
    )  # fmt: skip
    torch.manual_seed(seed)
    net = MixtralForCausalLM(config).eval()
    weights, new = dense.state_dict(), net.state_dict()
    with torch.no_grad():
        for name, value in new.items():
            if name in weights:
                value.copy_(weights[name])
        for k in range(config.num_hidden_layers):
            into, out = (
                new[f"model.layers.{k}.mlp.experts.gate_up_proj"],
                new[f"model.layers.{k}.mlp.experts.down_proj"],
            )
            gate, up, down = (weights[f"model.layers.{k}.mlp.{side}_proj.weight"] for side in ("gate", "up", "down"))
            for expert in range(EXPERTS):
                drawn = torch.randperm(len(gate))[: round(DRAWN * len(gate))]
                halves = [with_rows_drawn(w, drawn) for w in (gate, up, down.t())]
                into[expert].copy_(torch.cat(halves[:2]))
                out[expert].copy_(halves[2].t())
    return net


def with_rows_drawn(weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A copy whose ``rows`` are normal, with the mean and deviation of all."""
    copy = weight.clone()
    copy[rows] = torch.randn(len(rows), weight.shape[1]) * weight.std() + weight.mean()
    return copy


def train(net: MixtralForCausalLM, ids: torch.Tensor, batch_size: int, lr: float) -> dict[str, Any]:
    """Once over ``ids`` [sequences, length], with the loss that balances experts; what a record says of it."""
    net.train()
    net.config.output_router_logits = True
    steps = len(ids) // batch_size
    training = Training(net, steps, lr, compile=False)
    for step in range(steps):
        training.step(ids[step * batch_size : (step + 1) * batch_size])
    net.config.output_router_logits = False
    net.eval()
    return training.summary(batch_size * ids.shape[1])


def alike(net: PreTrainedModel) -> float:
    """Mean cosine of two experts' weights of a layer: 1 where they do not differ."""
    found = []
    for stack in net.parameters():
        if stack.dim() == 3:
            flat = stack.detach().flatten(1).float()
            pairs = cosine_similarity(flat[:, None], flat[None], dim=-1)
            found.append((pairs.sum() - len(flat)) / (len(flat) * (len(flat) - 1)))
    return float(torch.stack(found).mean())


if __name__ == "__main__":
    typer.run(main)
