"""What a run's files say, in the words and tables of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparseforge_fx.evaluation.zero_shot import main_metric
from sparseforge_fx.page.layers import Heat, of_formats, of_numbers, tables
from sparseforge_fx.page.texts import paired_text, with_error
from sparseforge_fx.plans import Plan
from sparseforge_fx.report import readable_sides

Json = Mapping[str, Any]
#: of a weight in ``report["layers"]``: title, sentence, how a number is shown, whether its colour is of its logarithm
KINDS = {
    "error": (
        "Error of the layer-wise start",
        "Squared error of the layer's outputs on the calibration text, as a share of their square, before training.",
        "{:.1%}",
        False,
    ),
    "kept": (
        "What the masks kept",
        "Share of the dense weight's squared size that lies where weights are left.",
        "{:.0%}",
        False,
    ),
    "moved": (
        "How far weights moved",
        "Distance from the dense weight over that weight's size, pruned entries included.",
        "{:.2f}",
        False,
    ),
    "curvature": (
        "Curvature",
        "Mean of the estimate that scored the weights, when the masks became final; colours by its logarithm.",
        "{:.1e}",
        True,
    ),
}


@dataclass
class Table:
    """``head`` and rows of text; ``numbers`` are the columns that are set to the right."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()


@dataclass
class Maps:
    """Heat maps of one kind of value."""

    title: str
    told: str
    tables: list[Heat] = field(default_factory=list)


def title(report: Json) -> str:
    model = str((report.get("recipe") or {}).get("model") or "A model").rstrip("/")
    return f"{model.rpartition('/')[2]}, {report.get('pattern')} sparse"


def sentence(report: Json) -> str:
    """What was done."""
    preset = f" ({report['preset']})" if report.get("preset") else ""
    text = f"{len(report['sites'])} linears with {report.get('site_parameters', 0):,} weights were made "
    text += f"{report['pattern']} sparse by {report['method']}{preset}"
    if curves := report.get("curves"):
        text += f", trained on {report['tokens']:,} tokens in {len(curves)} steps"
    elif report.get("calibration_sequences"):
        text += f", layer by layer on {report['calibration_sequences']} sequences"
    if "seconds" in report:
        text += f"; that took {duration(report['seconds'])} on {report.get('device', 'this machine')}"
    return text + "."


def key_numbers(report: Json, quality: Json, speed: Json) -> list[tuple[str, str, str]]:
    """(name, value, what it means) of the numbers that matter, as far as they were measured."""
    found: list[tuple[str, str, str]] = []

    def add(name: str, value: str, told: str) -> None:
        found.append((name, value, told))

    by_role = quality.get("perplexity") or {}
    if {"dense", "model"} <= set(by_role):
        dense, sparse = (by_role[role]["perplexity"] for role in ("dense", "model"))
        add("perplexity", f"{dense:.4g} → {sparse:.4g}", f"dense and sparse, {last_part(quality.get('data'))}")
    for rows, models in (speed.get("batches") or {}).items():
        packed = models["packed"]
        told = f"packed, {packed['ratio']:.2f} times the dense model"
        add(f"tokens/s, batch {rows}", f"{packed['tokens_per_second']:.4g}", told)
    if densities := list((report.get("density") or {}).values()):
        low, high = f"{min(densities):.1%}", f"{max(densities):.1%}"
        add("weights left", low if low == high else f"{low} to {high}", "of each sparse linear")
    if curves := report.get("curves"):
        told = "nats per token, first and last step"
        add("training loss", f"{curves[0]['loss']:.3f} → {curves[-1]['loss']:.3f}", told)
        if seconds := sum(row.get("seconds", 0) for row in curves):
            add("training speed", f"{report['tokens'] / seconds:,.0f}", "tokens per second")
    if "seconds" in report:
        add("time", duration(report["seconds"]), "for the whole run")
    if "peak_memory_bytes" in report:
        add("peak memory", f"{report['peak_memory_bytes'] / 1e9:.2f} GB", "of the run")
    return found


def last_part(path: Any) -> str:
    """Of the path of a file its name: who gets the page does not have the folder."""
    return str(path).rstrip("/").rpartition("/")[2] if str(path).startswith((".", "/")) else str(path)


