"""Tables of the small model: what 2:4 costs against tokens per parameter, and what it costs a mixture of experts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from statistics import mean, stdev
from typing import Any

from budget_runs import BUDGETS, METHODS, Known, chosen, plan
from records import NONE, blocks, read, table

Points = dict[str, dict[float, tuple[list[Mapping[str, Any]], bool]]]


def known() -> Known:
    return {record["label"]: record for record in read("budget")}


def points(found: Known) -> Points:
    """method -> tokens per parameter -> its runs at the best rate, and whether its sweep is over; what there is."""
    out: Points = defaultdict(dict)
    for method in METHODS:
        for budget in BUDGETS:
            runs, settled = chosen(method, budget, found)
            if runs:
                out[method][budget] = runs, settled
    return out


def excess(run: Mapping[str, Any]) -> float:
    """Nats per token of the test text above the dense model."""
    return run["loss"]["test"] - run["dense_loss"]["test"]


def budget_table() -> str:
    found = known()
    there = points(found)
    if not there:
        return NONE
    first = next(iter(found.values()))
    budgets = [budget for budget in BUDGETS if any(budget in row for row in there.values())]
    reports = [run["report"] for run in found.values()]
    begun = "" if not plan(found) else f"; {len(found)} runs are done, others are to come"
    text = (
        f"Test loss above the dense model's in nats per token (dense {first['dense_loss']['test']:.3f}, perplexity"
        f" {math.exp(first['dense_loss']['test']):.2f}; {first['windows']} windows of {first['length']} tokens), {first['parameters']:,}"
        f" parameters; mean ± standard deviation over seeds, (their number), rate and steps; \\* the sweep is not over{begun}."
        f" {', '.join(sorted({r['device'] for r in reports}))}, commit {', '.join(sorted({str(r['commit']) for r in reports}))}."
    )
    rows = [(method, *(cell(row.get(budget)) for budget in budgets)) for method, row in there.items()]
    names = ("method", *(f"{budget:g} tokens per parameter" for budget in budgets))
    spent = [(method, *(seconds(row.get(budget)) for budget in budgets)) for method, row in there.items()]
    return blocks(
        [
            (text, table(names, "l" + "r" * len(budgets), rows)),
            ("Seconds of a run, a layer-wise start included.", table(names, "l" + "r" * len(budgets), spent)),
        ]
    )


def cell(point: tuple[list[Mapping[str, Any]], bool] | None) -> str:
    if point is None:
        return ""
    runs, settled = point
    values = [excess(run) for run in runs]
    spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    mark = "" if settled else " \\*"
    return f"{mean(values):.4f}{spread} ({len(values)}), {runs[0]['lr']:g}, {runs[0]['steps']}{mark}"


def seconds(point: tuple[list[Mapping[str, Any]], bool] | None) -> str:
    return "" if point is None else f"{mean(run['seconds'] for run in point[0]):,.0f}"


def scored_on(run: Mapping[str, Any]) -> str:
    """What the perplexities of a language model are of, and the dense one's of both texts."""
    dense = (f"{run['dense_perplexity'][text]:.2f}" for text in ("test", "valid"))
    return f"perplexity of the first {run['windows']} windows of {run['context']} tokens (dense {' and '.join(dense)})"


def objective_table() -> str:
    """Runs from one start on a language model, by what their loss is made of."""
    runs = sorted(read("objective"), key=lambda run: -run["sparse_perplexity"]["test"])
    if not runs:
        return NONE
    first = next(run for run in runs if run["teacher"] is None)
    report = first["report"]
    text = (
        f"{first['model']}, from one start ({first['method']}, {report['calibration_sequences']} sequences, channels in order,"
        f" blocks that learned for {report['config']['reconstruct']} pass) on with its masks: {scored_on(first)}; seed {report['seed']}, {report['device']}. Seconds while the machine had other work."
    )
    rows = []
    for run in runs:
        said, perplexity = run["report"], run["sparse_perplexity"]
        how = ["none: the start", "", "", "", ""]
        if run["teacher"] is not None:
            loss = said["settings"]["objective"]
            how = [
                *(f"{loss[name]:g}" for name in ("task", "kl", "temperature")),
                f"{run['tokens']:,}",
                f"{said['lr']:g}",
            ]
        scored = [f"{perplexity[text]:.2f}" for text in ("test", "valid")]
        rows.append((*how, f"{said['seconds']:,.0f}", *scored, said["commit"]))
    names = ("cross-entropy", "KL", "temperature", "tokens", "rate", "seconds", "test", "validation", "commit")
    return blocks([(text, table(names, "lrrrrrrrl", rows))])


