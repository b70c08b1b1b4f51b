"""Tables of what a method or an estimate is worth: perplexity and zero-shot accuracy."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from statistics import mean

from records import DIRTY, NONE, blocks, plain, read, table, with_spread


def label(run: dict) -> str:
    name, preset = run["method"], run["report"].get("preset")
    if name == "sparseforge" and preset == "alps+kd":
        return "alps+kd-plain" if plain(run) else preset
    told = [run[key] for key in ("earlier", "note") if run.get(key)]
    name = f"{name} {preset}" if name == "sparseforge" else name
    return f"{name} ({', '.join(told)})" if told else name


def test_mean(runs: list[dict]) -> float:
    return mean(r["sparse_perplexity"]["test"] for r in runs)


def scores(runs: list[dict]) -> tuple[str, str, str]:
    """Perplexity of the test text with its spread over seeds, that of the validation text, and how many seeds."""
    valid = mean(r["sparse_perplexity"]["valid"] for r in runs)
    return with_spread([r["sparse_perplexity"]["test"] for r in runs]), f"{valid:.2f}", str(len(runs))


def quality_table() -> str:
    """Of trained methods: what one-shot methods give is in the leaderboard, on the same calibration text for all."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for run in read("quality"):
        if run["tokens"]:
            groups[label(run), run["tokens"]].append(run)
    if not groups:
        return NONE
    first = next(iter(groups.values()))[0]
    text = (
        f"{first['model']}: WikiText-2 test perplexity, first {first['windows']} windows of {first['context']} tokens"
        f" (dense {first['dense_perplexity']['test']:.2f}); every linear except the head exactly 2:4; {first['report']['device']}. {SECONDS}"
    )
    if any((run["report"]["commit"] or "").endswith("+") for runs in groups.values() for run in runs):
        text += f" {DIRTY}"
    rows = []
    for (name, tokens), runs in sorted(groups.items(), key=lambda item: -test_mean(item[1])):
        report = runs[0]["report"]
        calibration = report.get("calibration_sequences", 0)
        commits = ", ".join(dict.fromkeys(r["report"]["commit"] or "" for r in runs))
        rows.append((name, f"{tokens:,}", steps(report), calibration, seconds(runs), *scores(runs), commits))
    names = (
        "method", "training tokens", "steps x tokens", "calibration sequences", "seconds", "test perplexity", "validation", "seeds", "commit",
    )  # fmt: skip
    return blocks([(text, table(names, "lrrrrrrrl", rows))])


def reorder_table() -> str:
    """One-shot methods in their own basis and another, with and without channels that may change places, and blocks
    that learn after it."""
    runs = sorted(read("reorder"), key=lambda run: -run["sparse_perplexity"]["test"])
    if not runs:
        return NONE
    first = runs[0]
    text = (
        f"{runs[-1]['model']}, no training, {first['report']['calibration_sequences']} sequences: perplexity of the first"
        f" {first['windows']} windows of {first['context']} tokens (dense {first['dense_perplexity']['test']:.2f} and"
        f" {first['dense_perplexity']['valid']:.2f}); {first['report']['device']}."
    )
    rows = [
        (
            run["method"],
            "yes" if run.get("rotation") else "no",
            "yes" if run["report"]["config"]["reorder"] else "no",
            run["report"]["config"].get("reconstruct", 0),
            f"{run['report']['seconds']:,.0f}",
            *scores([run])[:2],
            run["report"]["commit"],
        )
        for run in runs
    ]
    names = ("method", "rotated", "reorder", "passes of reconstruct", "seconds", "test", "validation", "commit")
    return blocks([(text, table(names, "lllrrrrl", rows))])


SECONDS = "Seconds of the whole run, mean over the seeds; in brackets those of its layer-wise start."


def seconds(runs: list[dict]) -> str:
    """Of the whole run, and of its start; empty where they are not known."""
    whole = [r["report"]["seconds"] for r in runs if "seconds" in r["report"]]
    start = [r["report"]["calibration_seconds"] for r in runs if "calibration_seconds" in r["report"]]
    if not whole:
        return ""
    return f"{mean(whole):,.0f}" + (f" ({mean(start):,.0f})" if start else "")


def spent(runs: list[dict]) -> tuple[str, str]:
    """Seconds, and what they are of: those of one device say nothing of another."""
    return seconds(runs), runs[0]["report"].get("device", "") if runs[0]["report"].get("seconds") else ""


