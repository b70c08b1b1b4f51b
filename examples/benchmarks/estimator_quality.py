"""What each curvature estimate is worth after few probes: masks by its scores alone, no training; one json, resumable.

    python examples/benchmarks/estimator_quality.py MODEL --data c4.jsonl --valid valid.txt

A probe is one batch at the dense weights, the loss is cross-entropy + KL as in training. Hutchinson's products v * (H v)
are averaged over probes as they are cut at zero (``clamped``), as absolute values (``absolute``), as squares of which the
root is taken at the end (``root``, AdaHessian's) or with their signs, cut at the end (``signed``). ``, V vectors`` draws
V random vectors in each probe: ``absolute`` then averages V absolute values, ``absolute of means`` takes that of their
mean. ``floor`` adds a hundredth of the mean to every entry, so that zeros do not tie. Perplexity is that of the first
``--windows`` windows of 1,024 tokens, of the model with the better two of every four scores h w^2 kept.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import language_model, token_ids, use, windowed_perplexity
from records import RESULTS
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel

from sparseforge_fx import SparseForgeConfig, SparseModel, prepare
from sparseforge_fx.data.tokens import tokenize
from sparseforge_fx.methods.curvature import hutchinson_diagonal
from sparseforge_fx.pattern import TWO_FOUR, hard_mask
from sparseforge_fx.report import environment, write_json

POINTS = (2, 6, 15, 30)  # probes after which the masks are measured
FLOOR = 0.01
Values = dict[str, Tensor]


def main(
    model: str,
    data: Annotated[str, typer.Option(help="text source of the probes")],
    valid: Annotated[Path, typer.Option(help="text that is scored", exists=True)],
    batch_size: int = 2,
    length: int = 256,
    windows: int = 4,
    vectors: Annotated[int, typer.Option(help="of a probe, in the runs with several")] = 4,
    vectors_until: Annotated[int, typer.Option(help="probes of those runs")] = 6,
    threads: int = 0,
    label: str = "",
) -> None:
    """Measure what is not in the json yet."""
    use(threads=threads)
    out = RESULTS / "estimator_quality" / f"{label or Path(model).name}.json"
    tokenizer = AutoTokenizer.from_pretrained(model)
    net = language_model(model, torch.float32)
    corpus = tokenize(data, tokenizer, length=length, tokens=max(POINTS) * batch_size * length)
    batches = [corpus.batch(k, batch_size, 0)["input_ids"] for k in range(max(POINTS))]
    sparse = prepare(net, {"input_ids": batches[0]}, SparseForgeConfig(steps=100, curvature="gauss_newton"))
    weights = {w.fqn: net.get_parameter(w.fqn) for w in sparse.method.weights}
    record = json.loads(out.read_text()) if out.exists() else {
        "model": Path(model).name, "data": Path(data).name, "batch_size": batch_size, "length": length,
        "windows": windows, "vectors": vectors, "perplexity": {}, "probe_seconds": {}, **environment(),
    }  # fmt: skip
    masked = MaskedPerplexity(net, weights, token_ids(valid, tokenizer), windows, out, record)
    masked.measure("dense", 0, None)
    masked.measure("magnitude", 0, {n: w.abs() for n, w in masked.dense.items()})
    masked.measure("gauss_newton", 8, masked.scores(first_order(sparse, batches[:8])))
    sparse.release()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in weights)
    second_order(masked, batches, vectors, vectors_until)


class MaskedPerplexity:
    """Perplexity of ``net`` under masks of scores, by (name, probes) in ``record``, which is written to ``out``."""

    def __init__(self, net: PreTrainedModel, weights: Values, text: Tensor, windows: int, out: Path, record: dict):
        self.net, self.weights, self.text, self.windows, self.out, self.record = (
            net,
            weights,
            text,
            windows,
            out,
            record,
        )
        self.dense = {name: w.detach().clone() for name, w in weights.items()}

    def scores(self, h: Values, floor: float = 0.0) -> Values:
        return {n: self.dense[n].square() * (v + floor * v.mean()) for n, v in h.items()}

    @torch.no_grad()
    def measure(self, name: str, probes: int, scores: Values | None) -> None:
        """Without scores: of the dense model. What the record has is not measured again."""
        done = self.record["perplexity"].setdefault(name, {})
        if str(probes) in done:
            return
        for fqn, score in (scores or {}).items():
            self.weights[fqn].copy_(self.dense[fqn] * hard_mask(score, TWO_FOUR))
        done[str(probes)] = windowed_perplexity(self.net, self.text, self.windows)
        for fqn, w in self.weights.items():
            w.copy_(self.dense[fqn])
        write_json(self.out, self.record)
        print(time.strftime("%H:%M:%S"), name, probes, round(done[str(probes)], 1), flush=True)


def second_order(masked: MaskedPerplexity, batches: list[Tensor], vectors: int, vectors_until: int) -> None:
    """Hutchinson's products summed over the probes in every way, measured at POINTS, from where the last run ended."""
    state = masked.out.with_suffix(".state")
    start, sums = torch.load(state) if state.exists() else (0, {})
    for probe, ids in enumerate(batches[start:], start):
        count = vectors if probe < vectors_until else 1
        clock = time.perf_counter()
        drawn = [draw(masked.net, ids, masked.weights, seed=1000 * probe + v) for v in range(count)]
        seconds = (time.perf_counter() - clock) / count
        masked.record["probe_seconds"].setdefault(str(count), []).append(seconds)
        add(sums, drawn)
        del drawn
        print(time.strftime("%H:%M:%S"), f"probe {probe + 1}", flush=True)
        if probe + 1 not in POINTS:
            continue
        for kind, total in sums.items():
            if "vectors" in kind and probe + 1 > vectors_until:
                continue
            h = {n: v.clamp(min=0).sqrt() if kind == "root" else v.clamp(min=0) for n, v in total.items()}
            masked.measure(kind, probe + 1, masked.scores(h))
            if kind in ("clamped", "absolute"):
                masked.measure(f"{kind}, floor", probe + 1, masked.scores(h, FLOOR))
        torch.save((probe + 1, sums), state)
    state.unlink(missing_ok=True)


