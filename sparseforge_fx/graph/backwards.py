"""Backwards of a module's own, which a traced graph does not have: it knows operators, whose gradients are torch's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.autograd import Function


@contextmanager
def functions_called() -> Iterator[list[str]]:
    """Gives the names of the ``torch.autograd.Function`` s, other than torch's, that are applied within the block."""
    names: list[str] = []
    original = Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            names.append(cls.__name__)
        return original.__func__(cls, *args, **kwargs)

    Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield names
    finally:
        Function.apply = original  # type: ignore[method-assign]


def tell_backwards(model: nn.Module, functions: list[str]) -> list[str]:
    """What to say of a graph of ``model``, in which these functions were traced."""
    notes = [
        f"the backward of {name} is not in the graph: gradients there are those of the operators of its forward"
        for name in dict.fromkeys(functions)
    ]
    hooked = [name or "the model" for name, m in model.named_modules() if m._backward_hooks or m._backward_pre_hooks]
    if hooked:
        more = f" and {len(hooked) - 1} more" if len(hooked) > 1 else ""
        notes.append(f"backward hooks are not in the graph, and not called: of {hooked[0]}{more}")
    return notes
