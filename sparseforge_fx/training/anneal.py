"""A run that trains: prepare, calibrate where the start asks for it, train, finalize."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from sparseforge_fx.data.batches import count_rows, count_steps
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.base import STARTING, TrainedConfig
from sparseforge_fx.methods.experts import of_curvature
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.report import describe_change
from sparseforge_fx.training import fingerprint
from sparseforge_fx.training.checkpoint import find_state
from sparseforge_fx.training.inputs import Run
from sparseforge_fx.training.low_rank import fitting_block
from sparseforge_fx.training.prepare import finalize, prepare_captured
from sparseforge_fx.training.processes import unheard
from sparseforge_fx.training.recipe import Recipe
from sparseforge_fx.training.settings import Settings
from sparseforge_fx.training.sharded import SHARED, Sharding, sharding_of
from sparseforge_fx.training.shared_start import SharedStart
from sparseforge_fx.training.sparse_model import SparseModel
from sparseforge_fx.training.train import Optimization, train
from sparseforge_fx.training.undo import dense_again_on_error
from sparseforge_fx.training.unused import unused_arguments, unused_for_experts, unused_options


def anneal(
    run: Run,
    recipe: Recipe,
    beside: Mapping[str, Any],
    report: dict[str, Any],
    *,
    accelerator: Accelerator,
    state_path: str | Path | None,
    activation_checkpointing: bool = False,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    **how: Any,
) -> dict[str, Tensor]:
    """Train the run's model to exact N:M, and say in the report how it went, with the ``seconds`` of earlier processes
    of a run that goes on. ``how`` goes to :func:`train`. Returns the scales of weights that were put on a grid."""
    assert run.batches is not None
    path = None if state_path is None else Path(state_path)
    begun = path is not None and find_state(path) is not None
    per_step = run.accumulate * accelerator.num_processes
    steps = None if recipe.tokens is None else count_steps(run.batches, recipe.tokens, per_step)
    config = recipe.config(True, steps)
    assert isinstance(config, TrainedConfig)
    sharding = sharding_of(accelerator, report["notes"], run.in_parts)
    settings = _settings(run, recipe, report, sharding is not None)
    start = _shared_start(run, recipe, config, settings, sharding)
    trained = config if start is None else start.trained
    calibrated = run.first(recipe.calibration) if config.calibrates and run.in_parts is None else []
    report["notes"] += unused_arguments(
        recipe, beside, data=run.data, method=report["method"], trains=True, calibrates=config.calibrates,
        batches=run.batches, idle=config.idle_in_a_run,
    )  # fmt: skip
    report["notes"] += unheard(accelerator)
    report["notes"] += [*unused_options(config, recipe, True), *unused_for_experts(config, run.sites)]
    identity = _identity(run, recipe, config, settings.slorb_block, path)  # of the dense weights
    config = config if start is None else start.config
    report |= {"config": config.describe(), "lr": recipe.lr, "settings": settings.describe()}
    begins: dict[str, Any] = {}  # what the report says of a start that is done
    if sharding is not None and start is not None and not begun:
        if run.in_parts is None:
            begins = start.in_memory(run, calibrated)
        else:
            sharding.in_parts, begins = start.from_disk(run.in_parts, run.data, recipe, path, beside["cache_dir"])
    with dense_again_on_error(run.program) as written:
        sparse = prepare_captured(
            run.program, run.sites, trained, settings.objective, slorb_block=settings.slorb_block, sharding=sharding,
            taught_by=run.taught_by, seed=recipe.seed,
        )  # fmt: skip
        run.taught_by = None
        decay = settings.weight_decay
        moves = Optimization(recipe.lr, accumulate=run.accumulate, weight_decay=decay, optimizer=recipe.optimizer)
        try:
            if activation_checkpointing or (sharding is not None and sharding.computes_again):
                sparse.activation_checkpointing_enable()
            written += [] if sharding is not None else sparse.copies()
            if trained.start != "dense" and not begun:
                clock = time.monotonic()
                sparse.calibrate(calibrated)
                begins = begins or {
                    "calibration_sequences": sum(map(count_rows, calibrated)),
                    "calibration_seconds": time.monotonic() - clock,
                }
                sparse.start_report |= begins
            report["passes"] = [r._asdict() for r in sparse.pass_records]
            here: list[float] = []  # seconds of this process's steps
            curves = train(
                sparse, run.batches, sparse.trainable(), moves, state_path=path,
                run=identity, accelerator=accelerator, on_step=partial(_step, here, on_step), **how,
            )  # fmt: skip
            _tell_start(sparse, report)  # after training: a run that goes on has read it with its state
            start_before = report.get("calibration_seconds", 0.0) if begun else 0.0
            report["seconds"] = start_before + sum(row["seconds"] for row in curves) - sum(here)
            finalize(sparse)
            report["layers"] = _layers(sparse, written)
        finally:
            sparse.release()
    report["curves"] = curves
    report["tokens"] = curves[-1]["tokens"] if curves else 0
    report["epochs"] = run.batches.passes(config.steps * per_step)
    if (report["epochs"] or 0) > 1:
        report["notes"].append(f"the run went over its data {report['epochs']:.1f} times")
    return {} if sparse.on_grid is None else sparse.on_grid.scales


def _step(
    seconds: list[float], on_step: Callable[[int, dict[str, float]], None] | None, step: int, row: dict[str, float]
) -> None:
    seconds.append(row["seconds"])
    if on_step is not None:
        on_step(step, row)


def _tell_start(sparse: SparseModel, report: dict[str, Any]) -> None:
    """What the start found; errors are told with the layers."""
    told = {k: v for k, v in sparse.start_report.items() if k != "layer_errors"}
    notes = [*told.pop("start_notes", ()), *sparse.reader.notes]
    report["notes"] += [note for note in notes if note not in report["notes"]]
    report |= told | _experts(sparse)


def _shared_start(
    run: Run, recipe: Recipe, config: TrainedConfig, settings: Settings, sharding: Sharding | None
) -> SharedStart | None:
    """What comes before the model is cut up. Raises SparseForgeError for what processes that share it cannot do."""
    if sharding is None:
        if run.in_parts is not None:
            raise SparseForgeError(f"a model that stays on disk is trained {SHARED}; or load it whole")
        return None
    start = SharedStart.of(config, recipe, run.in_parts is not None)
    whole = {"slorb_block": settings.slorb_block is not None, "features": settings.objective.features is not None}
    trained = config if start is None else start.trained
    sharding.check(trained, run.sites, **whole)
    return start


def _settings(run: Run, recipe: Recipe, report: dict[str, Any], shared: bool) -> Settings:
    """What the run takes beside the method's constants, and notes on what is a preset's word."""
    settings = recipe.settings(True)
    if "slorb_block" in settings.by_preset:  # which nobody asked for: no error where it cannot stand
        wanted = settings.by_preset["slorb_block"]
        block, why = None, [f"the preset's slorb_block {wanted} is left out: the processes share the weights"]
        if not shared:
            block, why = fitting_block(run.program, run.sites, wanted)
        settings = settings.with_block(block)
        report["notes"] += why
    report["notes"] += settings.note(report["preset"])
    if settings.slorb_block is not None:
        report["notes"].append(
            "the low-rank branches (slorb_block) are saved beside the weights: sf.load rebuilds them, transformers' "
            "own from_pretrained leaves them out"
        )
    return settings


def _experts(sparse: SparseModel) -> dict[str, Any]:
    """Of experts that curvature scored: the tokens that it is of, and notes."""
    method = sparse.method
    if method.curvature is None or method.curvature.estimator is None:
        return {}
    stacks, notes = of_curvature(method.curvature.tokens, method.config.expert_tokens)
    others = [w.fqn for w in method.weights if w.weight.dim() == 3 and w.fqn not in stacks]
    notes |= dict.fromkeys(others, "its experts get all tokens, which nobody counts: curvature scores them all")
    return {"layer_notes": notes, **({"experts": stacks} if stacks else {})}


def _layers(sparse: SparseModel, copies: Sequence[tuple[Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    """By weight: what the run made of it, by the dense ``copies``, and what it learned of it."""
    found: dict[str, dict[str, float]] = {}
    dense = {id(tensor): copy for tensor, copy in copies}
    errors = sparse.start_report.get("layer_errors", {})
    curvature = sparse.method.mean_curvature
    for w in sparse.method.weights:
        if w.fqn in errors:
            found.setdefault(w.fqn, {})["error"] = errors[w.fqn]
        weight = sparse.program.tensor(w.fqn)  # not the master that the method may have
        known = sparse.moves is not None or not sparse.method.config.reorder  # a resumed run knows no places
        if id(weight) in dense and known:
            before = dense[id(weight)] if sparse.moves is None else sparse.moves.follow(w.fqn, dense[id(weight)])
            found.setdefault(w.fqn, {}).update(describe_change(weight, before))
        if w.fqn in curvature:
            found.setdefault(w.fqn, {})["curvature"] = curvature[w.fqn]
    return found


def _identity(
    run: Run, recipe: Recipe, config: TrainedConfig, slorb_block: int | None, path: Path | None
) -> dict[str, Any]:
    """What a saved state must agree in, beside what :func:`train` knows itself."""
    assert run.batches is not None
    known = {name: getattr(recipe, name) for name in ("seed", "batch_size", "length", "calibration", "accumulate")}
    known |= {name: getattr(config, name) for name in (*STARTING, "expert_tokens", "trainable")}
    known["slorb_block"] = slorb_block
    known["dtype"] = str(run.program.tensor(eligible(run.sites)[0].fqn).dtype)
    if path is not None:
        weights, taught_by = run.tensors()
        known |= {"weights": fingerprint.of_tensors(weights), "data": fingerprint.of_batches(run.batches)}
        known |= {} if taught_by is None else {"teacher": fingerprint.of_tensors(taught_by)}
    return known
