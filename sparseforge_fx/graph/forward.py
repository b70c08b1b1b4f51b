"""What a model's forward takes, whatever wraps the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn

from sparseforge_fx.errors import SparseForgeError

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of torch.compile's or a data-parallel wrapper: the same parameters under their own names.

    Raises a SparseForgeError unless ``model`` is an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise SparseForgeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    return extract_model_from_parallel(model, keep_fp32_wrapper=True, keep_torch_compile=False)


def signature_of(model: nn.Module) -> inspect.Signature:
    """Of forward; where a wrapper's takes just anything, of the model that it says it wraps (PEFT's tuners)."""
    model = unwrapped(model)
    found = inspect.signature(model.forward)
    if all(p.kind in VARIADIC for p in found.parameters.values()) and hasattr(model, "get_base_model"):
        return signature_of(model.get_base_model())  # type: ignore[operator]
    return found


def named_parameters(model: nn.Module) -> tuple[dict[str, inspect.Parameter], bool]:
    """Named inputs of forward, and whether it names none but takes anything by name."""
    found = signature_of(model).parameters
    named = {n: p for n, p in found.items() if p.kind not in VARIADIC}
    return named, not named and any(p.kind == p.VAR_KEYWORD for p in found.values())


def positional_names(model: nn.Module, count: int) -> list[str]:
    """Names of the first ``count`` positional inputs of a model's forward; *args have a number each."""
    names: list[str] = []
    for name, parameter in signature_of(model).parameters.items():
        if parameter.kind == parameter.VAR_POSITIONAL:
            names += [f"{name}[{i}]" for i in range(count)]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(name)
    return names[:count]


@contextmanager
def spelled_out(model: nn.Module, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Within the block, a forward that would take ``kwargs`` as its ``**kwargs`` names each of them in its signature:
    torch.export gives dynamic sizes to named inputs only."""
    forward = model.forward
    parameters = inspect.signature(forward).parameters
    extra = [n for n in kwargs if n not in parameters]
    variadic = next((p for p in parameters.values() if p.kind == p.VAR_KEYWORD), None)
    if not extra or variadic is None:
        yield
        return

    def named(*args: Any, **inputs: Any) -> Any:
        return forward(*args, **inputs)

    kept = [p for p in parameters.values() if p is not variadic]
    own = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in extra]
    named.__signature__ = inspect.Signature([*kept, *own])  # type: ignore[attr-defined]
    had = "forward" in model.__dict__
    model.forward = named
    try:
        yield
    finally:
        if had:
            model.forward = forward
        else:
            del model.forward
