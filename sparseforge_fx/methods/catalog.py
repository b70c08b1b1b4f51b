"""Every method by the name that users type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_type_hints

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.cast import CastConfig
from sparseforge_fx.methods.config import Beside, MethodConfig
from sparseforge_fx.methods.gradual import GradualConfig
from sparseforge_fx.methods.learned import MaskLLMConfig, MaskProConfig
from sparseforge_fx.methods.one_shot import LAYERWISE, MagnitudeConfig
from sparseforge_fx.methods.presets import (
    PAPER_BESIDE,
    UNIVERSAL_BESIDE,
    alps_kd_preset,
    annealed_preset,
    paper_preset,
    paper_universal_preset,
)
from sparseforge_fx.methods.ste import AST_BESIDE, ast_preset, sr_ste_preset
from sparseforge_fx.pattern import TWO_FOUR, AnyPattern, parse_pattern
from sparseforge_fx.ranges import Count, checked


@dataclass(frozen=True)
class Preset:
    """Constants by name: called with (steps, pattern, **changes of single fields) it gives the method's config.
    ``beside`` is what its authors set outside of the method."""

    make: Callable[..., TrainedConfig]
    beside: Beside = field(default_factory=Beside)

    def __call__(self, steps: int, pattern: AnyPattern = TWO_FOUR, **changes: Any) -> TrainedConfig:
        return self.make(steps, pattern, **changes)


def _preset(base: type[TrainedConfig], **constants: Any) -> Preset:
    def make(steps: int, pattern: AnyPattern, **changes: Any) -> TrainedConfig:
        return replace(base(steps=steps, pattern=pattern, **constants), **changes)

    return Preset(make)


#: trained methods; the first preset is the one that is taken if none is named
TRAINED: dict[str, dict[str, Preset]] = {
    "sparseforge": {
        "alps+kd": Preset(alps_kd_preset),
        "paper": Preset(paper_preset, PAPER_BESIDE),
        "paper-universal": Preset(paper_universal_preset, UNIVERSAL_BESIDE),
        "annealed": Preset(annealed_preset),
    },
    "gmp": {"paper": _preset(GradualConfig)},
    "imp": {"paper": _preset(GradualConfig, ramp="rounds")},
    "sr-ste": {"paper": Preset(sr_ste_preset)},
    "ast": {"paper": Preset(ast_preset, AST_BESIDE)},
    "cast": {"paper": _preset(CastConfig)},
    "maskllm": {"paper": _preset(MaskLLMConfig, start="sparsegpt")},
    "maskpro": {"paper": _preset(MaskProConfig, start="sparsegpt")},
}
#: presets that had another name: recipes and commands of that time still run
FORMER = {"tuned": "alps+kd"}
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
        preset: of ``sparseforge``: ``alps+kd`` (the default), ``paper``, ``paper-universal`` or ``annealed``
            (methods/presets.py).
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
    """The name of a trained method's preset, by default its first; None for a method that does not train. A name of
    :data:`FORMER` gives that of today.

    Raises SparseForgeError if there is no such method or preset.
    """
    if method not in METHODS:
        raise SparseForgeError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    presets = TRAINED.get(method, {})
    if preset not in presets and FORMER.get(preset or "") in presets:
        preset = FORMER[preset or ""]
    if preset is not None and preset not in presets:
        raise SparseForgeError(f"unknown preset {preset!r} of {method}; choose one of {', '.join(presets) or 'none'}")
    return preset or next(iter(presets), None)


def find_beside(method: str, preset: str | None = None) -> Beside:
    """What the authors of a preset set outside of the method; raises as :func:`find_preset` does."""
    name = find_preset(method, preset)
    return Beside() if name is None else TRAINED[method][name].beside


def find_options(method: str) -> dict[str, Any]:
    """What can be set of a method beside its pattern and its steps: option -> type."""
    config = _config_class(method)
    hints = get_type_hints(config)
    return {f.name: hints[f.name] for f in fields(config) if f.name not in ("steps", "pattern")}


def find_name(config: MethodConfig) -> str:
    """A method of which this is a config; with all of its fields as changes, :func:`configure` gives it again. Of a
    config that is named nowhere, its class."""
    return next((name for name in METHODS if _config_class(name) is type(config)), type(config).__name__)


def _config_class(method: str) -> type[MethodConfig]:
    if method in ONE_SHOT:
        return ONE_SHOT[method]
    return type(next(iter(TRAINED[method].values()))(1))