def continued_table() -> str:
    """How runs go on from one start on a language model: loss, rate, what trains."""
    runs = sorted(read("continued"), key=lambda run: (run["tokens"], -run["sparse_perplexity"]["test"]))
    if not runs:
        return NONE
    first = runs[0]
    text = (
        f"{first['teacher']}, from one start on with its masks: {scored_on(first)}; steps of {first['tokens'] // len(first['report']['curves'])} tokens,"
        f" seed {first['report']['seed']}, {first['report']['device']}."
    )
    rows = []
    for run in runs:
        said, scored = run["report"], run["sparse_perplexity"]
        loss, kl = said["settings"]["objective"], [point["kl"] for point in said["curves"][-30:]]
        how = [f"{loss[name]:g}" for name in ("task", "kl", "temperature")] + [loss.get("features") or ""]
        trains = {"vectors": "", "all": "embedding and head"}[said["config"].get("trainable", "vectors")]
        spent = f"{run['tokens']:,}", f"{said['lr']:g}", f"{mean(kl):.3f}"
        rows.append((trains, *how, *spent, *(f"{scored[text]:.2f}" for text in ("test", "valid")), said["commit"]))
    names = ("trains, too", "cross-entropy", "KL", "temperature", "hidden states", "tokens", "rate", "KL, last 30 steps")
    names += ("test", "validation", "commit")
    return blocks([(text, table(names, "lrrrlrrrrrl", rows))])


def swap_table() -> str:
    """What swaps in a model that is N:M already were predicted to gain, and what they did."""
    parts = []
    for run in read("swap_gains"):
        before = run["before"]["kl"]

        def fell(found: dict, before: float = before) -> str:
            return f"{before - found['kl']:+.6f}"

        singles = run["singles"]
        alone = mean(s["predicted_gain"] for s in singles), mean(before - s["kl"] for s in singles)
        rows = [(f"1, mean of the best {len(singles)}", f"{alone[0]:+.6f}", f"{alone[1]:+.6f}", "", "")]
        for found in run["after"].values():
            swapped = found["swapped"]
            told = (f"{swapped['groups']:,}", f"{swapped['predicted_gain']:+.6f}", fell(swapped))
            rows.append((*told, fell(found["dropped"]), fell(found["smallest"])))
        text = (
            f"{run['label']}: {run['groups']:,} groups, KL {before:.4f} nats per token on {run['windows']} windows of {run['length']}"
            f" tokens; gradients of {'' if not run['task'] else 'cross-entropy and '}KL over {run['sequences']} sequences; a pruned weight's squared mean gradient is"
            f" {run['gradient_over_noise']:.1f} times its noise; {run['paying']:,} groups would pay as they were chosen, and would"
            f" gain {run['chosen_gain']:+.3f} together; {run['judged_gain']:+.3f} by the other half. {run['device']}, commit {run['commit']}."
        )
        names = (
            "groups",
            "swapped: predicted",
            "swapped: KL falls by",
            "the same, dropped alone",
            "the smallest dropped",
        )
        parts.append((text, table(names, "rrrrr", rows)))
    return blocks(parts) if parts else NONE


def mixture_table() -> str:
    """Methods in the order of their perplexities, and what they learned of the experts."""
    runs = sorted(read("mixture"), key=lambda run: -run["sparse_perplexity"]["test"])
    if not runs:
        return NONE
    first = runs[0]
    experts, chosen_of_them = first["experts"]
    text = (
        f"{first['parameters']:,} parameters, {experts} experts a layer of which a token meets {chosen_of_them}, trained on"
        f" {first['trained_on']:,} tokens: the weights of two experts of a layer have a mean cosine of {first['alike']:.2f}. Perplexity of"
        f" {first['windows']} windows of {first['context']} tokens, dense {first['dense_perplexity']['test']:.2f} (test) and"
        f" {first['dense_perplexity']['valid']:.2f} (validation). {', '.join(sorted({run['report']['device'] for run in runs}))}."
    )
    rows = [
        (
            run["label"], f"{run['tokens']:,}", f"{run['seconds']:,.0f}", f"{run['sparse_perplexity']['test']:.2f}",
            f"{run['sparse_perplexity']['valid']:.2f}", *of_experts(run["report"].get("experts", {})), run["report"]["commit"],
        )
        for run in runs
    ]  # fmt: skip
    names = (
        "method", "training tokens", "seconds", "test perplexity", "validation", "calibration tokens an expert saw",
        "error of an expert's outputs", "commit",
    )  # fmt: skip
    return blocks([(text, table(names, "lrrrrrrl", rows))])


