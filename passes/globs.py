"""Names of weights, as users give them: globs over weights and over the modules that they lie in."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from sparseforge_fx.graph.forward import unwrapped

Globs = str | Sequence[str]


def matches(fqn: str, globs: Globs) -> bool:
    """Does a weight's name, or that of a module that it lies in, match one of the globs?"""
    path = fqn.split(".")
    names = [".".join(path[:k]) for k in range(1, len(path) + 1)]
    return any(fnmatchcase(name, glob) for glob in _listed(globs) for name in names)


def unmatched(model: nn.Module, **options: Globs) -> list[str]:
    """A sentence for each glob that names nothing of the model: a misspelt one would go unnoticed. ``options``: the
    globs by what they are called."""
    model = unwrapped(model)
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))]
    return [
        f"{option} {glob!r} is the name of nothing in the model, and without effect"
        for option, globs in options.items()
        for glob in _listed(globs)
        if not any(matches(name, glob) for name in names)
    ]


def _listed(globs: Globs) -> Sequence[str]:
    return [globs] if isinstance(globs, str) else globs
