"""What a run under way consists of: gathered into a state, and put back from one that is whole and its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.misfit import misfit
from sparseforge_fx.methods.part import local
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.training.master_weights import MasterWeights
from sparseforge_fx.training.optimizer import load_plain_state, moment_like, plain_state
from sparseforge_fx.training.sparse_model import SparseModel


def _own_masters(sparse: SparseModel, master: MasterWeights) -> list[nn.Parameter]:
    """The masters of the model's parameters; the method's own are in its state."""
    own = {id(p) for p in sparse.method.parameters()}
    return [m for m, p in zip(master.masters, master.parameters, strict=True) if id(p) not in own]


def state_of(
    sparse: SparseModel,
    master: MasterWeights,
    optimizer: torch.optim.Optimizer,
    step: int,
    curves: list,
    run: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "run": dict(run),
        "step": step,
        "masters": [m.detach() for m in _own_masters(sparse, master)],
        "masks": {w.fqn: w.whole(w.mask) for w in sparse.method.weights},
        "optimizer": plain_state(optimizer),
        "method": _held(sparse, sparse.method.state(), lambda w, value: w.whole(value)),
        "handed_over": sparse.handed_over,
        "start": sparse.start_report,
        "scales": {} if sparse.on_grid is None else sparse.on_grid.scales,
        "curves": curves,
    }


def parts(sparse: SparseModel, master: MasterWeights, optimizer: torch.optim.Optimizer) -> Callable[[str], Any]:
    """By the name of a saved tensor what this process reads of it (see :func:`load_state`); None: all of it."""
    if sparse.shards is None:
        return lambda name: None
    known: dict[str, Tensor] = {f"state/masters/{i}": m for i, m in enumerate(_own_masters(sparse, master))}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        known |= {f"state/optimizer/state/{i}/{moment}": p for moment in ("exp_avg", "exp_avg_sq")}
    for w in sparse.method.weights:
        for place in ("masks", *(f"method/held/{kind}" for kind in sparse.method.held())):
            known[f"state/{place}/{w.fqn}"] = w.whole(w.mask)
    return known.get


def _held(sparse: SparseModel, state: Any, change: Callable[[MaskedWeight, Tensor], Tensor]) -> Any:
    """The method's state with a change of what it holds for each weight that processes share."""
    if sparse.shards is None or not isinstance(state, dict) or not isinstance(state.get("held"), dict):
        return state
    of = {w.fqn: w for w in sparse.method.weights}
    held = {
        kind: {fqn: change(of[fqn], t) if fqn in of and isinstance(t, Tensor) else t for fqn, t in tensors.items()}
        for kind, tensors in state["held"].items()
        if isinstance(tensors, dict)
    }
    return {**state, "held": held}


@torch.no_grad()
def restore(
    sparse: SparseModel,
    master: MasterWeights,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    run: Mapping[str, Any],
) -> tuple[int, list]:
    """Everything is looked at before anything is written: the first step with a wrong shape may be a crash."""
    mine = state_of(sparse, master, optimizer, 0, [], run)
    _refuse(misfit(dict.fromkeys(state), dict.fromkeys(mine), "the state"))
    _check_run(state["run"], mine["run"])
    saved, masks = state["masters"], state["masks"]
    if isinstance(saved, list) and isinstance(masks, dict):
        shapes = [getattr(m, "shape", None) for m in saved]
        if shapes != [m.shape for m in mine["masters"]] or set(masks) != set(mine["masks"]):
            raise SparseForgeError(
                "the saved training state belongs to another model or another set of sites, or is damaged; "
                "delete it to start anew"
            )
    for name in ("masters", "masks", "step", "handed_over", "scales"):
        _refuse(misfit(state[name], mine[name], name))
    _refuse(_wrong_start(state["start"]))
    method = _held(sparse, state["method"], lambda w, value: local(value))
    sparse.method.check_state(method)
    _refuse(_wrong_progress(state, sparse.method.steps) or _wrong_optimizer(state["optimizer"], optimizer))
    sparse.method.load_state(method)
    for master_weight, value in zip(_own_masters(sparse, master), saved, strict=True):
        master_weight.copy_(value)
    for fqn, scales in mine["scales"].items():
        scales.copy_(state["scales"][fqn])
    master.write_back()
    for w in sparse.method.weights:
        w.mask.copy_(local(masks[w.fqn]))
    load_plain_state(optimizer, state["optimizer"])
    sparse.steps_done, sparse.handed_over = state["step"], state["handed_over"]
    sparse.start_report = state["start"]
    return state["step"], list(state["curves"])


