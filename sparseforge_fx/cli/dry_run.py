"""``--dry-run``: what a command would do, from the model's shapes alone. Nothing is written, no weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseforge_fx.cli.app import pick_device, print_json, readable_bytes, stdout
from sparseforge_fx.cli.on_disk import DISK

if TYPE_CHECKING:
    from sparseforge_fx.training.forecast import Forecast
    from sparseforge_fx.training.recipe import Recipe


def tell(plain: Mapping[str, Any], as_json: bool) -> None:
    """A line for each entry."""
    if as_json:
        print_json(dict(plain))
        return
    console = stdout()
    console.print("would do, with nothing written:", highlight=False)
    for name, value in plain.items():
        for line in [value] if isinstance(value, str) else _lines(value):
            console.print(f"  {name.replace('_', ' ')}: {line}", highlight=False)


def _lines(value: Any) -> Iterator[str]:
    """Numbers by name are for --json: some sentence says them."""
    if isinstance(value, list):
        yield from map(str, value)
    elif isinstance(value, int | float):
        yield f"{value:,}"
    elif value is not None and not isinstance(value, dict):
        yield str(value)


def tell_of_sparsify(
    recipe: Recipe, output: Path, device: str | None, as_json: bool, checkpointing: bool = False
) -> None:
    """Of several processes each takes its time, beside the others as in the run, and the first one speaks."""
    from sparseforge_fx.training.processes import Processes

    processes = Processes()
    told = of_sparsify(recipe, output, device, processes.count, checkpointing)
    if processes.first:
        tell(told, as_json)


KEPT = "all kept: --activation-checkpointing takes less"
AGAIN = "counted as if all were kept: --activation-checkpointing takes less, and one forward pass more a step"


def of_sparsify(
    recipe: Recipe, output: Path, device: str | None, processes: int, checkpointing: bool = False
) -> dict[str, Any]:
    """Which weights, how many steps, and what memory and time they take here, on so many processes. Raises
    SparseForgeError for what the run would refuse once it had the graph."""
    from sparseforge_fx.data.opening import text_length
    from sparseforge_fx.errors import SparseForgeError
    from sparseforge_fx.methods.base import TrainedConfig
    from sparseforge_fx.models.compute_dtype import choose_dtype, dtype_of
    from sparseforge_fx.models.dense import find_dtype
    from sparseforge_fx.plans import planned_formats
    from sparseforge_fx.report import peak_memory_bytes
    from sparseforge_fx.training import forecast_memory
    from sparseforge_fx.training.forecast import forecast, trained_beside
    from sparseforge_fx.training.sharded import asked_for

    assert recipe.model is not None
    has_data = recipe.data is not None
    config = recipe.config(has_data)
    loaded, program, sites = _sites(recipe.model, config.pattern, recipe.include, recipe.exclude)
    if has_data:
        recipe = recipe.changed(length=text_length(loaded, recipe.length))
    if isinstance(config, TrainedConfig):
        recipe.check_one_step()
    chosen = [s for s in sites if s.reason is None]
    if recipe.plan is not None:
        formats = planned_formats(recipe.plan, {s.fqn: s.sides for s in chosen})
        chosen = [s for s in chosen if s.fqn in formats and formats[s.fqn].is_sparse]
    if not chosen:
        reasons = "; ".join(f"{s.fqn}: {s.reason}" for s in sites[:4]) or "the graph has no linear layer"
        raise SparseForgeError(f"nothing to prune: {reasons}")
    weights, parameters = sum(s.numel for s in chosen), sum(p.numel() for p in loaded.parameters())
    preset = f" ({recipe.preset})" if recipe.preset else ""
    told: dict[str, Any] = {
        "model": f"{recipe.model}, {parameters:,} parameters",
        "method": f"{recipe.name(has_data)}{preset}, {config.pattern}",
        "made_sparse": f"{len(chosen)} linears with {weights:,} weights ({weights / parameters:.1%} of the parameters)",
        "stay_dense": [f"{s.fqn}: {s.reason}" for s in sites if s.reason is not None] or "no other linear",
    }
    told |= _unmatched(loaded, recipe.include, recipe.exclude)
    where = pick_device("cpu" if device == DISK else device)
    dtype = choose_dtype(dtype_of(loaded), where, find_dtype(recipe.dtype)).dtype
    base = peak_memory_bytes() if where.type == "cpu" else 0  # of a process with the graph
    found = forecast(program, sites, chosen, recipe, config, dtype, where, processes)
    predicted: dict[str, float] = {**found._asdict(), "seconds": found.seconds}
    if isinstance(config, TrainedConfig):
        per_step = recipe.batch_size * recipe.length * recipe.accumulate * processes
        all_tokens = f"{found.steps:,} steps of {per_step:,} tokens ({found.steps * per_step:,})"
        told["training"] = f"{all_tokens} at a peak rate of {recipe.lr:g}"
        share = processes if asked_for() else 1
        taken = forecast_memory.of_training(program, chosen, parameters, recipe, config, dtype, share)
        predicted["peak_memory_bytes"] = peak = base + taken
        others = trained_beside(program, chosen, config)
        kept = readable_bytes(forecast_memory.states(weights, config, recipe.optimizer, dtype, others) / share)
        name = "AdamW in 8 bits" if recipe.optimizer == "adamw8bit" else "AdamW"
        told["memory"] = (
            f"about {readable_bytes(peak)}{' in each process' if processes > 1 else ''}: "
            f"{readable_bytes(parameters * dtype.itemsize / share)} of weights, {kept} for teacher, masks, gradients "
            f"and {name}, activations ({AGAIN if checkpointing else KEPT})"
        )
    elif device == DISK:
        predicted["peak_memory_bytes"] = peak = base + forecast_memory.from_disk(chosen, recipe, config, dtype)
        told["memory"] = f"about {readable_bytes(peak)} at the largest weight; the others stay on disk"
    told |= {"time": _time(found, dtype), "predicted": predicted}
    size_on_disk = readable_bytes(_bytes(loaded))
    told["writes"] = f"{output}/: a checkpoint of {size_on_disk}, report.json, report.html, recipe.yaml"
    return told


def of_quantize(
    model: str,
    output: Path,
    values: str | None,
    plan: str | None,
    include: list[str],
    exclude: list[str],
    reading: Mapping[str, Any] | None,
    device: str | None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """The format of every linear by shapes, the bytes (weights that are 2:4 already take less), and the time of a walk
    over data; ``reading``: how much of these is read, None: no data."""
    from sparseforge_fx.formats import DENSE, parse_format
    from sparseforge_fx.models.compute_dtype import dtype_of
    from sparseforge_fx.pattern import TWO_FOUR
    from sparseforge_fx.plans import planned_formats

    loaded, program, sites = _sites(model, TWO_FOUR, include, exclude, dtype)
    chosen = [s for s in sites if s.reason is None]
    if plan is not None:
        formats = planned_formats(plan, {s.fqn: None for s in sites})
    else:
        formats = {s.fqn: parse_format(values or "int8") for s in chosen}
    fitting = {s.fqn: s for s in sites if s.fqn in formats and formats[s.fqn].why_not(s.in_features) is None}
    bits = 8 * next(loaded.parameters()).element_size()
    before = _bytes(loaded)
    saved = sum(
        s.numel * (DENSE.bits(s.in_features, bits) - formats[name].bits(s.in_features, bits)) / 8
        for name, s in fitting.items()
    )
    kinds: dict[str, int] = {}
    for name in fitting:
        kinds[str(formats[name])] = kinds.get(str(formats[name]), 0) + 1
    walk: dict[str, Any] = {}
    if reading is not None:
        rounded = {name: formats[name] for name in fitting if formats[name].is_quantized}
        walk = _rounding(program, sites, rounded, reading, dtype_of(loaded), device)
    return {
        "model": model,
        "formats": [f"{count} linears in {form}" for form, count in kinds.items()] or "no linear fits",
        "stay": [f"{s.fqn}: {s.reason}" for s in sites if s.fqn not in fitting and s.reason] or "nothing else",
        "bytes": f"{readable_bytes(before)} now, {readable_bytes(before - saved)} then; 2:4 weights take less still",
        **_unmatched(loaded, include, exclude),
        **walk,
        "writes": f"{output}/",
    }


def _rounding(
    program: Any, sites: list[Any], formats: Mapping[str, Any], reading: Mapping[str, Any], own: Any, device: str | None
) -> dict[str, Any]:
    """How long the walk over data takes of a model whose dtype is ``own``."""
    from sparseforge_fx.data.opening import text_length
    from sparseforge_fx.models.compute_dtype import choose_dtype
    from sparseforge_fx.training.forecast import forecast_rounding
    from sparseforge_fx.training.recipe import Recipe

    where = pick_device(device)
    dtype = choose_dtype(own, where).dtype
    counts = {name: reading[name] for name in ("calibration", "length", "batch_size") if name in reading}
    recipe = Recipe(**counts)
    recipe = recipe.changed(length=text_length(program.source, recipe.length))
    found = forecast_rounding(program, sites, formats, recipe, dtype, where)
    return {"time": _time(found, dtype), "predicted": {"seconds": found.seconds}}


def of_export(
    model: str, output: Path, format: str, tokens: list[int] | None, timed: bool, dtype: str | None = None
) -> dict[str, Any]:
    """What would be captured; which linears are packed is known only by their weights and by measuring."""
    from sparseforge_fx.pattern import TWO_FOUR

    loaded, _, sites = _sites(model, TWO_FOUR, [], [], dtype)
    # stacks are packed in this process, and in files where MODEL has them packed
    stacks = format == "safetensors" or getattr(loaded.config, "quantization_config", None) is not None
    fitting = [s for s in sites if s.reason is None and (stacks or s.experts is None)]
    count = sum(s.reason is None for s in sites) - len(fitting)
    staying = f"{count} stacks of experts: export writes those packed that are so in {model}" if count else None
    share = sum(s.numel for s in fitting) * next(loaded.parameters()).element_size()
    size = _bytes(loaded)
    times = f"each shape dense and packed at {tokens or 'the default'} tokens"
    return {
        "model": model,
        "format": format,
        "may_be_packed": f"{len(fitting)} linears, those of them whose weights are 2:4",
        "stay_dense": staying,
        "measures": times if timed else None,
        "bytes": f"{readable_bytes(size - share * 7 / 16)} (all packed) to {readable_bytes(size)} (none)",
        "writes": str(output),
    }


def _time(found: Forecast, dtype: Any) -> str | None:
    """A sentence; None where nothing takes long enough to be worth one."""
    from sparseforge_fx.page.facts import duration

    if not found.seconds:
        return None
    start = duration(found.start) if found.start else ""
    name = str(dtype).removeprefix("torch.")
    if not found.steps:
        return f"about {start} in {name} on this machine"
    steps = f"{found.steps:,} steps of {found.step:.2g} s" + (f" after a layer-wise start of {start}" if start else "")
    return f"about {duration(found.seconds)} ({steps}) in {name} on this machine"


def _sites(
    model: str, pattern: Any, include: Any, exclude: Any, dtype: str | None = None
) -> tuple[Any, Any, list[Any]]:
    from sparseforge_fx.graph.capture import capture
    from sparseforge_fx.models.dense import find_dtype, load_skeleton
    from sparseforge_fx.passes import find_linears

    loaded = load_skeleton(model)
    if (wanted := find_dtype(dtype)) is not None:
        loaded.to(wanted)
    program = capture(loaded, dynamic=False)
    return loaded, program, find_linears(program, pattern, include, exclude)


def _unmatched(model: Any, include: Any, exclude: Any) -> dict[str, list[str]]:
    """A line for globs that name nothing, if there are any."""
    from sparseforge_fx.passes.globs import unmatched

    found = unmatched(model, include=include, exclude=exclude)
    return {"notes": found} if found else {}


def _bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
