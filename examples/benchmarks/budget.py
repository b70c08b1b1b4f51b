"""Where the lines cross: every trained method at 0.01 to 2 tokens per parameter on the small model, three seeds each.

    python examples/benchmarks/budget.py MODEL [--folder results/budget] [--list]

MODEL is a folder of small_model.py: its further-*.jsonl are trained on, its valid.txt chooses, its test.txt is quoted.
One run is one json; a run that is there is not repeated, one that was killed goes on from its state, so the command is
the same on every day. Runs come in the order in which they say most (budget_runs.py, where the methods are, too).

Learning rates are swept for every method and every budget at its full length, with seed 0, on the validation text: 3e-4,
1e-3 and 3e-3, and further ones by factors of about three while the best is the lowest or the highest. At 0.7 and 2 tokens
per parameter the sweep begins at the best rate of the budget before and its two neighbours instead. All minimise cross-entropy +
KL from the dense model, or what their authors' presets say; "...+kl" the KL alone, at temperature 2; "rotated" ones begin in
another basis (sf.rotate); of "...+all" the embedding and the head train, too. "dense" is the dense model
trained on by the same loop and loss; "...+kd" and "...+kl" are fixed masks. A
budget's sequences are drawn from one stream a seed, so that all have the same mixture of texts; what a layer-wise start
sees of it is never more than the run's tokens.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from budget_runs import BUDGETS, METHODS, Known, Run, plan, tokens_left
from common import language_model, token_ids, use
from records import RESULTS
from transformers import AutoTokenizer, PreTrainedModel

import sparseforge_fx as sf
from sparseforge_fx.data.tokens import TokenData, tokenize
from sparseforge_fx.evaluation.perplexity import perplexity
from sparseforge_fx.report import environment, write_json
from sparseforge_fx.training.fingerprint import of_tensors

CALIBRATION = 128  # sequences
CURVE = 50  # rows that are kept of a run's curves


def main(
    model: Path,
    folder: Annotated[Path, typer.Option(help="where the json go")] = RESULTS / "budget",
    methods: Annotated[str, typer.Option(help="by commas; default: all")] = ",".join(METHODS),
    budgets: Annotated[str, typer.Option(help="tokens per parameter, by commas")] = ",".join(map(str, BUDGETS)),
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    length: int = 256,
    windows: Annotated[int, typer.Option(help="of held-out text")] = 256,
    threads: int = 1,
    device: str = "cpu",
    compile: str = "auto",
    save_seconds: float = 120.0,
    only_list: Annotated[bool, typer.Option("--list", help="say what is done and what is left")] = False,
) -> None:
    """Run what is missing, until nothing is."""
    names, wanted = [m.strip() for m in methods.split(",")], [float(b) for b in budgets.split(",")]
    unknown = [str(x) for x, of in [*((m, METHODS) for m in names), *((b, BUDGETS) for b in wanted)] if x not in of]
    if unknown:
        sys.exit(f"no such method or budget: {', '.join(unknown)}; there are {', '.join(METHODS)} at {', '.join(map(str, BUDGETS))}")  # fmt: skip
    use(device, threads)
    study = Study(
        model, folder, device, length, windows, {"on": True, "off": False}.get(compile, compile), save_seconds
    )
    if only_list:
        print(listing(study.known(), names, wanted, seeds, study.parameters))
        return
    while todo := plan(study.known(), names, wanted, seeds):
        print(f"{time.strftime('%H:%M')} {todo[0].name}; {len(todo)} can be started", flush=True)
        study.run(todo[0])


class Study:
    """One small model, its texts, and the folder of its runs."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        device: str,
        length: int,
        windows: int,
        compile: bool | str,
        save_seconds: float,
    ):
        self.model, self.folder, self.device, self.length, self.windows = model, folder, device, length, windows
        self.compile, self.save_seconds = compile, save_seconds
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        net = self.load()
        self.parameters, self.weights = net.num_parameters(), of_tensors(net.state_dict())
        self.dense: dict[str, float] | None = None

    def load(self) -> PreTrainedModel:
        return language_model(str(self.model), torch.float32, self.device)

    def known(self) -> Known:
        """What is done, by the runs' names. Leaves with a sentence if that is another model's."""
        found = {file.stem: json.loads(file.read_text()) for file in sorted(self.folder.glob("*.json"))}
        if strange := [name for name, record in found.items() if record["weights"] != self.weights]:
            sys.exit(f"{self.folder / strange[0]}.json is of another model: take another --folder")
        return found

    def data(self, seed: int) -> TokenData:
        """The longest run's; shorter ones take the first of the same sequences, in the same order."""
        most = round(max(BUDGETS) * self.parameters)
        files = sorted(map(str, (self.model / "text").glob("further-*.jsonl")))
        how: dict[str, Any] = {"cache_dir": self.folder / "tokens", "separator": "\n\n", "seed": seed}
        return tokenize(files, self.tokenizer, length=self.length, tokens=max(most, self.length), **how)

    @cached_property
    def texts(self) -> dict[str, torch.Tensor]:
        return {which: token_ids(self.model / f"{which}.txt", self.tokenizer) for which in ("valid", "test")}

    def loss(self, net: PreTrainedModel) -> dict[str, float]:
        """Nats per token of the held-out texts."""
        how: dict[str, Any] = {"context": self.length, "max_windows": self.windows, "batch_size": 16}
        return {which: perplexity(net, ids, **how).nll_per_token for which, ids in self.texts.items()}

    def run(self, run: Run) -> None:
        """Make its json; a run whose loss is no number any more has one, too."""
        tokens, size = round(run.budget * self.parameters), BUDGETS[run.budget]
        tokens = max(tokens, size * self.length)
        net, state = self.load(), self.folder / f"{run.name}.state"
        self.dense = self.dense or self.loss(net)
        record: dict[str, Any] = {
            "label": run.name, "method": run.method, "tokens_per_parameter": run.budget, "lr": run.lr, "seed": run.seed,
            "model": self.model.name, "weights": self.weights, "parameters": self.parameters, "batch_size": size,
            "length": self.length, "windows": self.windows, "dense_loss": self.dense,
        }  # fmt: skip
        calibration = max(1, min(CALIBRATION, tokens // self.length))
        if how := METHODS[run.method].get("rotate"):
            reading = {"batch_size": size, "length": self.length, "calibration": calibration, "seed": run.seed}
            record["rotation"] = sf.rotate(net, self.data(run.seed), **reading, **how)
        try:
            report = sf.sparsify(
                net, self.data(run.seed), tokens=tokens, lr=run.lr, seed=run.seed, batch_size=size, length=self.length,
                calibration=calibration, state_path=state, compile=self.compile,
                save_seconds=self.save_seconds, show_progress=False, **options(run.method),
            ).report  # fmt: skip
            curves = report.pop("curves")
            record |= {
                "loss": self.loss(net),
                "steps": len(curves),
                "tokens": report["tokens"],
                "seconds": seconds_of(curves) + report.get("calibration_seconds", 0.0),
            }
            thin = max(1, len(curves) // CURVE)
            record["report"] = {k: v for k, v in report.items() if k not in ("skipped", "passes", "density", "sites")}
            record["report"] |= {"curves": curves[thin - 1 :: thin], "sites": len(report["sites"])}
        except sf.SparseForgeError as error:
            if "lower the learning rate" not in str(error):
                raise
            record |= {"loss": None, "failed": str(error), "tokens": 0, "seconds": 0.0, "report": environment()}
        write_json(self.folder / f"{run.name}.json", record)
        shutil.rmtree(state, ignore_errors=True)
        print(f"{run.name}: {record['loss']} (dense {self.dense}), {record['seconds']:.0f} s", flush=True)
        del net
        torch.compiler.reset()  # or what was compiled for one run stays for all of them
        gc.collect()


def options(method: str) -> dict[str, Any]:
    """What sf.sparsify takes of it."""
    asked = {name: value for name, value in METHODS[method].items() if name != "rotate"}
    loss = asked.pop("loss", None)
    return asked if loss is None else asked | {"objective": sf.Distillation(**loss)}


def seconds_of(curves: list[dict[str, float]]) -> float:
    """Of all steps; one in which the machine did something else, or stood still, counts as a middle one."""
    seconds = [row["seconds"] for row in curves]
    middle = median(seconds)
    return sum(s if s < 5 * middle else middle for s in seconds)


def listing(known: Known, methods: list[str], budgets: list[float], seeds: int, parameters: int) -> str:
    """For every method its runs that are there, and the hours that it still takes at the speed of its steps so far."""

    def pace(records: list[Mapping[str, Any]]) -> float:
        """Seconds per token, without a layer-wise start."""
        steps = sum(r["seconds"] - r["report"].get("calibration_seconds", 0.0) for r in records)
        return steps / max(1, sum(r["tokens"] for r in records))

    lines, total = [], 0.0
    for method in methods:
        mine = [r for r in known.values() if r["method"] == method]
        left = sum(tokens_left(method, budget, known, seeds) for budget in budgets) * parameters
        hours = left * (pace(mine) or pace(list(known.values())) or 1 / 2500) / 3600
        total += hours
        counts = (sum(r["tokens_per_parameter"] == budget for r in mine) for budget in budgets)
        done = ", ".join(f"{count} at {budget:g}" for budget, count in zip(budgets, counts, strict=True))
        lines.append(f"{method:20} done: {done}; left: {hours:.1f} h")
    return "\n".join([*lines, f"{len(known)} runs done, about {total:.1f} h left"])


if __name__ == "__main__":
    typer.run(main)
