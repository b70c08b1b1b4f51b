"""Write the measured tables into README.md, and the curve's picture, from results/*.json. Nothing is typed by hand.

python examples/benchmarks/tables.py [--check]     (--check: fail if README.md is not what the files say)
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"


def read(folder: str) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted((RESULTS / folder).glob("*.json"))]


def label(run: dict) -> str:
    name = run["method"]
    if name != "sparseforge":
        return name
    report = run["report"]
    changed = f", {run['note']}" if run.get("note") else ""
    return f"sparseforge ({report['preset']} preset{changed})"


def steps(report: dict) -> str:
    """Optimizer steps and tokens of each."""
    if not report.get("curves"):
        return ""
    return f"{len(report['curves'])} x {report['batch_size'] * report['length'] * report['accumulate']:,}"


def quality_table() -> str:
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for run in read("quality"):
        groups[label(run), run["tokens"]].append(run)
    if not groups:
        return "_no runs yet_"
    first = next(iter(groups.values()))[0]
    device = first["report"]["device"]
    lines = [
        f"{first['model']}: WikiText-2 test perplexity, first {first['windows']} windows of {first['context']} tokens"
        f" (dense {first['dense_perplexity']['test']:.2f}); every linear except the head exactly 2:4; {device}.",
        "",
        "| method | training tokens | steps x tokens | calibration sequences | test perplexity | validation | seeds | commit |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for (name, tokens), runs in sorted(
        groups.items(), key=lambda item: -mean(r["sparse_perplexity"]["test"] for r in item[1])
    ):
        test = [r["sparse_perplexity"]["test"] for r in runs]
        valid = mean(r["sparse_perplexity"]["valid"] for r in runs)
        spread = f" ± {stdev(test):.2f}" if len(test) > 1 else ""
        report = runs[0]["report"]
        cells = (
            name, f"{tokens:,}", steps(report), str(report.get("calibration_sequences", 0)), f"{mean(test):.2f}{spread}", f"{valid:.2f}",
            str(len(runs)), report["commit"] or "",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def overhead_table() -> str:
    lines = [
        "| model, device | mode | dense step | heating | with probe | mask update | amortised, K of 150 steps | of 20,000 steps | extra bytes/weight |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    runs = read("training_overhead")
    for run in runs:
        for mode, result in run["modes"].items():
            s = result["median_seconds"]
            extra = sum(run["extra_memory"].values())
            lines.append(
                f"| {run['model']}, {run['device']} | {mode} | {s['dense']:.2f} s | {s['heating'] / s['dense']:.3f}x | {s['probe'] / s['dense']:.3f}x "
                f"| {s['mask_update']:.2f} s | {result['amortised_over_dense_at_150_steps']:.3f}x | {result['amortised_over_dense_at_20000_steps']:.3f}x | {extra:.1f} |"
            )
    return "\n".join(lines) if runs else "_no runs yet_"


def plot() -> None:
    """Perplexity against training tokens, one line per method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    runs = read("quality")
    for run in runs:
        if run["tokens"]:
            series[label(run)].append((run["tokens"], run["sparse_perplexity"]["test"]))
    if not series:
        return
    figure, axis = plt.subplots(figsize=(6.5, 4), constrained_layout=True)
    for name, points in sorted(series.items()):
        tokens = sorted({t for t, _ in points})
        seeds = [[p for t, p in points if t == budget] for budget in tokens]
        (line,) = axis.plot(tokens, [mean(s) for s in seeds], marker="o", label=name)
        axis.fill_between(tokens, [min(s) for s in seeds], [max(s) for s in seeds], color=line.get_color(), alpha=0.25)
    for run in runs:
        if not run["tokens"] and run["method"] != "magnitude":
            axis.axhline(run["sparse_perplexity"]["test"], ls=":", color="gray", label=f"{label(run)}, no training")
    axis.axhline(runs[0]["dense_perplexity"]["test"], ls="--", color="black", label="dense")
    axis.set(xscale="log", yscale="log", xlabel="training tokens", ylabel="WikiText-2 test perplexity")
    budgets = sorted({t for points in series.values() for t, _ in points})
    axis.set_xticks(budgets, [f"{t / 1000:,.0f}k" for t in budgets])
    axis.set_yticks([20, 25, 30, 40, 50, 60, 80, 100], [20, 25, 30, 40, 50, 60, 80, 100])
    axis.minorticks_off()
    axis.set_ylim(top=1.3 * max(p for points in series.values() for _, p in points) + 40)
    axis.legend(frameon=False, fontsize=8, loc="upper right")
    figure.savefig(RESULTS / "quality.png", dpi=130)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, table in (("quality", quality_table()), ("overhead", overhead_table())):
        block = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- /table -->)", re.DOTALL)
        if not block.search(text):
            raise SystemExit(f"README.md has no block <!-- table:{name} -->")
        text = block.sub(lambda m, table=table: m.group(1) + table + "\n" + m.group(2), text)
    if "--check" in sys.argv:
        raise SystemExit(
            0
            if text == readme.read_text()
            else "README.md is not what results/*.json say: run examples/benchmarks/tables.py"
        )
    readme.write_text(text)
    plot()


if __name__ == "__main__":
    main()
