"""Every method at equal tokens: model x method x seed, learning rate chosen per method by the same small sweep.

    python examples/benchmarks/leaderboard.py MODEL --data c4.jsonl --data reviews.jsonl.xz --data books.jsonl.xz \\
        --valid valid.txt --test test.txt --tokens 122880 --seeds 3 --workers 2

One run is one process of quality.py and one json in results/leaderboard/; a run that is there is not repeated, a run that
was killed goes on. The sweep is a run of a quarter of the tokens (or ``--sweep-tokens``: a longer board takes over the rates
of a shorter one; ``--rate`` sets one for all instead) with seed 0 for each of three rates, and for further ones while the best is the lowest or the highest;
the rate with the lowest validation perplexity is taken. ``--ablations`` runs variants of sparseforge, ``--only`` some of
them, at half of the tokens and its preset's rate. tables.py makes the tables and the picture.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import records
import typer

HERE = Path(__file__).parent
RESULTS = records.RESULTS / "leaderboard"
ONE_SHOT = ("dense", "magnitude", "wanda", "sparsegpt", "alps")
#: name -> arguments of quality.py; sparsegpt+kd is the start that the field takes, a fixed mask, and our distillation
TRAINED = {
    "alps+kd": ("--method", "sparseforge", "--preset", "alps+kd"),
    "alps+kd-plain": (
        "--method",
        "sparseforge",
        "--preset",
        "alps+kd",
        "--options",
        '{"reorder": false, "reconstruct": 0}',
    ),
    "sparseforge-paper": ("--method", "sparseforge", "--preset", "paper"),
    "sparseforge-paper-universal": ("--method", "sparseforge", "--preset", "paper-universal"),
    "sparseforge-annealed": ("--method", "sparseforge", "--preset", "annealed"),
    "sparsegpt+kd": (
        "--method",
        "sparseforge",
        "--preset",
        "alps+kd",
        "--options",
        '{"start": "sparsegpt", "reorder": false, "reconstruct": 0}',
    ),
    "ast": ("--method", "ast"),
    "sr-ste": ("--method", "sr-ste"),
    "gmp": ("--method", "gmp"),
    "imp": ("--method", "imp"),
    "cast": ("--method", "cast"),
    "maskllm": ("--method", "maskllm"),
    "maskpro": ("--method", "maskpro"),
}
#: the middle three are run first, then what lies beyond an end that is the best
RATES = {"maskllm": (5e-5, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3), "maskpro": (0.5, 5, 50, 500, 5000)}  # of logits
DEFAULT_RATES = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
#: variant -> the method whose rate it takes, and what is different about it
ABLATIONS = {
    "annealed": ("sparseforge-annealed", ()),
    "annealed-magnitude-score": ("sparseforge-annealed", ("--options", '{"score": "magnitude"}')),
    "annealed-ratio-score": ("sparseforge-annealed", ("--options", '{"score": "ratio"}')),
    "annealed-pattern-gate": ("sparseforge-annealed", ("--options", '{"gate": "pattern"}')),
    "annealed-no-structure": ("sparseforge-annealed", ("--options", '{"structure": 0.0}')),
    "annealed-no-distillation": ("sparseforge-annealed", ("--w-kl", "0")),
    "fixed-wanda-mask": ("alps+kd-plain", ("--options", '{"start": "wanda"}')),
    "alps+kd": ("alps+kd", ()),
    "alps+kd-3-passes": ("alps+kd", ("--options", '{"reconstruct": 3}')),
    "alps+kd-2-passes-at-2e-3": ("alps+kd", ("--options", '{"reconstruct": 2, "reconstruct_lr": 2e-3}')),
    "alps+kd-plain": ("alps+kd-plain", ()),
    "alps+kd-plain-no-distillation": ("alps+kd-plain", ("--w-kl", "0")),
    "alps+kd-plain-fading": ("alps+kd", ("--options", '{"quench_end": 0.4, "softness_start": 0.6}')),
    "paper-no-branch": ("sparseforge-paper", ("--options", '{"slorb_block": 0}')),
    #: all estimators on one loss and one commit; what earlier runs of them had is under annealed-...
    "curvature-gauss-newton": ("sparseforge-annealed", ("--options", '{"curvature": "gauss_newton"}')),
    "curvature-fisher": ("sparseforge-annealed", ("--options", '{"curvature": "fisher"}')),
    "curvature-activation": ("sparseforge-annealed", ("--options", '{"curvature": "activation"}')),
    "curvature-squared-gradient": ("sparseforge-annealed", ("--options", '{"curvature": "squared_gradient"}')),
    "curvature-hutchinson": ("sparseforge-annealed", ("--options", '{"curvature": "hutchinson"}')),
}


@dataclass(frozen=True)
class Run:
    """One process of quality.py."""

    name: str
    arguments: tuple[str, ...]

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}.json"


def at_rate(method: str, rate: float) -> tuple[str, ...]:
    """Arguments of a learning rate; maskpro's gradient steps have one of their own, which the run's does not change."""
    return ("--options", json.dumps({"logit_lr": rate})) if method == "maskpro" else ("--lr", f"{rate:g}")


def sweep(method: str, short: int) -> dict[float, Run]:
    """The runs of ``short`` tokens among which a method's learning rate is chosen, as far as that is known: the best has
    worse neighbours."""
    rates = RATES.get(method, DEFAULT_RATES)
    low = max(0, len(rates) // 2 - 1)
    high = min(low + 2, len(rates) - 1)
    while True:
        runs = {}
        for rate in rates[low : high + 1]:
            options = ("--tokens", str(short), "--seed", "0", *at_rate(method, rate), "--tasks", "0")
            runs[rate] = Run(f"sweep-{method}-{rate:g}-{short}", (*TRAINED[method], *options))
        best = _best(runs)
        if best == rates[low] and low > 0:
            low -= 1
        elif best == rates[high] and high < len(rates) - 1:
            high += 1
        else:
            return runs


def _best(runs: dict[float, Run]) -> float | None:
    """The rate with the lowest validation perplexity; None while runs are missing."""
    if not all(run.file.exists() for run in runs.values()):
        return None
    perplexity = {rate: json.loads(run.file.read_text())["sparse_perplexity"]["valid"] for rate, run in runs.items()}
    return min(perplexity, key=lambda rate: (perplexity[rate], -rate))  # of rates that change no mask, the highest


def best_rate(method: str, short: int) -> float | None:
    """The rate that the sweep chose; None while runs of it are missing."""
    return _best(sweep(method, short))


def plan(methods: list[str], tokens: int, seeds: int, short: int, rate: float = 0.0) -> list[Run]:
    """What can be started now, the first first; ``rate``: the learning rate of all, in the place of sweeps."""
    runs = []
    for method in methods:
        if method in ONE_SHOT:
            count = 1 if method in ("dense", "magnitude") else seeds
            options = ("--method", method, "--tokens", str(tokens))
            runs += [Run(f"{method}-0-seed{seed}", (*options, "--seed", str(seed))) for seed in range(count)]
            continue
        chosen = rate or best_rate(method, short)
        if chosen is None:
            runs += sweep(method, short).values()
            continue
        for seed in range(seeds):
            options = ("--tokens", str(tokens), "--seed", str(seed), *at_rate(method, chosen))
            runs.append(Run(f"{method}-{tokens}-seed{seed}", (*TRAINED[method], *options)))
    return [run for run in runs if not run.file.exists()]


def ablations(tokens: int, short: int, names: list[str] | None = None, seeds: int = 1) -> list[Run]:
    """The variants that can be started now: those whose method has its rate. The first seed has no number in its name."""
    runs = []
    for name in names or ABLATIONS:
        method, changes = ABLATIONS[name]
        rate = best_rate(method, short)
        if rate is None:
            continue
        for seed in range(seeds):
            options = ("--tokens", str(tokens // 2), "--seed", str(seed), *at_rate(method, rate), "--tasks", "0")
            end = f"-seed{seed}" if seed else ""
            runs.append(Run(f"ablation-{name}-{tokens // 2}{end}", (*TRAINED[method], *changes, *options)))
    return [run for run in runs if not run.file.exists()]


def main(
    model: str,
    data: Annotated[list[str], typer.Option(help="text source; several are mixed evenly by documents")],
    valid: Annotated[Path, typer.Option(help="validation text, for choosing", exists=True)],
    test: Annotated[Path, typer.Option(help="test text, for quoting", exists=True)],
    methods: Annotated[str, typer.Option(help="by commas, or none; default: all")] = ",".join((*ONE_SHOT, *TRAINED)),
    tokens: Annotated[int, typer.Option(help="training tokens of each run", min=4096)] = 122_880,
    sweep_tokens: Annotated[int, typer.Option(help="those of each run of a sweep; 0: a quarter", min=0)] = 0,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    tasks: Annotated[int, typer.Option(help="documents per zero-shot task; 0: no tasks", min=0)] = 100,
    variants: Annotated[
        bool, typer.Option("--ablations", help="also run the variants of sparseforge, one seed")
    ] = False,
    only: Annotated[str, typer.Option(help="these variants by commas instead, each with --seeds")] = "",
    workers: Annotated[int, typer.Option(help="runs side by side, one thread each", min=1)] = 1,
    rate: Annotated[float, typer.Option(help="learning rate of every method; 0: by its sweep", min=0)] = 0.0,
    batch_size: Annotated[int, typer.Option(help="sequences of a step", min=1)] = 2,
    device: str = "cpu",
) -> None:
    """Run what is missing, until nothing is."""
    short = sweep_tokens or tokens // 4
    chosen = [m.strip() for m in methods.split(",") if m.strip() != "none"]
    named = [v.strip() for v in only.split(",") if v.strip()]
    if strange := [v for v in named if v not in ABLATIONS]:
        sys.exit(f"no such variant: {', '.join(strange)}; there are {', '.join(ABLATIONS)}")
    unknown = [m for m in chosen if m not in (*ONE_SHOT, *TRAINED)]
    if unknown:
        sys.exit(f"no such method: {', '.join(unknown)}; there are {', '.join((*ONE_SHOT, *TRAINED))}")
    common = [
        model, "--valid", str(valid), "--test", str(test), "--tasks", str(tasks), "--batch-size", str(batch_size),
        "--threads", "1", "--device", device, "--compile", "off" if device == "cpu" else "auto",
    ]  # fmt: skip
    for source in data:
        common += ["--data", source]
    running: dict[str, subprocess.Popen] = {}
    failed: set[str] = set()
    while True:
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                if process.returncode:
                    failed.add(name)
                    print(f"{name} failed with {process.returncode}: see {RESULTS / name}.log", flush=True)
        todo = plan(chosen, tokens, seeds, short, rate)
        if named or variants:
            todo += ablations(tokens, short, named, seeds if named else 1)
        waiting = [r for r in todo if r.name not in running and r.name not in failed]
        if not waiting and not running:
            break
        for run in waiting[: workers - len(running)]:
            RESULTS.mkdir(parents=True, exist_ok=True)
            print(f"{time.strftime('%H:%M')} {run.name}; {len(waiting)} to go", flush=True)
            command = [sys.executable, str(HERE / "quality.py"), *common, *run.arguments]
            command += ["--label", run.name, "--folder", str(RESULTS)]
            if (dense := RESULTS / "dense-0-seed0.json").exists():
                command += ["--dense-from", str(dense)]
            with (RESULTS / f"{run.name}.log").open("w") as log:
                running[run.name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        time.sleep(2)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
