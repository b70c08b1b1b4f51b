"""``import sparseforge_fx`` lets transformers load packed checkpoints and PEFT adapt them, without importing either.

transformers has no entry points for quantizers, and one that does not know the ``quant_method`` of a checkpoint goes on
with random weights in the place of packed ones. PEFT has none for layer types, and refuses those that it does not know.
So ours are registered right after the module with their tables is imported, whoever does that and whenever.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLES = "transformers.quantizers.auto"
QUANTIZER = "sparseforge_fx.deploy.quantizer"
OURS = {TABLES: QUANTIZER, "peft.tuners.lora": "sparseforge_fx.deploy.lora_layer"}  # after which module comes which


class _After(MetaPathFinder):
    """Leaves the import of one module to the other finders, and imports ours after it."""

    def __init__(self, theirs: str):
        self.theirs = theirs

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.theirs:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(OURS[name])

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register ours: now, if the module of theirs is there, else when it comes."""
    waiting = {finder.theirs for finder in sys.meta_path if isinstance(finder, _After)}
    for theirs, ours in OURS.items():
        if theirs in sys.modules:
            importlib.import_module(ours)
        elif theirs not in waiting:
            sys.meta_path.insert(0, _After(theirs))
