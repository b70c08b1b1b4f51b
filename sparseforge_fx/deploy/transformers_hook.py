"""``import sparseforge_fx`` lets transformers load packed checkpoints and PEFT adapt them, without importing either.

transformers has no entry points for quantizers, and one that does not know the ``quant_method`` of a checkpoint goes on
with random weights in the place of packed ones. PEFT has none for layer types, and refuses those that it does not know.
So ours are registered right after the module with their tables is imported, whoever does that and whenever.

Both import torchao if it is there, which says on standard error that some of its libraries are for other machines: to
nobody's use here, so it is not heard while they do.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLES = "transformers.quantizers.auto"
QUANTIZER = "sparseforge_fx.deploy.checkpoints.quantizer"
#: after which module comes which
OURS = {TABLES: QUANTIZER, "peft.tuners.lora": "sparseforge_fx.deploy.adapters.lora_layer"}


@contextmanager
def torchao_unheard() -> Iterator[None]:
    """What torchao logs while it is imported, errors excepted, goes nowhere."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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
            with torchao_unheard():
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
