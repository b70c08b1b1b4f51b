"""Draw the graph of a gated MLP before and after each pass, from the real graphs: docs/graphs/*.svg.

python examples/benchmarks/graphs.py
"""

from __future__ import annotations

import io
import operator
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn
from torch.fx import Node

from sparseforge_fx.graph.capture import capture
from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.layouts import ROWS
from sparseforge_fx.passes import Pass, deploy_passes, export_passes, find_linears, harden_passes, train_passes
from sparseforge_fx.pattern import TWO_FOUR

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "graphs"
SAME, GONE, NEW = "#eceef2", "#f6d5bd", "#c9dcf2"


class GatedMLP(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.after = nn.LayerNorm(width)  # so that `down` is no output layer, which stays dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return self.after(x + self.down(F.silu(self.gate(h)) * self.up(h)))


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, before, after in steps():
        text = draw(name, before, after)
        (FOLDER / f"{name}.svg").write_text(text, encoding="utf-8")


def steps() -> list[tuple[str, list[tuple[Any, ...]], list[tuple[Any, ...]]]]:
    """(pass, lines of the graph before it, and after it) of every pass, in the order of the product's lists."""
    torch.manual_seed(0)
    program = capture(GatedMLP(), torch.randn(2, 32))
    sites = find_linears(program)
    found: list[tuple[str, list, list]] = []

    def run(start: Program, passes: list[Pass]) -> Program:
        for one in passes:
            before = lines(start)
            start = one(start.copy()).program
            start.validate()
            found.append((getattr(one, "func", one).__name__, before, lines(start)))  # type: ignore[attr-defined]
        return start

    trained = run(program, train_passes(sites, slorb_block=16, estimator="gauss_newton"))
    run(trained, harden_passes(TWO_FOUR))
    # what is deployed below has neither branches nor probes
    plain = train_passes(sites)[0](program.copy()).program
    exact = harden_passes(TWO_FOUR)[0](plain).program
    run(exact, deploy_passes(find_linears, _all_in_rows))
    unfused = exact
    for one in deploy_passes(find_linears, _all_in_rows, fuse=False):
        unfused = one(unfused.copy()).program
    run(unfused, export_passes())
    return found


def _all_in_rows(sites: Any) -> dict[str, Any]:
    return {s.fqn: ROWS for s in sites if s.reason is None}


def lines(program: Program) -> list[tuple[Any, ...]]:
    """(name, text, text without what other lines are called, names of the lines that it reads) of every operator, in
    order."""
    names = {node: fqn for node, fqn, _ in program.lifted()}
    out = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        target = "item" if node.target is operator.getitem else str(node.target).removesuffix(".default")
        target = target.removeprefix("aten.")
        reads = tuple(n.name for n in node.all_input_nodes if n.op == "call_function")
        texts = []
        for known in (names, names | {n: "" for n in node.all_input_nodes if n.op == "call_function"}):
            told = [_told(a, known) for a in node.args]
            texts.append(f"{target}({', '.join(filter(None, told))})")
        out.append((node.name, *texts, reads))
    return out


def _told(argument: Any, names: dict[Node, str]) -> str:
    if isinstance(argument, Node):
        return names.get(argument, argument.name)
    if isinstance(argument, list | tuple):
        return "[" + ", ".join(_told(a, names) for a in argument) + "]"
    return "" if argument is None else str(argument)


def draw(title: str, before: list[tuple[Any, ...]], after: list[tuple[Any, ...]]) -> str:
    rows = max(len(before), len(after))
    figure = Figure(figsize=(13, 0.9 + 0.4 * rows), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, mine, other, colour, said in (
        (left, before, after, GONE, "before"),
        (right, after, before, NEW, "after"),
    ):
        column(axis, mine, {key for _, _, key, _ in other}, colour)
        axis.set(xlim=(-1.6, 10), ylim=(rows - 0.4, -0.7), title=f"{said} {title}")
        axis.set_axis_off()
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "monospace"}):
        figure.savefig(written, format="svg", metadata={"Date": None}, facecolor="white")
    return written.getvalue()


def column(axis: Axes, mine: list[tuple[Any, ...]], other: set[str], colour: str) -> None:
    """One line for every operator, and an arc from each that it reads."""
    places = {name: i for i, (name, *_) in enumerate(mine)}
    for name, text, key, reads in mine:
        box = {"boxstyle": "round,pad=0.3", "facecolor": SAME if key in other else colour, "edgecolor": "none"}
        shown = text if len(text) < 64 else text[:61] + "..."
        axis.text(0, places[name], shown, va="center", fontsize=8.5, family="monospace", bbox=box)
        for read in reads:
            bend = {"arrowstyle": "-|>", "color": "#8a8f99", "connectionstyle": "arc3,rad=0.45", "lw": 0.9}
            axis.annotate("", (-0.1, places[name]), (-0.1, places[read]), arrowprops=bend)


if __name__ == "__main__":
    main()
