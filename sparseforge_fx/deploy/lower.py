"""``lower``: a 2:4 model as a graph over packed weights, sparse where that was measured to be faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.fx import GraphModule

from sparseforge_fx.capture import capture
from sparseforge_fx.deploy import cost
from sparseforge_fx.deploy.targets import Target, find_target
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.passes import (
    LinearSite,
    PassRecord,
    deploy_passes,
    find_linears,
    merge_parallel_linears,
    run_passes,
)
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.lower_sparse_linears import keep_dense
from sparseforge_fx.program import Program
from sparseforge_fx.report import environment


def lower(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    target: str = "auto",
    batch: Sequence[int] = (1, 8, 64, 2048),
    table: str | Path | cost.Table | None = None,
    gate: bool = True,
) -> GraphModule:
    """The graph of ``model`` with every 2:4 linear that gains from it over its packed weight.

    q/k/v and gate/up become one linear each; bias, activation and silu-mul move into the sparse operator. The model
    given is left as it is.

    Args:
        example_inputs: as for :func:`sparseforge_fx.capture.capture`.
        target: ``cpu``, ``cuda`` or ``auto`` (the device of the weights).
        batch: token counts (batch x sequence) that matter. A weight is sparse if that was measured to be faster at one
            of them by more than 3 %, and slower at none; decoding alone: ``batch=[1, 8]``.
        table: measurements to decide by instead of measuring (what :func:`sparseforge_fx.deploy.cost.save_table`
            wrote); a shape that is not in it stays dense.
        gate: False packs every 2:4 weight, whatever its speed.

    Returns a GraphModule that is called as the model is; ``.report`` has sites, skipped linears with reasons, the cost
    table, bytes of the linears before and after, and ``scratch_bytes``: the largest packed weight in dense form, which
    prefill expands one at a time. Raises SparseForgeError if no weight is 2:4.
    """
    known = cost.check_request(batch, table)
    program = capture(model, example_inputs)
    sites = sparse_sites(program)
    if not eligible(sites):
        reasons = "; ".join(f"{s.fqn}: {s.reason}" for s in sites[:4]) or "the graph has no linear layer"
        raise SparseForgeError(f"nothing to lower: {reasons}; run sparsify first")
    dense_bytes = {s.fqn: s.numel * s.dtype.itemsize for s in eligible(sites)}
    device = program.tensor(eligible(sites)[0].fqn).device
    chosen = find_target(target, device)
    done = lower_program(
        program,
        sparse_sites,
        chosen,
        batch,
        partial(cost.timings, tokens=batch, device=device, target=chosen, known=known) if gate else None,
    )
    program, sites = done.program, done.sites
    module = program.module()
    packed = {s.fqn: _packed_bytes(program, s) for s in eligible(sites)}
    stayed = sum(s.numel * s.dtype.itemsize for s in sites if s.reason and s.reason.startswith("gate: "))
    module.report = {  # type: ignore[assignment]
        "sites": [
            {"name": s.fqn, "out": s.out_features, "in": s.in_features, "bytes": packed[s.fqn]} for s in eligible(sites)
        ],
        "skipped": [{"name": s.fqn, "shape": list(s.shape), "reason": s.reason} for s in sites if s.reason],
        "table": [t.describe() for by_tokens in done.timings.values() for t in by_tokens.values()],
        "batch": list(batch),
        "dense_bytes": sum(dense_bytes.values()),
        "lowered_bytes": sum(packed.values()) + stayed,
        "scratch_bytes": max((s.numel * s.dtype.itemsize for s in eligible(sites)), default=0),
        "passes": [r._asdict() for r in done.records],
        **environment(),
    }
    return module


class Lowered(NamedTuple):
    """What :func:`lower_program` did: the linears of the merged graph, the times that decided, a record per pass."""

    program: Program
    sites: list[LinearSite]
    timings: cost.Table
    records: list[PassRecord]


def lower_program(
    program: Program,
    find: Callable[[Program], list[LinearSite]],
    target: Target,
    batch: Sequence[int],
    measure: Callable[[list[cost.Shape]], cost.Table] | None,
) -> Lowered:
    """Merge the linears that ``find`` gives, pack those that ``measure`` shows to gain (all without it), fuse."""
    program, merging = run_passes(program, [partial(merge_parallel_linears, sites=find(program))])
    sites = find(program)  # again: it is the merged weights that are timed and packed
    timings: cost.Table = {}
    if measure is not None:
        timings = measure([shape_of(s) for s in eligible(sites)])
        for site in eligible(sites):
            against = cost.verdict(timings[shape_of(site)], batch)
            site.reason = against and f"gate: {against}"
    program, packing = run_passes(program, deploy_passes(sites, layout=target.layout, convert=target.convert))
    return Lowered(program, sites, timings, [*merging, *packing])


def sparse_sites(program: Program) -> list[LinearSite]:
    """Every linear, the eligible ones being those whose weight is exactly 2:4, trained or frozen, head or not."""
    return keep_dense(program, find_linears(program, include=["*"]))


def shape_of(site: LinearSite) -> cost.Shape:
    """What the site's cost depends on."""
    return cost.Shape.of(site.out_features, site.in_features, site.dtype)


def _packed_bytes(program: Program, site: LinearSite) -> int:
    return program.tensor(f"{site.fqn}_values").nbytes + program.tensor(f"{site.fqn}_meta").nbytes
