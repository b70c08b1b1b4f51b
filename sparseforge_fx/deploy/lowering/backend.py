"""``torch.compile(model, backend="sparseforge")``: the deployment passes on Dynamo's graphs, the rest to Inductor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

from sparseforge_fx.deploy.lowering import cost, cost_table
from sparseforge_fx.deploy.lowering.gate import Gate
from sparseforge_fx.deploy.lowering.lower import sparse_sites
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.frame import Frame
from sparseforge_fx.graph.program import Program
from sparseforge_fx.kernels.layouts import layouts_of
from sparseforge_fx.passes import LinearSite, deploy_passes, run_passes
from sparseforge_fx.passes.find_linears import eligible

log = logging.getLogger(__name__)
OPTIONS = ("tokens", "table", "gate", "mode")
_measured: dict[tuple, cost_table.Table] = {}  # a model breaks into many graphs of the same shapes


def sparseforge(
    module: GraphModule, inputs: Sequence[Any], options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable:
    """Compile one graph of a model whose weights are 2:4.

    Options (of ``torch.compile``): ``tokens``, ``table`` and ``gate``, as for :func:`sparseforge_fx.lower`; ``mode``,
    or the argument of that name, which torch.compile takes only alone: one of Inductor's. ``reduce-overhead`` replays
    CUDA graphs, without which decoding one token at a time gains little on a GPU.
    The dense weights stay in memory beside the packed ones (:func:`sparseforge_fx.lower_modules` frees them); one that
    changes is packed anew when the graph next runs. Weights that are being trained stay dense, and a graph without a
    weight that gains goes to Inductor as it is.
    """
    given = dict(options or {})
    if unknown := set(given) - set(OPTIONS):
        raise SparseForgeError(f"backend sparseforge has no option {', '.join(sorted(unknown))}; {', '.join(OPTIONS)}")
    modes, mode = list_mode_options(), given.pop("mode", mode or "default")
    if mode not in modes:
        raise SparseForgeError(f"backend sparseforge has no mode {mode}; {', '.join(modes)}")
    finish: Any = partial(compile_fx, config_patches=modes[mode])
    lowered = _lower(module, inputs, given)
    return finish(module, inputs) if lowered is None else _Lowered(module, inputs, given, finish, lowered)


class _Lowered:
    """A compiled graph and the packed weights that it is called with.

    Dynamo gives one graph to all layers of the same code, whose weights are inputs: the packed ones belong to the
    weights that come with a call, not to the graph.
    """

    def __init__(
        self,
        module: GraphModule,
        inputs: Sequence[Any],
        options: dict[str, Any],
        finish: Callable[[GraphModule, Sequence[Any]], Callable],
        lowered: Frame,
    ):
        self.module, self.options, self.finish, self.added = module, options, finish, list(lowered.added)
        self.weights = [i for i, value in enumerate(inputs) if isinstance(value, torch.nn.Parameter)]
        self.packed: dict[tuple, tuple[list[Tensor], list[Tensor] | None]] = {}
        # fake ones, of static shape: real ones, which Dynamo knows no source of, could get symbols for sizes
        self.run = finish(lowered.module(), [*inputs, *(node.meta["val"] for node in lowered.added.values())])
        self._remember(inputs, lowered)
        self.dense: Callable | None = None

    def __call__(self, *inputs: Any) -> Any:
        key = self._key(inputs)
        extra = self.packed[key][1] if key in self.packed else self._pack(inputs)
        if extra is not None:
            return self.run(*inputs, *extra)
        if self.dense is None:
            self.dense = self.finish(self.module, inputs)
        return self.dense(*inputs)

    def _key(self, inputs: Sequence[Any]) -> tuple:
        return tuple(
            (id(w), w.data_ptr(), 0 if w.is_inference() else w._version) for w in map(inputs.__getitem__, self.weights)
        )

    def _pack(self, inputs: Sequence[Any]) -> list[Tensor] | None:
        """The packed tensors of these weights; None if they do not fit the graph (not 2:4, say)."""
        lowered = _lower(self.module, inputs, self.options)
        return self._remember(inputs, lowered if lowered is not None and list(lowered.added) == self.added else None)

    def _remember(self, inputs: Sequence[Any], lowered: Frame | None) -> list[Tensor] | None:
        extra = None if lowered is None else lowered.extra_inputs()
        for tensor in extra or ():
            torch._dynamo.mark_static_address(tensor)
        weights = [inputs[i] for i in self.weights]  # kept, so that their ids stay theirs
        ids = [id(w) for w in weights]
        self.packed = {k: v for k, v in self.packed.items() if [i for i, *_ in k] != ids}  # older versions of the same
        self.packed[self._key(inputs)] = (weights, extra)
        return extra


def _lower(module: GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> Frame | None:
    """The graph with packed operators; None if nothing in it gains."""
    gate = options.get("gate", True)
    counts, known = cost.check_request(options.get("tokens"), options.get("table"), None if gate else "gate=False")
    try:
        frame = Frame.from_dynamo(module, inputs)
    except Exception as error:  # whatever torch raises on code that it compiles, but cannot trace to aten
        log.warning("a graph stays dense: it could not be lowered to aten (%s)", error)
        return None
    devices = {frame.tensor(s.fqn).device for s in eligible(_frozen_sites(frame))}
    if len(devices) != 1 or not (layouts := layouts_of(device := devices.pop())):
        return None
    tokens = tuple(counts)

    def measure(shapes: Sequence[cost_table.Shape]) -> cost_table.Table:
        if known is not None:
            return cost.timings(shapes, tokens, device, layouts, known)
        table = _measured.setdefault((device, tokens), {})
        table |= cost.timings([s for s in shapes if s not in table], tokens, device, layouts, None)
        return cost.timings(shapes, tokens, device, layouts, table)

    choose = Gate(layouts, tokens, measure if gate else None)
    lowered, records = run_passes(frame, deploy_passes(_frozen_sites, choose))
    if not (packed := eligible(choose.sites)):
        return None
    log.info("%d linears run packed: %s", len(packed), [r.op_changes for r in records])
    return lowered


def _frozen_sites(program: Program) -> list[LinearSite]:
    return [s for s in sparse_sites(program) if not _trains(program.tensor(s.fqn))]


def _trains(weight: Tensor) -> bool:
    """Would a packed copy keep a gradient from it?"""
    return weight.requires_grad and torch.is_grad_enabled()