def steps(report: dict) -> str:
    """Optimizer steps and tokens of each."""
    if not report.get("curves"):
        return ""
    run = report.get("recipe", report)  # older files have no recipe
    return f"{len(report['curves'])} x {run['batch_size'] * run['length'] * run['accumulate']:,}"


def leaderboard_runs() -> tuple[list[dict], dict[str, dict], list[dict]]:
    """The runs at full length; of each method the best of its sweep; the variants."""
    full, sweeps, variants = [], defaultdict(list), []
    for run in read("leaderboard"):
        kind = run["label"].split("-")[0]
        if kind == "sweep":
            sweeps[re.sub(r"^sweep-|-[\d.]+(e-?\d+)?-\d+$", "", run["label"])].append(run)
        elif kind == "ablation":
            variants.append(run)
        else:
            full.append(run)
    best = {m: min(runs, key=lambda r: (r["sparse_perplexity"]["valid"], -rate(r))) for m, runs in sweeps.items()}
    return full, best, variants


def rate(run: dict) -> float:
    """The learning rate that was swept; maskpro's is its logits'."""
    return run["report"]["config"].get("logit_lr", run["report"]["lr"])


def leaderboard_groups() -> dict[tuple[str, int], list[dict]]:
    """(method, tokens) -> its seeds; the best run of each sweep among them."""
    full, best, _ = leaderboard_runs()
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for run in full:
        groups[re.sub(r"-\d+-seed\d+$", "", run["label"]), run["tokens"]].append(run)
    for method, run in best.items():
        groups[method, run["tokens"]].append(run)
    return groups


#: (method, tokens) of the leaderboard -> how a stranger reads it; the last three are there when they were run
MAIN = {
    ("dense", 0): "dense",
    ("alps", 0): "ALPS, without training: the best of the one-shot methods",
    ("maskllm", 122_880): "MaskLLM: learned masks over frozen weights; the best of the other trained methods",
    (
        "sparseforge-annealed",
        122_880,
    ): "SparseForge's annealing from the dense model with our constants (preset `annealed`)",
    ("sparsegpt+kd", 122_880): "SparseGPT's solution, fixed masks, distillation",
    ("alps+kd-plain", 122_880): "the layer-wise ALPS solution, fixed masks, distillation",
    (
        "alps+kd",
        122_880,
    ): "`alps+kd`, the default: the same, channels put in order before and blocks that learn after ALPS",
}
THEIRS = {
    ("sparseforge-paper", 122_880): "SparseForge by its authors' LLaMA script (preset `paper`)",
    ("sparseforge-paper-universal", 122_880): "SparseForge by its authors' universal script (preset `paper-universal`)",
    ("ast", 122_880): "AST by its authors' settings",
}


#: label of a run with more tokens, of whichever folder -> how a stranger reads it
LONGER = {
    "ablation-alps+kd-2-passes-at-2.5e-4-983040": "`alps+kd` with two passes of the blocks and half the rate",
    "rotated-256x2-983040": "that in another basis (`sf.rotate`), begun on twice as many sequences",
    "rotated-256x2-983040-at-1.25e-4": "that from the same start, at half its rate",
}
#: of those the ones that went on from the start of another -> that one
STARTED = {"rotated-256x2-983040-at-1.25e-4": "rotated-256x2-983040"}


def main_table() -> str:
    """The rows of the leaderboard that answer the first question."""
    groups = leaderboard_groups()
    if any(key not in groups for key in MAIN):
        return NONE
    tasks = list(groups["dense", 0][0]["zero_shot"])
    rows = []
    for key, name in (MAIN | {k: v for k, v in THEIRS.items() if k in groups}).items():
        perplexity, _, seeds = scores(groups[key])
        average = accuracy(groups[key], tasks)[0]
        rows.append(
            (name, f"{key[1]:,}", steps(groups[key][0]["report"]), *spent(groups[key]), perplexity, average, seeds)
        )
    longer = {r["label"]: r for folder in ("leaderboard", "rotated", "continued") for r in read(folder)}
    for label, start in ((a, b) for a, b in STARTED.items() if {a, b} <= longer.keys()):
        begun, report = longer[start]["report"]["calibration_seconds"], longer[label]["report"]
        report |= {"calibration_seconds": begun, "seconds": report["seconds"] + begun}
    for run in (longer[label] for label in LONGER if label in longer):
        made = (f"{run['tokens']:,}", steps(run["report"]), *spent([run]))
        rows.append((LONGER[run["label"]], *made, scores([run])[0], accuracy([run], tasks)[0], "1"))
    rows.sort(
        key=lambda row: -float(row[5].split()[0]) if row[1] != "0" else -math.inf
    )  # those that trained, the best last
    text = (
        f"{setting(groups['dense', 0][0])}, the mean of {len(tasks)} tasks ± its standard error."
        f" {undecided({k: groups[k] for k in MAIN}, tasks)} Every linear but the head is exactly 2:4. {SECONDS}"
    )
    names = ("method", "training tokens", "steps x tokens", "seconds", "device", "perplexity", "zero-shot", "seeds")
    return blocks([(text, table(names, "lrrrlrrr", rows))])


