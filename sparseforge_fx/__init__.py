"""sparseforge_fx: a torch.export / FX compiler that makes PyTorch models 2:4 sparse and keeps their accuracy."""

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.soft_mask import SparseForgeConfig, paper_preset, tuned_preset
from sparseforge_fx.prepare import SparseModel, finalize, prepare
from sparseforge_fx.sparsify import SparsifyResult, sparsify

__all__ = [
    "SparseForgeConfig",
    "SparseForgeError",
    "SparseModel",
    "SparsifyResult",
    "finalize",
    "paper_preset",
    "prepare",
    "sparsify",
    "tuned_preset",
]