def duration(seconds: float) -> str:
    """``75`` -> ``1 min 15 s``."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def quality_tables(quality: Json) -> list[Table]:
    """Perplexity and tasks, dense beside sparse, with standard errors."""
    found: list[Table] = []
    rows: list[Sequence[str]]
    head: Sequence[str]
    names = {role: last_part(quality.get(role) or role) for role in ("dense", "model")}
    if by_role := quality.get("perplexity"):
        rows = []
        for role, p in by_role.items():
            error = p.get("stderr")
            perplexity = with_error(p["perplexity"], error and p["perplexity"] * error, "{:.4g}")
            scored = f"{p['tokens_scored']:,} in {p['windows']:,} windows of {p['context']:,}"
            rows.append((names[role], perplexity, with_error(p["nll_per_token"], error, "{:.4f}"), scored))
        head = ("model", "perplexity", "nats per token", "tokens scored")
        found.append(Table(f"Perplexity of {last_part(quality.get('data'))}", head, rows, (1, 2)))
    if tasks := quality.get("zero_shot"):
        paired = quality.get("paired_tasks") or {}
        rows = []
        for task, numbers in next(iter(tasks.values())).items():
            kind = main_metric(numbers)
            each = [of_one[task] for of_one in tasks.values()]
            cells = [with_error(100 * n[kind], 100 * n.get(f"{kind}_stderr", math.nan), "{:.1f}") for n in each]
            last = [paired_text(paired.get(task))] if paired else []
            rows.append((task, *cells, f"{numbers['documents']:,}", *last))
        head = ("task", *(names[role] for role in tasks), "documents", *(["difference"] if paired else []))
        found.append(Table("Zero-shot accuracy, %", head, rows, range(1, len(head))))
    return found


def paired_sentence(quality: Json) -> str | None:
    """Whether the difference in perplexity is one."""
    test = quality.get("paired")
    if not test:
        return None
    gap = f"{test['difference']:+.4f} ± {test['stderr']:.4f} nats per token"
    pairs = f"in pairs over {test['pairs']:,} windows (p = {test['p']:.2g})"
    return f"The sparse model is {gap} from the dense one, {pairs}."


def layer_maps(report: Json, plan: Plan | None) -> list[Maps]:
    """A heat map for every kind of value that the report has of its weights."""
    found = []
    layers = report.get("layers") or {}
    for kind, (name, told, shown, log) in KINDS.items():
        if values := {fqn: v[kind] for fqn, v in layers.items() if v.get(kind) is not None}:
            found.append(Maps(name, told, tables(of_numbers(values, shown, log=log))))
    densities = report.get("density") or {}
    if len({f"{d:.4f}" for d in densities.values()}) > 1:
        cells = of_numbers(densities, "{:.1%}")
        found.append(Maps("Weights left", "Share of entries that are not zero.", tables(cells)))
    if plan is not None:
        bits = {w.name: w.format.bits(w.shape[1], 16) for w in plan.weights}
        cells = of_formats(plan.formats, bits)
        found.append(Maps("Formats of the plan", "Deeper colours are fewer bits.", tables(cells)))
        losses = {w.name: w.price.loss for w in plan.weights if w.price.loss == w.price.loss}
        if any(losses.values()):
            told = "Nats that the plan expects each weight's format to cost."
            found.append(Maps("Predicted loss", told, tables(of_numbers(losses, "{:.2g}"))))
    return found


def block_tables(report: Json) -> list[Table]:
    """What the blocks of a layer-wise solution learned, where they did."""
    caption = "Error of what each block hands on, before and after it learned"
    kinds = {"reconstruction": caption, "rounded_reconstruction": f"{caption} with its rounded weights"}
    return [
        Table(
            told,
            ("block", "before", "after"),
            [(b["block"], f"{b['before']:.2%}", f"{b['after']:.2%}") for b in report[name]],
            (1, 2),
        )
        for name, told in kinds.items()
        if report.get(name)
    ]


def speed_tables(speed: Json, costs: Sequence[Json], plan: Plan | None) -> list[Table]:
    """Tokens per second of the model, and microseconds of its weights."""
    found: list[Table] = []
    rows: list[Sequence[str]]
    head: Sequence[str]
    if batches := speed.get("batches"):
        rows = []
        for count, models in batches.items():
            for name, m in models.items():
                quartiles = " to ".join(f"{q:.1f}" for q in m["quartiles"])
                rows.append((str(count), name, f"{m['tokens_per_second']:.1f}", quartiles, f"{m['ratio']:.2f}x"))
        head = ("batch", "model", "tokens/s", "quartiles", "over dense")
        found.append(Table("Tokens per second", head, rows, (0, 2, 3, 4)))
    if costs:
        rows = []
        for r in costs:
            times = f"{r['dense_us']:.1f}", f"{r['packed_us']:.1f}", f"{r['ratio']:.2f}x"
            rows.append((readable_sides(r), r["format"], r["layout"], str(r["tokens"]), *times))
        head = ("out x in", "format", "layout", "tokens", "dense µs", "packed µs", "dense over packed")
        found.append(Table("Each shape of weight, timed on this machine", head, rows, (3, 4, 5, 6)))
    if plan is not None:
        rows = [(str(t), f"{gain:.2f}x") for t, gain in plan.speedups.items()]
        where = plan.machine or "another machine"
        head = ("tokens", "over dense")
        found.append(Table(f"All linears in the plan's formats, on {where}", head, rows, (0, 1)))
    return found


def skipped(report: Json) -> Table:
    rows = [(s["name"], " x ".join(map(str, s["shape"])), s["reason"]) for s in report["skipped"]]
    caption = "1 weight stays dense" if len(rows) == 1 else f"{len(rows)} weights stay dense"
    return Table(caption, ("weight", "shape", "why"), rows)