def undecided(groups: dict[tuple[str, int], list[dict]], tasks: list[str]) -> str:
    """That so few documents tell nothing apart, where the dense model is below a sparse one."""
    share = {key: float(found.split()[0]) for key, runs in groups.items() if (found := accuracy(runs, tasks)[0])}
    dense = share.pop(("dense", 0), math.inf)
    above = [
        f"{method} after {tokens:,} tokens" if tokens else method for (method, tokens), s in share.items() if s > dense
    ]
    if not above:
        return ""
    return f"So few documents cannot tell these models apart: the dense one is below {', '.join(above)}."


#: methods that need more training tokens for each pruned weight than this before their rows mean something
NEEDS = {"cast": 0.1, "maskpro": 0.1}


def meaningful(method: str, runs: list[dict]) -> bool:
    """Is the budget one that the method can use?"""
    weights = runs[0]["report"].get("site_parameters", math.inf)
    return method not in NEEDS or runs[0]["tokens"] >= NEEDS[method] * weights


def leaderboard_table() -> str:
    groups = leaderboard_groups()
    if not groups:
        return NONE
    scored = next(r for runs in groups.values() for r in runs if r["zero_shot"])
    tasks = list(scored["zero_shot"])
    text = (
        f"{setting(scored)} (length-normalised where lm-eval has it), ± one standard error of the mean over the tasks;"
        f" {scored['report']['threads']} thread a run, others beside it. {undecided(groups, tasks)} {SECONDS}"
    )
    names = {method for method, tokens in groups if not meaningful(method, groups[method, tokens])}
    if names:
        text += f" Not meaningful at this budget: what {' and '.join(sorted(names))} do needs many more steps (docs/methods.md)."
    earlier = {method: runs[0]["earlier"] for (method, _), runs in groups.items() if runs[0].get("earlier")}
    if earlier:
        told = "; ".join(f"{method}: {why}" for method, why in sorted(earlier.items()))
        text += f" Runs from before the presets of today: {told}."
    rows = []
    order = sorted(groups.items(), key=lambda item: (item[0][1], -test_mean(item[1])))
    for (method, tokens), runs in order:
        average, share = accuracy(runs, tasks)
        swept = f"{rate(runs[0]):g}" if tokens else ""
        name = method if meaningful(method, runs) else f"{method} (not meaningful at this budget)"
        long = steps(runs[0]["report"])
        rows.append((name, f"{tokens:,}", long, swept, *spent(runs), *scores(runs), average, *share))
    columns = (
        "method", "tokens", "steps x tokens", "lr", "seconds", "device", "perplexity", "validation", "seeds", "zero-shot mean", *tasks,
    )  # fmt: skip
    return blocks([(text, table(columns, "lrrrrlrrrr" + "r" * len(tasks), rows))])


def setting(run: dict) -> str:
    documents = next(iter(run["zero_shot"].values()))["documents"]
    return (
        f"{run['model']}, WikiText-2 test perplexity over the first {run['windows']} windows of {run['context']} tokens;"
        f" zero-shot accuracy in % over {documents} documents of each task"
    )


def accuracy(runs: list[dict], tasks: list[str]) -> tuple[str, list[str]]:
    """Of the mean over the tasks, with its standard error; of each task. Empty where no run has tasks."""
    scored = [r["zero_shot"] for r in runs if r["zero_shot"]]
    if not scored:
        return "", [""] * len(tasks)
    share = {t: mean(z[t].get("acc_norm", z[t]["acc"]) for z in scored) for t in tasks}
    errors = [scored[0][t].get("acc_norm_stderr", scored[0][t]["acc_stderr"]) for t in tasks]
    error = sum(e * e for e in errors) ** 0.5 / len(tasks)  # seeds answer the same documents
    return f"{100 * mean(share.values()):.1f} ± {100 * error:.1f}", [f"{100 * share[t]:.0f}" for t in tasks]


