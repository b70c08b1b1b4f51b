"""Every method by the name that users type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, get_type_hints

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.cast import CastConfig
from sparseforge_fx.methods.config import MethodConfig
from sparseforge_fx.methods.gradual import GradualConfig
from sparseforge_fx.methods.learned import MaskLLMConfig, MaskProConfig
from sparseforge_fx.methods.one_shot import LAYERWISE, MagnitudeConfig
from sparseforge_fx.methods.soft_mask import paper_preset, tuned_preset
from sparseforge_fx.methods.ste import ast_preset, sr_ste_preset
from sparseforge_fx.pattern import TWO_FOUR, AnyPattern, parse_pattern
from sparseforge_fx.ranges import Count, checked

Preset = Callable[..., TrainedConfig]  # (steps, pattern, **changes of single fields)


def _preset(base: type[TrainedConfig], **constants: Any) -> Preset:
    def make(steps: int, pattern: AnyPattern = TWO_FOUR, **changes: Any) -> TrainedConfig:
        return replace(base(steps=steps, pattern=pattern, **constants), **changes)

    return make


#: trained methods; the first preset is the one that is taken if none is named
TRAINED: dict[str, dict[str, Preset]] = {
    "sparseforge": {"tuned": tuned_preset, "paper": paper_preset},
    "gmp": {"paper": _preset(GradualConfig)},
    "imp": {"paper": _preset(GradualConfig, ramp="rounds")},
    "sr-ste": {"paper": sr_ste_preset},
    "ast": {"paper": ast_preset},
    "cast": {"paper": _preset(CastConfig)},
    "maskllm": {"paper": _preset(MaskLLMConfig, start="sparsegpt")},
    "maskpro": {"paper": _preset(MaskProConfig, start="sparsegpt")},
}
ONE_SHOT: dict[str, type[MethodConfig]] = {"magnitude": MagnitudeConfig, **LAYERWISE}
METHODS = (*ONE_SHOT, *TRAINED)


@checked
def configure(
    method: str, steps: Count | None = None, *, preset: str | None = None, pattern: str | AnyPattern = "2:4",
    **changes: Any,
) -> MethodConfig:  # fmt: skip
    """A method's constants, for :func:`sparseforge_fx.sparsify` and :func:`sparseforge_fx.prepare`.

    Args:
        method: a name of :data:`METHODS`.
        steps: optimizer steps of the run, of a method that trains.
        preset: of ``sparseforge``: ``tuned`` (the default) or ``paper``.
        pattern: ``"2:4"``, any N:M, ``"50%"``, or a pattern.
        changes: fields of the method's config.

    Raises SparseForgeError for an unknown method, preset or field, and for steps where there are none or none are
    given.
    """
    find_preset(method, preset)
    unknown = set(changes) - set(find_options(method))
    if unknown:
        raise SparseForgeError(f"method {method} has no option {', '.join(sorted(unknown))}")
    shape = parse_pattern(pattern)
    if method in ONE_SHOT:
        if steps is not None:
            raise SparseForgeError(f"{method} does not train: leave out steps")
        return ONE_SHOT[method](shape, **changes)
    if steps is None:
        raise SparseForgeError(f"{method} trains: give the number of steps of the run")
    return TRAINED[method][find_preset(method, preset) or ""](steps, shape, **changes)


def find_preset(method: str, preset: str | None = None) -> str | None:
    """The name of a trained method's preset, by default its first; None for a method that does not train.

    Raises SparseForgeError if there is no such method or preset.
    """
    if method not in METHODS:
        raise SparseForgeError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    presets = TRAINED.get(method, {})
    if preset is not None and preset not in presets:
        raise SparseForgeError(f"unknown preset {preset!r} of {method}; choose one of {', '.join(presets) or 'none'}")
    return preset or next(iter(presets), None)


def find_options(method: str) -> dict[str, Any]:
    """What can be set of a method beside its pattern and its steps: option -> type."""
    config = _config_class(method)
    hints = get_type_hints(config)
    return {f.name: hints[f.name] for f in fields(config) if f.name not in ("steps", "pattern")}


def find_name(config: MethodConfig) -> str:
    """A method of which this is a config; with all of its fields as changes, :func:`configure` gives it again."""
    return next(name for name in METHODS if _config_class(name) is type(config))


def _config_class(method: str) -> type[MethodConfig]:
    if method in ONE_SHOT:
        return ONE_SHOT[method]
    return type(next(iter(TRAINED[method].values()))(1))