def _refuse(wrong: str | None) -> None:
    if wrong is not None:
        raise SparseForgeError(f"the saved training state is damaged ({wrong}); delete it to start anew")


def _check_run(saved: Any, mine: dict[str, Any]) -> None:
    """Raise SparseForgeError, naming what differs, unless the state was saved by a run like this one."""
    if not isinstance(saved, dict):
        _refuse("run is no dictionary")
    named = [f"{k} {v} instead of {saved.get(k)}" for k, v in mine.items() if k not in HASHES and v != saved.get(k)]
    named += [f"other {k}" for k in HASHES if mine.get(k) != saved.get(k)]
    if named:
        raise SparseForgeError(
            f"the saved training state belongs to another run, this one has {', '.join(named)}; "
            "repeat that run's options, or delete the state to start anew"
        )


#: entries of ``run`` that say nothing to a reader but whether they are the same
HASHES = ("weights", "data", "teacher")


def _wrong_start(start: Any) -> str | None:
    """What is wrong with the report of a layer-wise start; whoever calls ``calibrate`` by hand has its notes alone."""
    notes = start.get("layer_notes") if isinstance(start, dict) else None
    if not isinstance(notes, dict) or not all(type(v) is str for pair in notes.items() for v in pair):
        return None if start == {} else "start is no report of a layer-wise start"
    errors = start.get("layer_errors", {})
    if not isinstance(errors, dict) or not all(type(e) is float for e in errors.values()):
        return "start holds errors that are no numbers"
    said = start.get("start_notes", [])
    if not isinstance(said, list) or not all(type(note) is str for note in said):
        return "start holds notes that are no text"
    told = ("layer_notes", "layer_errors", "experts", "reconstruction", "rounded_reconstruction", "start_notes")
    plain = {name: value for name, value in start.items() if name not in told}
    numbers = {"calibration_sequences": 0, "calibration_seconds": 0.0}
    return misfit(plain, numbers, "start") if plain else None


def _wrong_progress(state: dict[str, Any], steps: int) -> str | None:
    """What is wrong with a state's step and curves."""
    step, curves = state["step"], state["curves"]
    if not 0 <= step <= steps:
        return f"step is {step} of {steps}"
    if not isinstance(curves, list) or len(curves) != step:
        return f"curves is no list of {step} steps"
    plain = all(isinstance(row, dict) and all(type(v) in (int, float) for v in row.values()) for row in curves)
    return None if plain else "curves holds something else than numbers"


def _wrong_optimizer(saved: Any, optimizer: torch.optim.Optimizer) -> str | None:
    """What is wrong with an optimizer's state: each tensor must have its parameter's shape, or be a count."""
    mine = plain_state(optimizer)
    groups = [group | {"lr": 0.0} for group in mine["param_groups"]]
    try:
        if [group | {"lr": group["lr"] * 0.0} for group in saved["param_groups"]] != groups or set(saved) != set(mine):
            return "optimizer has other groups"
    except (TypeError, KeyError):
        return "optimizer has no groups"
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    names = {"step", "exp_avg", "exp_avg_sq"} if "betas" in optimizer.defaults else set()
    if not isinstance(saved["state"], dict) or not set(saved["state"]) <= set(parameters):
        return "optimizer is of other parameters"
    for index, entries in saved["state"].items():
        if not isinstance(entries, dict) or set(entries) != names:
            return f"optimizer[{index}] holds other moments"
        for name, value in entries.items():
            wanted = torch.zeros(()) if name == "step" else moment_like(optimizer, parameters[index], value)
            if wrong := misfit(value, wanted, f"optimizer[{index}][{name}]"):
                return wrong
    return None