def of_experts(stacks: Mapping[str, Mapping[str, list]]) -> tuple[str, str]:
    """The least and the most tokens that an expert saw, and the smallest and the largest error."""
    tokens = [count for stack in stacks.values() for count in stack["tokens"]]
    errors = [error for stack in stacks.values() for error in stack.get("error", ()) if error is not None]
    if not tokens or not errors:
        return "", ""
    return f"{min(tokens):,} to {max(tokens):,}", f"{min(errors):.1%} to {max(errors):.1%}"


def rates_table() -> str:
    """The same run at other learning rates, for each size of a step."""
    groups: dict[int, list[dict]] = {}
    for run in sorted(read("rates"), key=lambda run: run["report"]["lr"]):
        groups.setdefault(run["tokens"] // len(run["report"]["curves"]), []).append(run)
    parts = []
    for tokens, runs in sorted(groups.items()):
        first, report = runs[0], runs[0]["report"]
        calibration = first.get("calibration_sequences", report["calibration_sequences"])
        text = (
            f"{first['teacher'] or first['model']}, {report['preset']}, {first['tokens']:,} tokens in steps of {tokens:,}, {calibration}"
            f" calibration sequences, seed {report['seed']}, {report['device']}: {scored_on(first)}."
        )
        rows = []
        for run in runs:
            kl = [point["kl"] for point in run["report"]["curves"]]
            ends = (f"{sum(part) / len(part):.3f}" for part in (kl[:30], kl[-30:]))
            scored = (f"{run['sparse_perplexity'][name]:.2f}" for name in ("test", "valid"))
            rows.append((f"{run['report']['lr']:g}", *ends, *scored, run["report"]["commit"]))
        names = ("rate", "KL, first 30 steps", "last 30", "test", "validation", "commit")
        parts.append((text, table(names, "rrrrrl", rows)))
    return blocks(parts)


def rotated_table() -> str:
    """The same run in the model's own basis and in another."""
    runs = sorted(read("rotated"), key=lambda run: (run["tokens"], run["rotation"] is not None))
    if not runs:
        return NONE
    first = runs[0]
    report = first["report"]
    text = (
        f"{first['model']}, {report['preset']} at {report['lr']:g},"
        f" seed {report['seed']}, {report['device']}: {scored_on(first)}."
    )
    rows = []
    for run in runs:
        how = ["its own", "", ""]
        if rotation := run["rotation"]:
            (space,) = rotation["spaces"]
            lost = f"{space['lost_before']:.2%} -> {space['lost_after']:.2%}"
            how = [f"rotated, {rotation['steps']} steps: {run['model']}", lost, f"{rotation['seconds']:,.0f}"]
        kl = [point["kl"] for point in run["report"]["curves"]]
        ends = (f"{sum(part) / len(part):.3f}" for part in (kl[:30], kl[-30:]))
        scored = (f"{run['sparse_perplexity'][name]:.2f}" for name in ("test", "valid"))
        of = run["report"]
        start = f"{of['calibration_sequences']} x {of['config']['reconstruct']}"
        rows.append((*how, start, f"{run['tokens']:,}", f"{of['seconds']:,.0f}", *ends, *scored, of["commit"]))
    names = (
        "basis", "readers lose, as predicted", "seconds of it", "sequences of the start x passes of the blocks", "training tokens", "seconds of the run", "KL, first 30 steps", "last 30", "test", "validation",
        "commit",
    )  # fmt: skip
    return blocks([(text, table(names, "lrrrrrrrrrl", rows))])
