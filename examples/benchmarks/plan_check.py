"""What a plan predicts of a format against what it does: one weight changed alone, the loss measured; one json.

    python examples/benchmarks/plan_check.py MODEL --data c4.jsonl --valid wikitext.txt

Of a random sample of linears and stacks of up to eight experts (the output head is always among them) every format is predicted as ``sf.plan`` does, then
put in the model's place of that one weight. Measured are the divergence from the dense model, which the prediction is
of, and the difference of the cross-entropy, which is the same but for the noise of the text. ``spearman`` is the rank
correlation over all pairs of a weight and a format; ``spearman_by_format`` that over weights.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, median
from typing import Annotated

import torch
import typer
from common import language_model, save, token_ids, use
from torch import Tensor, nn
from transformers import AutoTokenizer

from sparseforge_fx.formats import parse_format
from sparseforge_fx.methods.one_shot import SparseGPTConfig
from sparseforge_fx.planning import make
from sparseforge_fx.planning.candidates import Candidate, candidates
from sparseforge_fx.planning.solutions import solutions
from sparseforge_fx.training.inputs import open_run
from sparseforge_fx.training.recipe import Recipe

FORMATS = ("2:4", "dense int8", "2:4 int8", "dense int4/32", "2:4 int4/32")


def main(
    model: str,
    data: Annotated[str, typer.Option(help="text source of the prediction")],
    valid: Annotated[Path, typer.Option(help="text that is scored", exists=True)],
    weights: Annotated[int, typer.Option(help="linears in the sample, beside the head")] = 24,
    calibration: int = make.CALIBRATION,
    length: int = 512,
    windows: Annotated[int, typer.Option(help="of LENGTH tokens that are scored")] = 4,
    seed: int = 0,
    threads: int = 0,
    label: str = "",
) -> None:
    use(threads=threads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    net = language_model(model, torch.float32)
    recipe = Recipe(calibration=calibration, length=length, batch_size=2, seed=seed)
    run = open_run(net, data, recipe, SparseGPTConfig(), None, tokenizer=tokenizer, cache_dir=None, example_inputs=None)
    every, _ = candidates(run.program, [parse_format(f) for f in FORMATS])
    heads = [c for c in every if not any(f.is_sparse for f in c.formats)]
    sample = random.Random(seed).sample([c for c in every if c not in heads], weights)
    clock = time.perf_counter()
    moments: dict[str, list[Tensor]] = defaultdict(list)
    losses = make.predict(run, recipe, [*heads, *sample], lambda name, _, seen, __: moments[name].append(seen))
    seconds = time.perf_counter() - clock
    ids = token_ids(valid, tokenizer)[: windows * length].reshape(windows, 1, length)
    scored = Scored(net, ids)
    rows = []
    for candidate in [*heads, *sample]:
        name, stored = candidate.site.fqn, run.program.tensor(candidate.site.fqn).detach()
        weight = stored.mT if candidate.site.transposed else stored
        each = zip(weight if candidate.site.experts else [weight], moments[name], strict=True)
        solved = [solutions(*one, candidate.formats[1:]) for one in each]
        for form in candidate.formats[1:]:
            changed = torch.stack([of_one[form] for of_one in solved]).view_as(weight)
            kl, task = scored.with_weight(net, candidate, changed)
            predicted = losses[name][form]
            rows.append({"name": name, "format": str(form), "predicted": predicted, "kl": kl, "task": task})
            print(time.strftime("%H:%M:%S"), rows[-1], flush=True)
    save("plan_check", label or Path(model).name, {
        "model": Path(model).name, "data": Path(data).name, "valid": valid.name, "weights": weights,
        "calibration": calibration, "length": length, "windows": windows, "seed": seed, "predict_seconds": seconds,
        **correlations(rows), "rows": rows,
    })  # fmt: skip


class Scored:
    """Windows of text with what the dense model says of them."""

    def __init__(self, net: nn.Module, windows: Tensor):
        self.windows = windows
        self.dense = [self._log_p(net, ids) for ids in windows]

    @torch.inference_mode()
    def with_weight(self, net: nn.Module, candidate: Candidate, weight: Tensor) -> tuple[float, float]:
        """Mean divergence per token, and the mean growth of the cross-entropy, with this weight alone changed."""
        path, _, leaf = candidate.site.fqn.rpartition(".")
        owners = [] if candidate.tied and not candidate.taken else [(net.get_submodule(path), leaf)]
        if candidate.tied:  # else the head's own copy: what an embedding shares with it stays
            owners.append((net.get_output_embeddings(), "weight"))
        before = [getattr(owner, name) for owner, name in owners]
        changed = nn.Parameter(weight.mT if candidate.site.transposed else weight, requires_grad=False)
        for owner, name in owners:
            setattr(owner, name, changed)
        try:
            found = [self._distance(net, *pair) for pair in zip(self.windows, self.dense, strict=True)]
        finally:
            for (owner, name), own in zip(owners, before, strict=True):
                setattr(owner, name, own)
        return mean(kl for kl, _ in found), mean(task for _, task in found)

    def _distance(self, net: nn.Module, ids: Tensor, dense: Tensor) -> tuple[float, float]:
        changed = self._log_p(net, ids).double()
        kl = (dense.double().exp() * (dense.double() - changed)).sum(-1).mean()
        task = (dense[:-1].double() - changed[:-1]).gather(1, ids[0, 1:, None]).mean()
        return float(kl), float(task)

    @staticmethod
    @torch.inference_mode()
    def _log_p(net: nn.Module, ids: Tensor) -> Tensor:
        return net(ids).logits[0].double().log_softmax(-1).float()


def correlations(rows: list[dict]) -> dict:
    def rank(chosen: list[dict], key: str = "kl") -> float:
        both = torch.tensor([[r["predicted"], r[key]] for r in chosen], dtype=torch.float64).t()
        return float(torch.corrcoef(both.argsort(1).argsort(1).double())[0, 1])

    by_format = {f: [r for r in rows if r["format"] == f] for f in FORMATS}
    return {
        "pairs": len(rows),
        "spearman": rank(rows),
        "spearman_task": rank(rows, "task"),
        "spearman_by_format": {f: rank(found) for f, found in by_format.items()},
        "measured_over_predicted": median(r["kl"] / r["predicted"] for r in rows if r["predicted"] > 0),
    }


if __name__ == "__main__":
    typer.run(main)
