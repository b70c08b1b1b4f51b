"""``sparseforge-fx inspect``: what would be pruned."""

from __future__ import annotations

import json
import math
from typing import Annotated

import typer
from rich.table import Table

from sparseforge_fx.cli.app import (
    Exclude,
    Include,
    Model,
    PatternOption,
    command,
    grouped,
    readable_bytes,
    stdout,
)

BF16_BYTES = 2


@command
def inspect(
    model: Model,
    pattern: PatternOption = "2:4",
    include: Include = [],  # noqa: B006  (typer wants a list and copies it)
    exclude: Exclude = [],  # noqa: B006
    meta: Annotated[bool, typer.Option("--meta/--weights", help="Look at shapes only, or load the weights.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print every linear as json.")] = False,
) -> None:
    """Which linears are eligible, which not and why; bytes dense and sparse. Needs no weights."""
    from sparseforge_fx.graph.capture import capture
    from sparseforge_fx.models.dense import load_dense, load_skeleton
    from sparseforge_fx.passes import find_linears
    from sparseforge_fx.pattern import parse_pattern
    from sparseforge_fx.report import describe_sites

    shape = parse_pattern(pattern)
    loaded = load_skeleton(model) if meta else load_dense(model)[0]
    program = capture(loaded, dynamic=False)
    sites = find_linears(program, shape, include, exclude)
    found = describe_sites(sites)
    parameters = sum(p.numel() for p in loaded.parameters())  # a tied one comes once
    in_sites = found["site_parameters"]
    factor = shape.density + 1 / 16  # the survivors, and one bit per weight that says where they are
    dense = parameters * BF16_BYTES
    result = {
        "model": model,
        "pattern": str(shape),
        "parameters": parameters,
        "site_parameters": in_sites,
        "bytes_dense_bf16": dense,
        "bytes_sparse_bf16": round(dense - in_sites * BF16_BYTES * (1 - factor)),
        "notes": list(program.notes),
        "sites": found["sites"],
        "skipped": found["skipped"],
    }
    if as_json:
        print(json.dumps(result, indent=1))
        return
    console = stdout()
    table = Table(title=f"{model}: {len(found['sites'])} eligible linears", title_justify="left")
    for name in ("weights", "count", "out x in", "parameters", "bf16", str(shape)):
        table.add_column(name, justify="left" if name == "weights" else "right", overflow="fold")
    for (name, *sizes), group in grouped(found["sites"], lambda s: (s.get("experts", 1), s["out"], s["in"])).items():
        numel = math.prod(sizes) * len(group)
        shown = " x ".join(map(str, sizes[sizes[0] == 1 :]))
        size = numel * BF16_BYTES
        table.add_row(name, str(len(group)), shown, f"{numel:,}", readable_bytes(size), readable_bytes(size * factor))
    console.print(table)
    if found["skipped"]:
        skipped = Table(title=f"{len(found['skipped'])} stay dense", title_justify="left")
        for name in ("weights", "count", "shape", "reason"):
            skipped.add_column(name, justify="right" if name == "count" else "left", overflow="fold")
        for (name, size, reason), group in grouped(
            found["skipped"], lambda s: (tuple(s["shape"]), s["reason"])
        ).items():
            skipped.add_row(name, str(len(group)), " x ".join(map(str, size)), reason)
        console.print(skipped)
    for note in program.notes:
        console.print(f"note: {note}", markup=False)
    share = in_sites / max(1, parameters)
    console.print(f"{parameters:,} parameters, {share:.1%} of them in eligible linears", highlight=False)
    console.print(
        f"bf16 {readable_bytes(dense)} dense, {readable_bytes(result['bytes_sparse_bf16'])} with the eligible linears "
        f"{shape} (values and one bit per weight: {factor:.4g} of dense)",
        highlight=False,
    )
