"""``lower``: a 2:4 model as a graph over packed weights, sparse where that was measured to be faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.fx import GraphModule

from sparseforge_fx.deploy.lowering import cost
from sparseforge_fx.deploy.lowering.targets import find_target
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.layouts import LAYOUTS, Layout
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.passes import (
    LinearSite,
    PassRecord,
    deploy_passes,
    expand_sparse_linears,
    find_linears,
    merge_parallel_linears,
    run_passes,
)
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.lower_sparse_linears import keep_dense
from sparseforge_fx.passes.rewrite import sparse_use
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
            of them by more than 3 %, and slower at none; decoding alone: ``batch=[1, 8]``. Where a device has several
            packed layouts, each weight gets the one that gains most.
        table: measurements to decide by instead of measuring (what :func:`sparseforge_fx.deploy.cost.save_table`
            wrote); a shape that is not in it stays dense.
        gate: False packs every 2:4 weight, whatever its speed.

    Returns a GraphModule that is called as the model is; ``.report`` has sites, skipped linears with reasons, the cost
    table, bytes of the linears before and after, and ``scratch_bytes``: the largest packed weight in dense form, which
    prefill expands one at a time. Raises SparseForgeError if no weight is 2:4.
    """
    program, report = lower_captured(capture(model, example_inputs), target=target, batch=batch, table=table, gate=gate)
    module = program.module()
    module.report = report  # type: ignore[assignment]
    return module


def lower_captured(
    program: Exported,
    *,
    target: str = "auto",
    batch: Sequence[int] = (1, 8, 64, 2048),
    table: str | Path | cost.Table | None = None,
    gate: bool = True,
    portable: bool = False,
    durable: bool = False,
) -> tuple[Exported, dict[str, Any]]:
    """:func:`lower` from a captured program to a program and the report. Linears that are packed already stay so.

    Args:
        portable: packed weights are expanded by plain aten operators, which is never faster: nothing is timed, and
            every 2:4 weight is packed.
        durable: the program goes to a file: only layouts that later versions of the libraries read, too.
    """
    known = cost.check_request(batch, table)
    sites = sparse_sites(program)
    before = packed_weights(program)
    if not eligible(sites) and not before:
        reasons = "; ".join(f"{s.fqn}: {s.reason}" for s in sites[:4]) or "the graph has no linear layer"
        raise SparseForgeError(f"nothing to lower: {reasons}; run sparsify first")
    device = (program.tensor(eligible(sites)[0].fqn) if eligible(sites) else next(iter(program.state.values()))).device
    layouts = [layout for layout in find_target(target, device) if layout.durable or not durable]
    for name, weight in before.items():
        if durable and not LAYOUTS[weight["layout"]].durable:
            raise SparseForgeError(f"no file may hold the layout {weight['layout']} of {name}: export the dense model")
    dense_bytes = sum(s.numel * s.dtype.itemsize for s in eligible(sites)) + sum(w["dense"] for w in before.values())
    measure = partial(cost.timings, tokens=batch, device=device, layouts=layouts, known=known)
    done = pack_linears(program, sparse_sites, layouts, batch, measure if gate and not portable else None, not portable)
    program, records, packed = done.program, done.records, packed_weights(done.program)
    if portable:
        program, expanding = run_passes(program, [expand_sparse_linears])
        records += expanding
    stayed = sum(s.numel * s.dtype.itemsize for s in done.sites if s.reason and s.reason.startswith("gate: "))
    return program, {
        "sites": [{"name": name, **{k: w[k] for k in ("out", "in", "layout", "bytes")}} for name, w in packed.items()],
        "skipped": [{"name": s.fqn, "shape": list(s.shape), "reason": s.reason} for s in done.sites if s.reason],
        "table": cost.describe(done.timings),
        "batch": list(batch),
        "dense_bytes": dense_bytes,
        "lowered_bytes": sum(w["bytes"] for w in packed.values()) + stayed,
        "scratch_bytes": max((w["dense"] for w in packed.values()), default=0),
        "passes": [r._asdict() for r in records],
        **environment(),
    }


def packed_weights(program: Program) -> dict[str, dict[str, Any]]:
    """Outputs, inputs, layout and bytes (packed, dense) of each packed weight of the graph, by the weight's name."""
    found, names = {}, program.names()
    for node in program.graph.find_nodes(op="call_function", target=OP):
        use = sparse_use(node)
        values, meta = names[use.values], names[use.meta]
        tensor = program.tensor(values)
        # of lower_sparse_linears, or a buffer of SparseLinear
        name = (
            values.removesuffix("_values") if values.endswith("_values") else f"{values.removesuffix('values')}weight"
        )
        found[name] = {
            "out": tensor.shape[0],
            "in": use.in_features,
            "layout": use.layout,
            "bytes": tensor.nbytes + program.tensor(meta).nbytes,
            "dense": tensor.shape[0] * use.in_features * tensor.element_size(),
        }
    return found


class Lowered(NamedTuple):
    """What :func:`pack_linears` did: the linears of the merged graph, the times that decided, a record per pass."""

    program: Program
    sites: list[LinearSite]
    timings: cost.Table
    records: list[PassRecord]


def pack_linears(
    program: Program,
    find: Callable[[Program], list[LinearSite]],
    layouts: Sequence[Layout],
    batch: Sequence[int],
    measure: Callable[[list[cost.Shape]], cost.Table] | None,
    fuse: bool = True,
) -> Lowered:
    """Merge the linears that ``find`` gives, pack those that ``measure`` shows to gain, in the layout that gains most
    (all, in the first layout, without it), fuse."""
    program, merging = run_passes(program, [partial(merge_parallel_linears, sites=find(program))])
    sites = find(program)  # again: it is the merged weights that are timed and packed
    timings: cost.Table = {}
    chosen: dict[str, Layout] = {}
    if measure is not None:
        timings = measure([_shape_of(s) for s in eligible(sites)])
        for site in eligible(sites):
            layout, against = cost.choose(timings[_shape_of(site)], layouts, batch)
            if layout is None:
                site.reason = f"gate: {against}"
            else:
                chosen[site.fqn] = layout
    layout_of = lambda site: chosen.get(site.fqn, layouts[0])  # noqa: E731
    program, packing = run_passes(program, deploy_passes(sites, layout_of, fuse=fuse))
    return Lowered(program, sites, timings, [*merging, *packing])


def sparse_sites(program: Program) -> list[LinearSite]:
    """Every linear, the eligible ones being those whose weight is exactly 2:4, trained or frozen, head or not."""
    return keep_dense(program, find_linears(program, include=["*"]))


def _shape_of(site: LinearSite) -> cost.Shape:
    """What the site's cost depends on."""
    return cost.Shape.of(site.out_features, site.in_features, site.dtype)
