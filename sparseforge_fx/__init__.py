"""sparseforge_fx: a torch.export / FX compiler that makes PyTorch models 2:4 sparse and keeps their accuracy.

The public names below load when they are first asked for, so that ``sparseforge-fx --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sparseforge_fx import transformers_hook
from sparseforge_fx.errors import SparseForgeError

if TYPE_CHECKING:
    from sparseforge_fx.deploy.archive import check_export
    from sparseforge_fx.deploy.checkpoints import load, pack_checkpoint, save_packed, unpack_checkpoint
    from sparseforge_fx.deploy.export import export
    from sparseforge_fx.deploy.generation import export_generator
    from sparseforge_fx.deploy.generator import Generator, load_generator
    from sparseforge_fx.deploy.lora import merge_lora
    from sparseforge_fx.deploy.lower import lower
    from sparseforge_fx.deploy.modules import lower_modules
    from sparseforge_fx.methods.catalog import configure
    from sparseforge_fx.methods.soft_mask import SparseForgeConfig, paper_preset, tuned_preset
    from sparseforge_fx.models import load_model, save_model
    from sparseforge_fx.prepare import finalize, prepare
    from sparseforge_fx.quantize import quantize
    from sparseforge_fx.sparse_model import SparseModel
    from sparseforge_fx.sparsify import SparsifyResult, sparsify

_HOMES = {
    "SparseForgeConfig": "methods.soft_mask",
    "SparseModel": "sparse_model",
    "SparsifyResult": "sparsify",
    "check_export": "deploy.archive",
    "configure": "methods.catalog",
    "Generator": "deploy.generator",
    "export": "deploy.export",
    "export_generator": "deploy.generation",
    "finalize": "prepare",
    "load": "deploy.checkpoints",
    "load_generator": "deploy.generator",
    "load_model": "models",
    "lower": "deploy.lower",
    "lower_modules": "deploy.modules",
    "merge_lora": "deploy.lora",
    "pack_checkpoint": "deploy.checkpoints",
    "paper_preset": "methods.soft_mask",
    "prepare": "prepare",
    "quantize": "quantize",
    "save_model": "models",
    "save_packed": "deploy.checkpoints",
    "sparsify": "sparsify",
    "tuned_preset": "methods.soft_mask",
    "unpack_checkpoint": "deploy.checkpoints",
}

__all__ = [
    "Generator",
    "SparseForgeConfig",
    "SparseForgeError",
    "SparseModel",
    "SparsifyResult",
    "check_export",
    "configure",
    "export",
    "export_generator",
    "finalize",
    "load",
    "load_generator",
    "load_model",
    "lower",
    "lower_modules",
    "merge_lora",
    "pack_checkpoint",
    "paper_preset",
    "prepare",
    "quantize",
    "save_model",
    "save_packed",
    "sparsify",
    "tuned_preset",
    "unpack_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Importing the submodule ``sparsify`` binds the module to that name of its package; here the function stays."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOMES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
transformers_hook.install()
