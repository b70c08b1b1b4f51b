"""Pictures of a page: matplotlib's SVG, with its colours left to the page, which has a light and a dark form."""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Sequence
from typing import Any

POINTS = 240  # of a line: more than a small picture can show
#: colours that the page's style gives; here they are only names
INK, GRID = "#010101", "#020202"
LINES = ("#030301", "#030302", "#030303", "#030304")
VARIABLES = {INK: "--ink", GRID: "--line"} | {c: f"--line-{i}" for i, c in enumerate(LINES, 1)}
#: what belongs into one picture: title, label of the upright axis, names in a row of the curves
PANELS = (
    ("Loss", "nats per token", ("loss", "task")),
    ("KL from the dense model", "nats per token", ("kl",)),
    ("Temperature and softness", "", ("temperature", "lambda")),
    ("Masks' distance from 0 and 1", "", ("mask_distance_from_binary",)),
    ("Flips", "share of the mask a step", ("flip_rate", "initial_flip_rate")),
    ("Density", "share of weights kept", ("density",)),
    ("Learning rate", "", ("lr",)),
    ("Norm of the gradient", "", ("grad_norm",)),
)
BESIDE = ("step", "tokens", "seconds")  # names of a row that are no curves
Row = dict[str, float]


def thinned(rows: Sequence[Row], points: int = POINTS) -> list[Row]:
    """At most so many rows: means of neighbours, and the last step as it is."""
    if len(rows) <= points:
        return list(rows)
    borders = [round(i * (len(rows) - 1) / (points - 1)) for i in range(points)]
    groups = [rows[a:b] for a, b in itertools.pairwise(borders)]
    means = [{name: sum(row[name] for row in group) / len(group) for name in group[-1]} for group in groups]
    return [*means, rows[-1]]


def curves(rows: Sequence[Row]) -> tuple[list[tuple[str, str]], dict[str, float]]:
    """(title, picture) of every kind of curve that moves, and the values of those that do not."""
    rows = thinned(rows)
    names = [n for n in rows[0] if n not in BESIDE] if rows else []
    constant = {n: rows[0][n] for n in names if len({row[n] for row in rows}) == 1}
    known = {n for _, _, panel in PANELS for n in panel}
    panels = (*PANELS, *((n.replace("_", " ").capitalize(), "", (n,)) for n in names if n not in known))
    found = []
    for title, label, wanted in panels:
        if moving := [n for n in wanted if n in names and n not in constant]:
            lines = {n.replace("_", " "): ([r["step"] for r in rows], [r[n] for r in rows]) for n in moving}
            found.append((title, _lines(title, label, lines)))
    return found, constant


def _lines(title: str, label: str, lines: dict[str, tuple[list[float], list[float]]]) -> str:
    figure, axis = _figure()
    for colour, (name, (steps, values)) in zip(LINES, lines.items(), strict=False):
        axis.plot(steps, values, color=colour, lw=1.6, label=name, marker="o" if len(steps) == 1 else None)
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel(label)
    low, high = (f(f(values) for _, values in lines.values()) for f in (min, max))
    if 0 <= low < high / 2:  # else the line would be a stroke at the upper edge
        axis.set_ylim(bottom=0)
    if len(lines) > 1:
        axis.legend(frameon=False)
    told = "; ".join(f"{name} goes from {v[0]:.4g} to {v[-1]:.4g}" for name, (_, v) in lines.items())
    return _svg(figure, title, f"{title} by step: {told}")


def frontier(points: Sequence[tuple[str, float, float]]) -> str:
    """Perplexity against tokens per second; points are (name, tokens per second, perplexity)."""
    figure, axis = _figure()
    for colour, (name, speed, perplexity) in zip(LINES, points, strict=False):
        axis.plot([speed], [perplexity], "o", color=colour, label=name)
    axis.set_xlabel("tokens per second")
    axis.set_ylabel("perplexity")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    told = "; ".join(f"{name}: {speed:.4g} tokens per second at perplexity {p:.4g}" for name, speed, p in points)
    return _svg(figure, "frontier", f"Perplexity against tokens per second. {told}")


def predicted_frontier(
    line: Sequence[tuple[float, float]], named: Sequence[tuple[str, float, float]], here: tuple[float, float]
) -> str:
    """Predicted loss against the speed-up of the linears: of the best plans (a line), of one format on all linears
    (points with names), and of this run's plan."""
    figure, axis = _figure()
    axis.plot(*zip(*line, strict=True), color=LINES[0], lw=1.6, label="best by these prices")
    axis.plot([p[1] for p in named], [p[2] for p in named], "o", ms=4, color=LINES[1], label="one format everywhere")
    for name, speed, loss in named:
        axis.annotate(name, (speed, loss), (4, 3), textcoords="offset points", fontsize=8, color=INK)
    axis.plot([here[0]], [here[1]], "D", color=LINES[2], label="this run's plan")
    axis.set_xlabel("times as fast as dense, linears alone")
    axis.set_ylabel("predicted loss, nats")
    axis.set_xlim(left=0, right=1.15 * max(speed for speed, _ in [*line, *(p[1:] for p in named), here]))
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
    points = [("this run's plan", *here), *named]
    told = "; ".join(f"{name}: {speed:.3g}x for {loss:.3g} nats" for name, speed, loss in points)
    return _svg(figure, "plans", f"Predicted loss against speed-up. {told}")


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # no pyplot: nothing of the process is touched

    figure = Figure(figsize=(4.2, 2.6), layout="constrained")
    axis = figure.subplots()
    axis.set_facecolor("none")
    axis.grid(color=GRID, lw=0.8)
    axis.tick_params(colors=INK, labelsize=10, length=0)
    axis.xaxis.label.set_color(INK)
    axis.yaxis.label.set_color(INK)
    for side, spine in axis.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=GRID)
    return figure, axis


def _svg(figure: Any, name: str, told: str) -> str:
    """The figure as an element of the page: text as text, no ids but those that it refers to itself."""
    import matplotlib

    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        for axis in figure.axes:
            if (legend := axis.get_legend()) is not None:
                for text in legend.get_texts():
                    text.set_color(INK)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    referred = set(re.findall(r"#([\w-]+)[\")]", text))
    text = re.sub(r'\s+id="([^"]+)"', lambda m: m[0] if m[1] in referred else "", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    told = html.escape(told)
    text = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{told}">', text, count=1)
    return re.sub(r"\n\s*", "\n", text)
