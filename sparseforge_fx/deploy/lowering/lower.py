"""``lower``: a 2:4 model as a graph over packed weights, sparse where that was measured to be faster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.fx import GraphModule

from sparseforge_fx.deploy.lowering import cost, cost_table
from sparseforge_fx.deploy.lowering.gate import Gate
from sparseforge_fx.deploy.lowering.report import PackedSite, PackingReport, stored_site
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.layouts import LAYOUTS, find_target
from sparseforge_fx.kernels.packed import Packed, weight_of_values
from sparseforge_fx.kernels.sparse_experts import PACKED_EXPERTS_OP
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.passes import LinearSite, deploy_passes, export_passes, find_linears, run_passes
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.find_routing import find_routing
from sparseforge_fx.passes.lower_sparse_linears import keep_dense
from sparseforge_fx.passes.rewrite import sparse_use, stack_use
from sparseforge_fx.ranges import checked
from sparseforge_fx.report import environment


@checked
def lower(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    target: str = "auto",
    tokens: Sequence[int] | None = None,
    table: str | Path | cost_table.Table | None = None,
    gate: bool = True,
) -> GraphModule:
    """The graph of ``model`` with every 2:4 linear that gains from it over its packed weight.

    q/k/v and gate/up become one linear each; bias, activation and silu-mul move into the sparse operator. The model
    given is left as it is.

    Args:
        example_inputs: as for :func:`sparseforge_fx.graph.capture.capture`.
        target: ``cpu``, ``cuda`` or ``auto`` (the device of the weights).
        tokens: token counts (batch x sequence) that matter. A weight is sparse if that was measured to be faster at one
            of them by more than 3 %, and slower at none; decoding alone: ``tokens=[1, 8]``; None: 1, 8, 64 and 2048.
            Where a device has several packed layouts, each weight gets the one that gains most.
        table: measurements to decide by instead of measuring (what ``save_table`` of deploy/lowering/cost_table.py
            wrote); a shape that is not in it stays dense. A stack of experts is another shape than one of its matrices:
            it is timed with as many experts for a token as the graph has; on CPUs, and nowhere else.
        gate: False packs every 2:4 weight, whatever its speed; ``tokens`` and ``table`` are refused beside it.

    Returns a GraphModule that is called as the model is; ``.report`` has sites, skipped linears with reasons, the cost
    table, bytes of the linears before and after, and ``scratch_bytes``: the largest packed weight in dense form, which
    prefill expands one at a time. Raises SparseForgeError if no weight is 2:4.
    """
    captured = capture(model, example_inputs)
    program, report = lower_captured(captured, target=target, tokens=tokens, table=table, gate=gate)
    module = program.module()
    module.report = report  # type: ignore[assignment]
    return module


def lower_captured(
    program: Exported,
    *,
    target: str = "auto",
    tokens: Sequence[int] | None = None,
    table: str | Path | cost_table.Table | None = None,
    gate: bool = True,
    portable: bool = False,
    durable: bool = False,
) -> tuple[Exported, PackingReport]:
    """:func:`lower` from a captured program to a program and the report. Linears that are packed already stay so.

    Args:
        portable: packed weights are expanded by plain aten operators, which is never faster: nothing is timed, and
            every 2:4 weight is packed.
        durable: the program goes to a file: only layouts that later versions of the libraries read, too.
    """
    untimed = "portable=True" if portable else None if gate else "gate=False"
    counts, known = cost.check_request(tokens, table, untimed)
    find = partial(sparse_sites, experts=not (portable or durable))
    sites = find(program)
    before = packed_weights(program)
    if not eligible(sites) and not before:
        reasons = "; ".join(f"{s.fqn}: {s.reason}" for s in sites[:4]) or "the graph has no linear layer"
        raise SparseForgeError(f"nothing to lower: {reasons}; run sparsify first")
    device = (program.tensor(eligible(sites)[0].fqn) if eligible(sites) else next(iter(program.state.values()))).device
    layouts = [layout for layout in find_target(target, device) if layout.durable or not durable]
    for site, _ in before:
        if durable and not LAYOUTS[site["layout"]].durable:
            told = f"no file may hold the layout {site['layout']} of {site['name']}: export the dense model"
            raise SparseForgeError(told)
    if portable:
        refuse_packed_experts(program, "a portable file has not: leave portable out")
    dense_bytes = sum(s.numel * s.dtype.itemsize for s in eligible(sites)) + sum(dense for _, dense in before)
    measure = partial(cost.timings, tokens=counts, device=device, layouts=layouts, known=known)
    routings = {site.fqn: find_routing(program, site) for site in eligible(sites)}
    choose = Gate(layouts, counts, measure if gate and not portable else None, routings)
    program, records = run_passes(program, deploy_passes(find, choose, fuse=not portable))
    packed = packed_weights(program)
    if portable:
        program, expanding = run_passes(program, export_passes())
        records += expanding
    stayed = sum(s.numel * s.dtype.itemsize for s in choose.sites if s.reason and s.reason.startswith("gate: "))
    report: PackingReport = {
        "sites": [site for site, _ in packed],
        "skipped": [{"name": s.fqn, "shape": list(s.shape), "reason": s.reason} for s in choose.sites if s.reason],
        "table": cost_table.describe(choose.timings),
        "tokens": list(counts),
        "dense_bytes": dense_bytes,
        "lowered_bytes": sum(site["bytes"] for site, _ in packed) + stayed,
        "scratch_bytes": max((dense for _, dense in packed), default=0),
        "passes": [r._asdict() for r in records],
        "notes": cost.unasked(tokens, table, bool(eligible(sites))),
        **environment(),
    }
    return program, report


def refuse_packed_experts(program: Program, where: str) -> None:
    """Raise SparseForgeError if the graph has stacks that are packed; ``where``: who lacks their operator."""
    for node in program.graph.find_nodes(op="call_function", target=PACKED_EXPERTS_OP):
        name = weight_of_values(program.names()[stack_use(node).values])
        raise SparseForgeError(f"{name} is a packed stack of experts, whose operator {where}")


def packed_weights(program: Program) -> list[tuple[PackedSite, int]]:
    """Each packed weight of the graph, and its bytes in dense form."""
    found: dict[str, tuple[PackedSite, int]] = {}
    names = program.names()
    for node in program.graph.nodes:
        if node.target not in (OP, PACKED_EXPERTS_OP):
            continue
        use = sparse_use(node) if node.target == OP else stack_use(node)
        values = names[use.values]
        tensors = [program.tensor(names[n]) for n in (use.values, use.meta, use.scales) if n is not None]
        packed = Packed(tensors[0], tensors[1], use.in_features, tensors[2] if use.scales is not None else None)
        size = (tensors[0].dtype if use.scales is None else use.x.meta["val"].dtype).itemsize
        site = stored_site(weight_of_values(values), packed, use.layout)
        found[values] = site, packed.shape.numel() * size
    return list(found.values())


def sparse_sites(program: Program, experts: bool = False) -> list[LinearSite]:
    """Every linear, the eligible ones being those whose weight is exactly 2:4, trained or frozen, head or not; with
    ``experts`` stacks of them, too."""
    return keep_dense(program, find_linears(program, include=["*"]), experts)
