"""Draw the pictures of the README from the json files.

    python examples/benchmarks/plots.py

results/perplexity.png: perplexity against training tokens, one line per method, a band over seeds.
results/frontier.png: perplexity against tokens per second, what is dominated hollow.
results/budget.png: test loss above dense against tokens per parameter, one line per method, a bar over seeds.
results/kernels.png: what a packed linear gains over the dense one against the number of tokens, one line per weight.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping
from statistics import mean, stdev

import matplotlib
from budget_tables import excess, known
from budget_tables import points as budget_points
from frontier_tables import batches, dominators
from quality_tables import label, leaderboard_runs, variant_of
from records import RESULTS, read
from speed_tables import cpu_runs

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.transforms import Bbox

YTICKS = [20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 300, 500, 1000, 2000, 3000]


def name(run: dict) -> str:
    config = run["report"].get("config", {})
    if run["method"] == "sparseforge" and run["report"]["preset"] == "alps+kd" and config["start"] != "alps":
        return f"{config['start']} mask, distilled"
    return label(run)


def main() -> None:
    draw_perplexity()
    draw_kernels()
    draw_frontier()
    draw_budget()


def draw_perplexity() -> None:
    full, best, variants = leaderboard_runs()
    runs = full + list(best.values()) + [r for r in variants if variant_of(r) in ("annealed", "alps+kd")]
    known = {(name(r), r["tokens"]) for r in runs}
    runs += [r for r in read("quality") if (name(r), r["tokens"]) not in known]
    series: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        series[name(run)][run["tokens"]].append(run["sparse_perplexity"]["test"])
    figure, axis = plt.subplots(figsize=(7.5, 5), constrained_layout=True)
    trained = {k: v for k, v in series.items() if any(v)}
    tab20 = plt.colormaps["tab20"].colors  # type: ignore[attr-defined]
    axis.set_prop_cycle(color=[*tab20[1::2], *tab20[::2]][-len(trained) :])  # no colour twice, strong ones for the best
    for method in sorted(trained, key=lambda m: -mean(trained[m][max(trained[m])])):
        budgets = sorted(trained[method])
        seeds = [trained[method][b] for b in budgets]
        (line,) = axis.plot(budgets, [mean(s) for s in seeds], marker="o", label=method)
        axis.fill_between(budgets, [min(s) for s in seeds], [max(s) for s in seeds], color=line.get_color(), alpha=0.25)
    for method, points in series.items():
        if 0 in points and method not in ("dense", "magnitude"):
            axis.axhline(mean(points[0]), ls=":", color="gray", lw=1)
            axis.annotate(f"{method}, no training", (1.0, mean(points[0])), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", fontsize=7, color="gray")  # fmt: skip
    axis.axhline(runs[0]["dense_perplexity"]["test"], ls="--", color="black", label="dense")
    axis.set(xscale="log", yscale="log", xlabel="training tokens", ylabel="WikiText-2 test perplexity")
    budgets = sorted({b for points in trained.values() for b in points})
    axis.set_xticks(budgets, [f"{b / 1e6:.1f}M" if b >= 1e6 else f"{b / 1000:,.0f}k" for b in budgets])
    low, high = axis.get_ylim()
    ticks = [t for t in YTICKS if low <= t <= high]
    axis.set_yticks(ticks, ticks)
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(RESULTS / "perplexity.png", dpi=130)


def draw_kernels() -> None:
    """One panel per device and dtype; on a CPU at the most threads that were measured."""
    panels: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for run in cpu_runs(few_rows=True):
        most = max(case["threads"] for case in run["cases"])
        for case in run["cases"]:
            if case["threads"] == most:
                title = f"{run['device']} ({run['instruction_set']}), {most} threads, {case['dtype']}"
                panels[title][f"{case['out']} x {case['in']}"][case["rows"]] = case["median_of_ratios"]
    for run in (run for run in read("kernels") if "cases" not in run):
        for row in run["rows"]:  # of a GPU: the best that is not dense
            gains = [
                r["over_dense"] for n, r in row["results"].items() if r.get("over_dense") and not n.startswith("dense")
            ]
            if gains:
                panels[run["device"]][f"{row['out']} x {row['in']}"][row["m"]] = max(gains)
    if not panels:
        return
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.2), sharey=True, constrained_layout=True, squeeze=False
    )
    for axis, (title, lines) in zip(axes[0], sorted(panels.items()), strict=True):
        for shape, gains in lines.items():
            large = min(map(int, shape.split(" x "))) >= 2048
            style = {"marker": "o", "ms": 4} if large else {"ls": ":", "lw": 1.2}
            axis.plot(list(gains), list(gains.values()), label=shape, **style)
        axis.axhline(1, color="black", ls="--", lw=1)
        rows = sorted({m for gains in lines.values() for m in gains})
        axis.set(xscale="log", xlabel="tokens", title=title)
        axis.set_xticks(rows, rows)
        axis.minorticks_off()
        axis.title.set_fontsize(9)
    axes[0][0].set(ylabel="time dense / packed")
    axes[0][0].set_ylim(bottom=0)
    axes[0][-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(RESULTS / "kernels.png", dpi=110)


def draw_frontier() -> None:
    """One panel per batch; the size of a point grows with its bytes."""
    points = read("frontier")
    if not points:
        return
    counts, beaten = batches(points), dominators(points)
    figure, axes = plt.subplots(1, len(counts), figsize=(6 * len(counts), 4.5), constrained_layout=True, squeeze=False)
    for axis, count in zip(axes[0], counts, strict=True):
        for point in points:
            place = point["tokens_per_second"][count], point["perplexity"]
            color = "tab:orange" if point["runtime"] == "llama.cpp" else "tab:blue"
            face = "none" if beaten[point["name"]] else color
            axis.scatter(*place, s=point["bytes"] / 1e6, facecolors=face, edgecolors=color)
        axis.set(xlabel=f"tokens per second, batch {count}", ylabel="WikiText-2 test perplexity", yscale="log")
        axis.margins(x=0.14, y=0.1)
        low, high = axis.get_ylim()
        ticks = [t for t in YTICKS if low <= t <= high]
        axis.set_yticks(ticks, ticks)
        axis.minorticks_off()
    figure.canvas.draw()
    figure.set_layout_engine("none")  # places are final from here on
    for axis, count in zip(axes[0], counts, strict=True):
        name_points(axis, {p["name"]: (p["tokens_per_second"][count], p["perplexity"]) for p in points})
    figure.savefig(RESULTS / "frontier.png", dpi=110)


def name_points(axis: Axes, places: Mapping[str, tuple[float, float]]) -> None:
    """Names beside their points, as near as they do not cover one another or a point."""
    at = {name: axis.transData.transform(place) for name, place in places.items()}
    taken = [Bbox.from_extents(*(xy - 6), *(xy + 6)) for xy in at.values()]
    for name, place in sorted(places.items(), key=lambda item: (item[1][1], item[0])):
        for radius, turn in itertools.product(range(12, 100, 8), range(0, 360, 30)):
            x, y = radius * math.cos(math.radians(turn)), radius * math.sin(math.radians(turn))
            how = {"ha": "left" if x > 0 else "right", "va": "center", "textcoords": "offset points"}
            arrow = {"arrowstyle": "-", "lw": 0.4, "color": "gray"}
            text = axis.annotate(name, place, fontsize=7, xytext=(x, y), arrowprops=arrow, **how)
            text.update_positions(axis.figure.canvas.get_renderer())  # type: ignore[union-attr]
            box = Text.get_window_extent(text).padded(1)  # without the line to the point
            inside = axis.bbox.contains(box.x0, box.y0) and axis.bbox.contains(box.x1, box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def draw_budget() -> None:
    """Points whose sweep is not over are hollow. Beside zero the axis is linear: the control is below it."""
    lines = budget_points(known())
    if not lines:
        return
    figure, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
    for number, (method, line) in enumerate(lines.items()):
        values = [[excess(run) for run in runs] for runs, _ in line.values()]
        color = plt.get_cmap("tab20")(number % 20)
        spread = [stdev(v) if len(v) > 1 else 0.0 for v in values]
        axis.errorbar(list(line), [mean(v) for v in values], spread, color=color, capsize=2, label=method)
        for (budget, (_, settled)), v in zip(line.items(), values, strict=True):
            axis.plot(budget, mean(v), marker="o", ms=5, color=color, mfc=color if settled else "none")
    axis.axhline(0, color="black", ls="--", lw=1)
    axis.set(xscale="log", xlabel="training tokens per parameter", ylabel="test loss above dense, nats per token")
    axis.set_yscale("symlog", linthresh=0.02)
    budgets = sorted({budget for line in lines.values() for budget in line})
    axis.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
    ticks = [
        t
        for t in (-0.02, -0.01, 0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
        if axis.get_ylim()[0] <= t <= axis.get_ylim()[1]
    ]
    axis.set_yticks(ticks, ticks)
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(RESULTS / "budget.png", dpi=130)


if __name__ == "__main__":
    main()
