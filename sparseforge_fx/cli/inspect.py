"""``sparseforge-fx inspect``: what would be pruned, and what that is predicted to gain and to cost."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparseforge_fx.cli.app import (
    AsJson,
    Exclude,
    Include,
    Model,
    PatternOption,
    command,
    examples,
    grouped,
    print_json,
    readable_bytes,
    stdout,
)
from sparseforge_fx.errors import SparseForgeError

if TYPE_CHECKING:
    from sparseforge_fx.passes.find_routing import Routing
    from sparseforge_fx.plans import Plan

BF16_BYTES = 2
PLAN_HELP = "A plan (json): the predicted loss and gain of every format that it weighed."
TABLE_HELP = "Times that lower --output wrote on this machine: what each linear gains 2:4."


@command
@examples(
    "inspect HuggingFaceTB/SmolLM2-135M",
    'inspect ./model --exclude "*.down_proj" --pattern 4:8',
    "inspect ./model --plan plan.json --table costs.json --picture linears.svg",
    "inspect ./model --json",
)
def inspect(
    model: Model,
    pattern: PatternOption = "2:4",
    include: Include = [],  # noqa: B006  (typer wants a list and copies it)
    exclude: Exclude = [],  # noqa: B006
    meta: Annotated[bool, typer.Option("--meta/--weights", help="Look at shapes only, or load the weights.")] = True,
    plan: Annotated[Path | None, typer.Option(help=PLAN_HELP)] = None,
    table: Annotated[Path | None, typer.Option(help=TABLE_HELP)] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the linears into this file (.svg).")] = None,
    as_json: AsJson = False,
) -> None:
    """Which linears are eligible, which not and why; bytes dense and sparse. Needs no weights."""
    from sparseforge_fx.files import check_parent
    from sparseforge_fx.pattern import TWO_FOUR, parse_pattern

    shape = parse_pattern(pattern)
    if picture is not None:
        if picture.suffix != ".svg":
            raise SparseForgeError(f"--picture {picture}: name a file that ends in .svg")
        check_parent(picture)
    if table is not None and shape != TWO_FOUR:
        raise SparseForgeError(f"--table has times of 2:4 and not of {shape}: leave out one of the two")
    gains = {} if table is None else _gains(table)
    planned = None if plan is None else _plan(plan)
    console = stdout(quiet=as_json)
    if name := _named(model):
        console.print(f"{model}: {name}; reading its shapes", highlight=False)
    # the answer begins above: importing what reads and traces models takes seconds
    from sparseforge_fx.models.dense import load_dense, load_skeleton
    from sparseforge_fx.plans import planned_formats

    loaded = load_skeleton(model) if meta else load_dense(model)[0]
    parameters = sum(p.numel() for p in loaded.parameters())  # a tied one comes once
    console.print(f"{parameters:,} parameters; tracing its graph", highlight=False)
    from sparseforge_fx.graph.capture import capture
    from sparseforge_fx.passes import find_linears
    from sparseforge_fx.passes.find_routing import find_routing
    from sparseforge_fx.passes.globs import unmatched
    from sparseforge_fx.report import describe_sites

    program = capture(loaded, dynamic=False)
    sites = find_linears(program, shape, include, exclude)
    if planned is not None:
        planned_formats(planned.formats, {s.fqn: s.sides for s in sites})
    found = describe_sites(sites)
    by_name, others = {s.fqn: s for s in sites}, set[str]()
    for site in found["sites"]:
        site["share"] = site["out"] * site["in"] * site.get("experts", 1) / max(1, parameters)
        routing = find_routing(program, by_name[site["name"]])
        if routing is not None:
            site["chosen"] = routing.chosen
        if table is not None:
            timed = gains.get((site["out"], site["in"], routing), {})
            dtype = str(by_name[site["name"]].dtype).removeprefix("torch.")
            site["gain"] = timed.get(dtype) or next(iter(timed.values()), {})
            if timed and dtype not in timed:
                others.add(f"{table} has times in {' and '.join(sorted(timed))}, and the weights are {dtype}")
    factor = shape.density + 1 / 16  # the survivors, and one bit per weight that says where they are
    dense = parameters * BF16_BYTES
    result = {
        "model": model,
        "pattern": str(shape),
        "parameters": parameters,
        "site_parameters": found["site_parameters"],
        "bytes_dense_bf16": dense,
        "bytes_sparse_bf16": round(dense - found["site_parameters"] * BF16_BYTES * (1 - factor)),
        "notes": [*program.notes, *unmatched(loaded, include=include, exclude=exclude), *sorted(others)],
        "sites": found["sites"],
        "skipped": found["skipped"],
        **({} if planned is None else {"plan": planned.describe()["weights"]}),
    }
    if picture is not None:
        _draw(result, factor, picture)
    if as_json:
        print_json(result)
    _print(console, result, factor)
    if planned is not None:
        console.print(_predictions(planned))
    if picture is not None:
        console.print(f"wrote {picture}", highlight=False)


def _plan(file: Path) -> Plan:
    from sparseforge_fx.plans import Plan

    return Plan.read(file)


def _named(model: str) -> str:
    """What the config of a folder calls the model; "" where nothing does."""
    try:
        return str(json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError):
        return ""  # whatever is wrong with it is told where the model is read


def _gains(table: Path) -> dict[tuple[int, int, Routing | None], dict[str, dict[int, float]]]:
    """By (out, in, routing of a stack), dtype and tokens: dense time over that of the fastest layout of 2:4."""
    from sparseforge_fx.deploy.lowering import cost_table
    from sparseforge_fx.formats import SPARSE

    found: dict[tuple[int, int, Routing | None], dict[str, dict[int, float]]] = {}
    for shape, by_layout in cost_table.load_table(table).items():
        if shape.format == SPARSE:
            of = found.setdefault((shape.out_features, shape.in_features, shape.routing), {})
            mine = of.setdefault(shape.dtype, {})
            for rows in by_layout.values():
                for tokens, row in rows.items():
                    mine[tokens] = max(mine.get(tokens, 0.0), row.ratio)
    return found


def _print(console: Console, result: dict[str, Any], factor: float) -> None:
    """The tables of what is eligible and what is not, and the sum."""
    sites, skipped_sites, shape = result["sites"], result["skipped"], result["pattern"]
    counts = sorted({t for s in sites for t in s.get("gain", ())})
    known = any("gain" in s for s in sites)
    table = Table(title=f"{len(sites)} eligible linears", title_justify="left")
    gains = [f"gain at {t}" for t in counts] or (["gain"] if known else [])
    for name in ("weights", "count", "out x in", "parameters", "share", "bf16", shape, *gains):
        table.add_column(name, justify="left" if name == "weights" else "right", overflow="fold")
    for (name, *sizes), group in grouped(sites, lambda s: (s.get("experts", 1), s["out"], s["in"])).items():
        numel = math.prod(sizes) * len(group)
        shown = " x ".join(map(str, sizes[sizes[0] == 1 :]))
        size = numel * BF16_BYTES
        share = f"{sum(s['share'] for s in group):.1%}"
        found = group[0].get("gain", {})
        told = [f"{found[t]:.2f}x" if t in found else "not timed" for t in counts] or (["not timed"] if known else [])
        sizes_told = (readable_bytes(size), readable_bytes(size * factor))
        table.add_row(name, str(len(group)), shown, f"{numel:,}", share, *sizes_told, *told)
    console.print(table)
    if skipped_sites:
        skipped = Table(title=f"{len(skipped_sites)} stay dense", title_justify="left")
        for name in ("weights", "count", "shape", "reason"):
            skipped.add_column(name, justify="right" if name == "count" else "left", overflow="fold")
        for (name, dims, reason), group in grouped(skipped_sites, lambda s: (tuple(s["shape"]), s["reason"])).items():
            skipped.add_row(name, str(len(group)), " x ".join(map(str, dims)), reason)
        console.print(skipped)
    for note in result["notes"]:
        console.print(f"note: {note}")
    parameters, in_sites = result["parameters"], result["site_parameters"]
    share = in_sites / max(1, parameters)
    console.print(f"{parameters:,} parameters, {share:.1%} of them in eligible linears", highlight=False)
    before, after = readable_bytes(result["bytes_dense_bf16"]), readable_bytes(result["bytes_sparse_bf16"])
    console.print(
        f"bf16 {before} dense, {after} with the eligible linears {shape} (values and one bit per weight: {factor:.4g} "
        "of dense)",
        highlight=False,
    )
    dry = shlex.join(["sparseforge-fx", "sparsify", str(result["model"]), "--data", "DATA", "-o", "OUT", "--dry-run"])
    console.print(f"time and memory of a run on this machine: {dry}", highlight=False)


def _predictions(plan: Plan) -> Table:
    """Loss in nats, and gain over dense at the plan's token counts, of each format that was weighed."""
    from sparseforge_fx.formats import DENSE

    formats = list(dict.fromkeys(form for w in plan.weights for form in w.prices))
    table = Table(title="the plan's predictions: nats lost, times as fast as dense", title_justify="left")
    for name in ("weights", "count", "chosen", *map(str, formats)):
        table.add_column(name, justify="left" if name in ("weights", "chosen") else "right", overflow="fold")
    rows = [{"name": w.name, "weight": w} for w in plan.weights]
    for (name, chosen), group in grouped(rows, lambda r: (str(r["weight"].format),)).items():
        cells = []
        for form in formats:
            prices = [(w.prices[DENSE], w.prices[form]) for r in group if form in (w := r["weight"]).prices]
            if not prices:
                cells.append("")
                continue
            gains = (
                sum(d.microseconds[t] for d, _ in prices) / max(1e-9, sum(p.microseconds[t] for _, p in prices))
                for t in plan.tokens
            )
            cells.append(f"{sum(p.loss for _, p in prices):+.4f}, {' '.join(f'{g:.2f}x' for g in gains)}")
        table.add_row(name, str(len(group)), chosen, *cells)
    return table


def _draw(result: dict[str, Any], factor: float, picture: Path) -> None:
    from sparseforge_fx.files import new_file
    from sparseforge_fx.page.linears import draw

    bars = []
    for (name, *sizes), group in grouped(result["sites"], lambda s: (s.get("experts", 1), s["out"], s["in"])).items():
        size = math.prod(sizes) * len(group) * BF16_BYTES
        gain = ", ".join(f"{g:.2f}x at {t}" for t, g in sorted(group[0].get("gain", {}).items()))
        bars.append((f"{name} ({len(group)})", size / 1e6, size * factor / 1e6, gain))
    for (name, dims, reason), group in grouped(result["skipped"], lambda s: (tuple(s["shape"]), s["reason"])).items():
        size = math.prod(dims) * len(group) * BF16_BYTES / 1e6
        bars.append((f"{name} ({len(group)})", size, size, f"stays dense: {reason}"))
    with new_file(picture) as file:
        file.write_text(draw(bars, result["pattern"]), encoding="utf-8")
