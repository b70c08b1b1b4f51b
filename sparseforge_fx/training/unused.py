"""What was asked of ``sparsify`` and has no part in the run: each gets a sentence in the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from sparseforge_fx.data.opening import PACKING, TEXT, idle_reading
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.catalog import TRAINED, find_name
from sparseforge_fx.methods.config import MethodConfig
from sparseforge_fx.methods.experts import EXPERT_TOKENS
from sparseforge_fx.passes import LinearSite
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.training.recipe import Recipe

TRAINING = ("steps", "tokens", "accumulate", "lr", "objective", "weight_decay", "optimizer")
LOOP = ("activation_checkpointing", "compile", "state_path", "save_seconds", "on_step", "accelerator")
SAVE_SECONDS = 600.0  # between two saved states, where nobody says another time
UNCALIBRATED = "nothing is calibrated in this run"
UNDRAWN = "nothing is drawn in this run"
UNTAUGHT = "nothing in this run comes near to it: no distillation (kl), no reconstruct"


def unused_arguments(
    recipe: Recipe, beside: Mapping[str, Any], *, data: Any, method: str, trains: bool, calibrates: bool, batches: Any,
    idle: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:  # fmt: skip
    """A sentence for each field that differs from its default and is not looked at.

    Args:
        beside: arguments that are no fields of the recipe, None where they were not given.
        data: what was given as data.
        trains, calibrates: does the method train, does it look at a calibration set?
        batches: what the data became; None where there is none.
        idle: what of a run's arguments the method has no use for, with the reason.
    """
    defaults = vars(Recipe()) | dict.fromkeys(beside) | {"save_seconds": SAVE_SECONDS}
    given = {**vars(recipe), **beside, "data": data}
    why = {name: reason for name, reason in idle.items() if name in given}
    if beside.get("state_path") is None and "save_seconds" in beside:
        why["save_seconds"] = "there is no state_path"
    if not trains:
        why |= dict.fromkeys((*TRAINING, *(n for n in LOOP if n in beside)), f"{method} does not train")
        if calibrates:
            why |= dict.fromkeys(("steps", "tokens"), f"{method} looks at calibration= sequences")
    if not calibrates:
        why["calibration"] = UNCALIBRATED
    if "teacher" in beside:
        why["teacher"] = UNTAUGHT
    if not (trains or calibrates):
        why |= dict.fromkeys(("data", *TEXT, *PACKING, "seed"), f"{method} looks at the weights alone")
    else:
        why |= idle_reading(data, batches, recipe.length)
    differ = [n for n in why if given[n] is not defaults[n] and _differs(given[n], defaults[n])]
    return [f"{n} is given and not used: {why[n]}" for n in differ]


def unused_options(config: MethodConfig, recipe: Recipe, has_data: bool) -> list[str]:
    """A sentence for each constant of the method, or of the loss, that was asked for and has no part beside the others.

    Args:
        config: of this recipe.
    """
    steps: Any = getattr(config, "steps", None)
    if isinstance(recipe.method, MethodConfig):  # asked for: what neither its class nor a preset says
        made = [vars(make(steps, config.pattern)) for make in TRAINED.get(find_name(config), {}).values()]
        usual, asked = [{f.name: f.default for f in fields(config)}, *made], set(vars(config))
    else:
        usual, asked = [vars(recipe.changed(options={}).config(has_data, steps))], set(recipe.options)
    given = [n for n in config.idle if n in asked and all(getattr(config, n) != known[n] for known in usual)]
    loss = recipe.objective.idle if recipe.objective is not None and isinstance(config, TrainedConfig) else {}
    told = [f"{n} of the objective is given and not used: {why}" for n, why in loss.items()]
    return [f"{n} is given and not used: {config.idle[n]}" for n in given] + told


def unused_for_experts(config: MethodConfig, sites: Sequence[LinearSite]) -> list[str]:
    """A sentence for each option about experts that differs from its default where no experts become sparse."""
    if any(site.experts is not None for site in eligible(sites)):
        return []
    given = {"expert_tokens": EXPERT_TOKENS, "every_token": False}
    asked = [name for name, default in given.items() if getattr(config, name, default) != default]
    return [f"{name} is given and not used: no experts of a mixture become sparse in this run" for name in asked]


def _differs(value: Any, default: Any) -> bool:
    plain = isinstance(value, str | int | float | bool | None) or type(value) is type(default)
    return not plain or value != default
