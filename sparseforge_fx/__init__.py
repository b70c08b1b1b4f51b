"""sparseforge_fx: a torch.export / FX compiler that makes PyTorch models 2:4 sparse and keeps their accuracy.

The public names below load when they are first asked for, so that ``sparseforge-fx --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from sparseforge_fx.deploy import transformers_hook
from sparseforge_fx.errors import SparseForgeError

if TYPE_CHECKING:
    from sparseforge_fx.data.batches import as_batches
    from sparseforge_fx.data.text import load_text
    from sparseforge_fx.deploy.adapters.lora import merge_lora
    from sparseforge_fx.deploy.checkpoints.load import load
    from sparseforge_fx.deploy.checkpoints.save import save_packed
    from sparseforge_fx.deploy.export.archive import check_export
    from sparseforge_fx.deploy.export.export import export
    from sparseforge_fx.deploy.export.generation import export_generator
    from sparseforge_fx.deploy.export.generator import Generator, load_generator
    from sparseforge_fx.deploy.lowering.lower import lower
    from sparseforge_fx.deploy.lowering.modules import lower_modules
    from sparseforge_fx.deploy.lowering.quantize import quantize
    from sparseforge_fx.evaluation.perplexity import perplexity
    from sparseforge_fx.methods.catalog import configure
    from sparseforge_fx.methods.presets import alps_kd_preset, annealed_preset, paper_preset, paper_universal_preset
    from sparseforge_fx.methods.soft_mask import SparseForgeConfig
    from sparseforge_fx.models.streamed import StreamedModel
    from sparseforge_fx.planning.make import plan
    from sparseforge_fx.planning.rotate import rotate
    from sparseforge_fx.plans import Plan
    from sparseforge_fx.training.callback import SparseForgeCallback
    from sparseforge_fx.training.distillation import Distillation
    from sparseforge_fx.training.from_disk import sparsify_on_disk
    from sparseforge_fx.training.prepare import finalize, prepare
    from sparseforge_fx.training.recipe import Recipe
    from sparseforge_fx.training.sparse_model import SparseModel
    from sparseforge_fx.training.sparsify import SparsifyResult, sparsify

_HOMES = {
    "Distillation": "training.distillation",
    "Plan": "plans",
    "Recipe": "training.recipe",
    "SparseForgeCallback": "training.callback",
    "SparseForgeConfig": "methods.soft_mask",
    "SparseModel": "training.sparse_model",
    "SparsifyResult": "training.sparsify",
    "StreamedModel": "models.streamed",
    "alps_kd_preset": "methods.presets",
    "annealed_preset": "methods.presets",
    "as_batches": "data.batches",
    "check_export": "deploy.export.archive",
    "configure": "methods.catalog",
    "Generator": "deploy.export.generator",
    "export": "deploy.export.export",
    "export_generator": "deploy.export.generation",
    "finalize": "training.prepare",
    "load": "deploy.checkpoints.load",
    "load_generator": "deploy.export.generator",
    "load_text": "data.text",
    "lower": "deploy.lowering.lower",
    "lower_modules": "deploy.lowering.modules",
    "merge_lora": "deploy.adapters.lora",
    "paper_preset": "methods.presets",
    "paper_universal_preset": "methods.presets",
    "perplexity": "evaluation.perplexity",
    "plan": "planning.make",
    "prepare": "training.prepare",
    "quantize": "deploy.lowering.quantize",
    "rotate": "planning.rotate",
    "save_packed": "deploy.checkpoints.save",
    "sparsify": "training.sparsify",
    "sparsify_on_disk": "training.from_disk",
}

__all__ = [
    "Distillation",
    "Generator",
    "Plan",
    "Recipe",
    "SparseForgeCallback",
    "SparseForgeConfig",
    "SparseForgeError",
    "SparseModel",
    "SparsifyResult",
    "StreamedModel",
    "alps_kd_preset",
    "annealed_preset",
    "as_batches",
    "check_export",
    "configure",
    "export",
    "export_generator",
    "finalize",
    "load",
    "load_generator",
    "load_text",
    "lower",
    "lower_modules",
    "merge_lora",
    "paper_preset",
    "paper_universal_preset",
    "perplexity",
    "plan",
    "prepare",
    "quantize",
    "rotate",
    "save_packed",
    "sparsify",
    "sparsify_on_disk",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


transformers_hook.install()
