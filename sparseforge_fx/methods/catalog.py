"""Every method by the name that users type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, get_type_hints

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.base import MethodConfig
from sparseforge_fx.methods.cast import CastConfig
from sparseforge_fx.methods.gradual import GradualConfig
from sparseforge_fx.methods.learned import MaskLLMConfig, MaskProConfig
from sparseforge_fx.methods.one_shot import LAYERWISE
from sparseforge_fx.methods.soft_mask import paper_preset, tuned_preset
from sparseforge_fx.methods.ste import ast_preset, sr_ste_preset
from sparseforge_fx.pattern import TWO_FOUR, AnyPattern, parse_pattern
from sparseforge_fx.ranges import Count, checked

Preset = Callable[..., MethodConfig]  # (steps, pattern, **changes of single fields)


def _preset(base: type[MethodConfig], **constants: Any) -> Preset:
    def make(steps: int, pattern: AnyPattern = TWO_FOUR, **changes: Any) -> MethodConfig:
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
METHODS = ("magnitude", *LAYERWISE, *TRAINED)


def find_method(name: str, preset: str | None = None) -> tuple[str | None, Preset | None]:
    """The name of a trained method's preset and the preset; (None, None) for a one-shot method.

    Raises SparseForgeError if there is no such method or preset.
    """
    if name not in METHODS:
        raise SparseForgeError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")
    presets = TRAINED.get(name, {})
    if preset is not None and preset not in presets:
        raise SparseForgeError(f"unknown preset {preset!r} of {name}; choose one of {', '.join(presets) or 'none'}")
    if not presets:
        return None, None
    chosen = preset or next(iter(presets))
    return chosen, presets[chosen]


@checked
def configure(
    method: str, steps: Count, *, preset: str | None = None, pattern: str | AnyPattern = "2:4", **changes: Any
) -> MethodConfig:
    """The constants of a trained method over a run of ``steps``, for :func:`sparseforge_fx.prepare`.

    Raises SparseForgeError for a method without training, an unknown preset, or a field that the method has not.
    """
    _, make = find_method(method, preset)
    if make is None:
        raise SparseForgeError(f"{method} does not train: call sparsify(model, data, method={method!r})")
    unknown = set(changes) - set(find_options(method, preset))
    if unknown:
        raise SparseForgeError(f"method {method} has no option {', '.join(sorted(unknown))}")
    return make(steps, parse_pattern(pattern), **changes)


def find_options(name: str, preset: str | None = None) -> dict[str, Any]:
    """What can be set of a method beside its pattern and its steps: option -> type."""
    _, configure = find_method(name, preset)
    if configure is not None:
        config = type(configure(1))
        hints = get_type_hints(config)
        return {f.name: hints[f.name] for f in fields(config) if f.name not in ("steps", "pattern")}
    hints = get_type_hints(LAYERWISE[name]) if name in LAYERWISE else {}
    return {option: kind for option, kind in hints.items() if option not in ("pattern", "return")}