def variant_of(run: dict) -> str:
    """What of the ablations a run is."""
    return re.sub(r"^ablation-|-\d+(-seed\d+)?$", "", run["label"])


def ablation_table() -> str:
    _, _, variants = leaderboard_runs()
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for run in variants:
        groups[variant_of(run), run["tokens"]].append(run)
    rows, dirty = [], False
    for (name, tokens), runs in sorted(groups.items(), key=lambda g: (g[0][0].split("-")[0], g[0][1], test_mean(g[1]))):
        flips = [row["flip_rate"] for row in runs[0]["report"]["curves"] if row["flip_rate"]]
        last = f"{100 * flips[-1]:.2f} %" if flips else ""
        commits = ", ".join(dict.fromkeys(r["report"]["commit"] or "" for r in runs))
        dirty |= "+" in commits
        rows.append((name, f"{tokens:,}", *spent(runs), *scores(runs), last, commits))
    columns = (
        "variant", "tokens", "seconds", "device", "perplexity", "validation", "seeds", "mask flips, last update", "commit",
    )  # fmt: skip
    return blocks([(f"{SECONDS} {DIRTY}" if dirty else SECONDS, table(columns, "lrrlrrrrl", rows))]) if rows else NONE


def estimator_quality_table() -> str:
    """Perplexity by what is averaged, over probes."""
    parts = []
    for run in read("estimator_quality"):
        found = run["perplexity"]
        points = sorted({int(p) for row in found.values() for p in row if p != "0"})
        text = (
            f"{run['model']}, probes of {run['batch_size']} x {run['length']} tokens, {run['device']}, commit {run['commit']}; "
            f"dense {found['dense']['0']:.1f}, magnitude {found['magnitude']['0']:,.0f}."
        )
        rows = [
            (name, *(f"{row[str(p)]:,.0f}" if str(p) in row else "" for p in points))
            for name, row in found.items()
            if set(row) != {"0"}
        ]
        parts.append((text, table(("estimate", *(f"{p} probes" for p in points)), "l" + "r" * len(points), rows)))
    return blocks(parts)


def quantized_table() -> str:
    runs = read("quantized")
    if not runs:
        return NONE
    plain = [r for r in read("leaderboard") if r["label"] == f"ablation-alps+kd-plain-{r['tokens']}"]
    floats = {run["tokens"]: run["sparse_perplexity"]["test"] for run in plain}
    rounded = {run["label"]: run["sparse_perplexity"]["test"] for run in runs}
    kinds = {kind for run in runs for kind in (*run["quantized_perplexity"], values_of(run))} - {"float"}
    kinds = sorted(kinds, reverse=True)
    text = (
        f"Perplexity of the WikiText-2 test text, the first {runs[0]['windows']} windows of {runs[0]['context']} tokens. Of a run that"
        " trained with rounded values: in relation to the same run in floats: the one that is rounded here, or alps+kd-plain among the leaderboard's ablations."
    )

    def cell(run: dict, kind: str) -> str:
        if values_of(run) == kind:
            twin = f"{run['label'].replace('-' + kind.replace('/', '-'), '')}-rounded"
            found, before = run["sparse_perplexity"], rounded.get(twin, floats.get(run["tokens"], math.nan))
        else:
            found, before = run["quantized_perplexity"].get(kind), run["sparse_perplexity"]["test"]
        if not found:
            return ""
        tests = [found["test"], *([found["weights"]["test"]] if "weights" in found else [])]
        return "; weights alone ".join(f"{test:.2f} ({100 * (test / before - 1):+.1f} %)" for test in tests)

    rows = [
        (
            run["label"],
            f"{run['tokens']:,}",
            f"{run['sparse_perplexity']['test']:.2f}" if values_of(run) == "float" else "",
            *(cell(run, k) for k in kinds),
            run["report"]["device"],
            run["report"]["commit"],
        )
        for run in runs
    ]
    names = ("run", "training tokens", "not quantised", *kinds, "device", "commit")
    return blocks([(text, table(names, "lrr" + "r" * len(kinds) + "ll", rows))])


def values_of(run: dict) -> str:
    """What the run trained its values in."""
    return run["report"].get("config", {}).get("values", "float")
