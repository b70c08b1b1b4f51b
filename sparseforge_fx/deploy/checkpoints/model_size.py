"""How many modules a configuration asks for, found out without building more of them than there may be.

Some would take hours or all memory. Which of its entries say so differs from model to model: modules are counted.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers  # its classes when they are used: it may still be on its way
from torch.nn.modules.module import register_module_module_registration_hook

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.models.dense import model_class


def check_size(config: Any, most: int) -> None:
    """Raise SparseForgeError if the configuration asks for a model of more than ``most`` modules."""
    with at_most(most):
        for build in (transformers.AutoModel.from_config, _architecture):  # the first goes by what the configuration is
            try:
                with torch.device("meta"):
                    build(copy.deepcopy(config), trust_remote_code=False)
                return
            except SparseForgeError:
                raise
            except Exception:  # an open set; the loader builds the model again, and says in its words what is wrong
                continue


def _architecture(config: Any, trust_remote_code: bool) -> Any:
    named = model_class(config)
    return named(config) if issubclass(named, transformers.PreTrainedModel) else None


@contextmanager
def at_most(modules: int) -> Iterator[None]:
    """Within it, a model that this thread builds of more modules ends in a SparseForgeError."""
    left, thread = modules, threading.get_ident()

    def count(*_: Any) -> None:
        nonlocal left
        if threading.get_ident() != thread:
            return
        left -= 1
        if left < 0:
            raise SparseForgeError(
                f"config.json makes a model of more than {modules} modules, and the checkpoint has not so many: "
                "it is damaged"
            )

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
