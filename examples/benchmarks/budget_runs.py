"""The study of budgets: which runs it consists of, in which order, and at which rates. Without torch, as the table is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

#: name -> what sf.sparsify is called with, ``loss`` being fields of its objective, ``rotate`` what sf.rotate was called with
#: before; the first six say most. No branch beside the weights: all are plain 2:4
METHODS: dict[str, dict[str, Any]] = {
    "alps+kd": {"method": "sparseforge", "start": "alps", "reorder": False, "reconstruct": 0},
    "paper-universal": {
        "method": "sparseforge",
        "preset": "paper-universal",
        "curvature": "activation",
        "slorb_block": 0,
    },
    "ast": {"method": "ast"},
    "dense": {
        "method": "sr-ste",
        "pattern": "0.0000001%",
    },  # the same loop and loss, and a share that rounds to nothing
    "alps+blocks+kd": {"method": "sparseforge", "start": "alps", "reorder": True, "reconstruct": 3},
    "annealed": {"method": "sparseforge", "preset": "annealed"},
    "paper-llama": {"method": "sparseforge", "preset": "paper", "curvature": "gauss_newton", "slorb_block": 0},
    "sparsegpt+kd": {"method": "sparseforge", "start": "sparsegpt", "reorder": False, "reconstruct": 0},
    "cast": {"method": "cast"},
    "sr-ste": {"method": "sr-ste"},
    "maskllm": {"method": "maskllm"},
    "wanda+kd": {"method": "sparseforge", "start": "wanda", "reorder": False, "reconstruct": 0},
    "magnitude+kd": {"method": "gmp", "end": 1e-9},  # all of its pruning behind the first step, which is warm-up
    "alps+kl": {
        "method": "sparseforge",
        "start": "alps",
        "reorder": False,
        "reconstruct": 0,
        "loss": {"task": 0.0, "temperature": 2.0},
    },
    "alps+blocks+kl": {
        "method": "sparseforge",
        "start": "alps",
        "reorder": True,
        "reconstruct": 3,
        "loss": {"task": 0.0, "temperature": 2.0},
    },
    "ast-from-alps": {"method": "ast", "start": "alps"},
    "rotated+blocks+kl": {
        "rotate": {"steps": 1000},
        "method": "sparseforge",
        "start": "alps",
        "reorder": True,
        "reconstruct": 3,
        "loss": {"task": 0.0, "temperature": 2.0},
    },
}
DECISIVE = tuple(METHODS)[:6]
#: with the embedding and the head training, too, as they do in the authors' scripts
METHODS |= {
    f"{name}+all": METHODS[name] | {"trainable": "all"}
    for name in ("dense", "ast", "paper-universal", "alps+kd", "rotated+blocks+kl")
}
#: the labels' part: by the validation text the best of 0, 0.1, 0.2, 0.3, 0.5 and 1 at 0.7 tokens per parameter
METHODS["rotated+blocks+ce+kl+all"] = METHODS["rotated+blocks+kl+all"] | {"loss": {"task": 0.2, "temperature": 2.0}}
#: tokens per parameter -> sequences of a step: few where there are few tokens, so that there are steps
BUDGETS = {0.01: 1, 0.05: 2, 0.2: 4, 0.7: 4, 2.0: 8}
NARROW = (0.7, 2.0)  # their sweeps begin beside the best rate of the budget before
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
MIDDLE = 3  # of RATES: where the other sweeps begin

Known = Mapping[str, Mapping[str, Any]]  # name of a run -> its record


@dataclass(frozen=True)
class Run:
    """One call of sf.sparsify and one json."""

    method: str
    budget: float
    lr: float
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.method}-{self.budget:g}-{self.lr:g}-seed{self.seed}"

    @property
    def rank(self) -> int:
        """Cheap runs, those that decide and first seeds come first; each of these is worth one step of the budget."""
        return list(BUDGETS).index(self.budget) + (self.method not in DECISIVE) + min(self.seed, 1)


def sweep(method: str, budget: float, known: Known) -> list[Run]:
    """The runs among which a rate is chosen, as far as that is known: a rate and its neighbours, and further ones while
    the best has but one. None yet where the budget before decides which."""
    middle = MIDDLE
    if budget in NARROW:
        before = best(method, list(BUDGETS)[list(BUDGETS).index(budget) - 1], known)
        if before is None:
            return []
        middle = RATES.index(before)
    low, high = max(0, middle - 1), min(middle + 1, len(RATES) - 1)
    while True:
        runs = [Run(method, budget, rate) for rate in RATES[low : high + 1]]
        found = _lowest(runs, known)
        if found == RATES[low] and low > 0:
            low -= 1
        elif found == RATES[high] and high < len(RATES) - 1:
            high += 1
        else:
            return runs


def best(method: str, budget: float, known: Known) -> float | None:
    """The rate that the sweep chose; None while runs of it are missing."""
    return _lowest(sweep(method, budget, known), known)


def _lowest(runs: list[Run], known: Known) -> float | None:
    if not runs or any(run.name not in known for run in runs):
        return None
    return min(runs, key=lambda run: (valid_loss(known[run.name]), -run.lr)).lr


def valid_loss(record: Mapping[str, Any]) -> float:
    """Of a run that came to no end: infinite."""
    return math.inf if record["loss"] is None else record["loss"]["valid"]


def plan(
    known: Known, methods: Iterable[str] = METHODS, budgets: Iterable[float] = BUDGETS, seeds: int = 3
) -> list[Run]:
    """What can be started now, the first first."""
    runs = []
    for method in methods:
        for budget in budgets:
            rate = best(method, budget, known)
            if rate is None:
                runs += sweep(method, budget, known)
            else:
                runs += [Run(method, budget, rate, seed) for seed in range(1, seeds)]
    order = list(METHODS)
    runs = [run for run in runs if run.name not in known]
    return sorted(runs, key=lambda run: (run.rank, run.budget, run.seed, order.index(run.method), run.lr))


def tokens_left(method: str, budget: float, known: Known, seeds: int = 3) -> float:
    """Tokens per parameter of the runs that are still to come; a sweep is taken to need no more than it is seen to."""
    runs = sweep(method, budget, known)
    open_runs = sum(run.name not in known for run in runs) if runs else 3
    rate = best(method, budget, known)
    for seed in range(1, seeds):
        open_runs += rate is None or Run(method, budget, rate, seed).name not in known
    return budget * open_runs


def chosen(method: str, budget: float, known: Known) -> tuple[list[Mapping[str, Any]], bool]:
    """The runs of all seeds at the best rate so far, and whether the sweep is over."""
    rate = best(method, budget, known)
    first = [known[run.name] for run in sweep(method, budget, known) if run.name in known]
    if not first or all(record["loss"] is None for record in first):
        return [], False
    lr = rate if rate is not None else min(first, key=lambda r: (valid_loss(r), -r["lr"]))["lr"]
    runs = [r for r in known.values() if (r["method"], r["tokens_per_parameter"], r["lr"]) == (method, budget, lr)]
    return sorted((r for r in runs if r["loss"] is not None), key=lambda r: r["seed"]), rate is not None
