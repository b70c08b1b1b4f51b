"""``import sparseforge_fx`` lets transformers load packed checkpoints, without importing transformers.

transformers has no entry points for quantizers, and one that does not know the ``quant_method`` of a checkpoint goes on
with random weights in the place of packed ones. So the quantizer is registered right after the module with
transformers' tables is imported, whoever does that and whenever.
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


class _AfterTables(MetaPathFinder):
    """Leaves the import of one module to the other finders, and imports ours after it."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(QUANTIZER)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register the quantizer: now, if transformers is there, else when it comes."""
    if TABLES in sys.modules:
        importlib.import_module(QUANTIZER)
    elif not any(isinstance(finder, _AfterTables) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTables())