def add(sums: dict[str, Values], drawn: list[Values]) -> None:
    """One probe's vectors to the sums, by kind and weight."""
    for fqn, one in drawn[0].items():
        parts = {"clamped": one.clamp(min=0), "absolute": one.abs(), "root": one.square(), "signed": one}
        if len(drawn) > 1:
            several = torch.stack([d[fqn] for d in drawn])
            parts[f"absolute, {len(drawn)} vectors"] = several.abs().mean(0)
            parts[f"absolute of means, {len(drawn)} vectors"] = several.mean(0).abs()
        for kind, value in parts.items():
            total = sums.setdefault(kind, {})
            total[fqn] = total[fqn] + value if fqn in total else value


def first_order(sparse: SparseModel, batches: list[Tensor]) -> Values:
    """Gauss-Newton's average over the batches, for comparison."""
    sparse.train()
    for ids in batches:
        sparse(input_ids=ids)
        sparse.last_loss.total.backward()
        for p in sparse.parameters():
            p.grad = None
    return {n: v.float() for n, v in sparse.method.curvature.values.items()}


def draw(net, ids: Tensor, weights: Values, seed: int) -> Values:
    """One vector's v * (H v) of cross-entropy + KL from the model itself."""

    def loss() -> Tensor:
        log_p = net(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        divergence = F.kl_div(log_p, log_p.detach(), log_target=True, reduction="batchmean")
        return F.nll_loss(log_p, ids[:, 1:].flatten()) + divergence

    return hutchinson_diagonal(loss, weights, generator=torch.Generator().manual_seed(seed))


if __name__ == "__main__":
    typer.run(main)
