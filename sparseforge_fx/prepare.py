"""``prepare`` and ``finalize``: into the soft-masked model, and out of it to exact N:M."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_fx.capture import capture
from sparseforge_fx.distill import check_losses
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.base import MethodConfig
from sparseforge_fx.passes import LinearSite, find_linears, harden_masks, run_passes
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.insert_low_rank import branch_names
from sparseforge_fx.pattern import check_pattern
from sparseforge_fx.program import Program
from sparseforge_fx.ranges import AtLeastZero, Count, checked
from sparseforge_fx.reading import example_of
from sparseforge_fx.sparse_model import SparseModel


@checked
def prepare(
    model: nn.Module,
    example_inputs: Any = None,
    config: MethodConfig | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    calibration: Sequence[Any] | None = None,
    w_task: AtLeastZero = 1.0,
    w_kl: AtLeastZero = 1.0,
    divergence: str = "kl",
    features: str | None = None,
    w_features: AtLeastZero = 1.0,
    slorb_block: Count | None = None,
    compile: bool = False,
) -> SparseModel:
    """Capture ``model`` and give it soft masks, curvature probes and a dense teacher, for a loop of one's own.

    Args:
        example_inputs: as for :func:`sparseforge_fx.capture.capture`; ``labels`` in it are left to the loss.
        config: what :func:`configure`, :func:`paper_preset` or :func:`tuned_preset` made; holds the number of steps.
        include, exclude: globs over weight or module names.
        calibration: batches for a config with a layer-wise ``start``.
        w_task, w_kl, divergence, features, w_features: the loss, as for :func:`sparseforge_fx.sparsify`.
        slorb_block: width of SLoRB's blocks; None for no low-rank branch.

    Raises SparseForgeError if nothing is eligible (with the reasons), or if weights are not finite.
    """
    if config is None:
        raise SparseForgeError(
            "prepare needs a config that knows the run's length: pass paper_preset(steps) or tuned_preset(steps)"
        )
    if not config.by_gradient:
        raise SparseForgeError(f"{type(config).__name__} learns without gradients: run it with sparsify()")
    check_losses(divergence, features)
    program = capture(model, None if example_inputs is None else example_of(model, example_inputs))
    sites = find_linears(program, config.pattern, include, exclude)
    check_sites(program, sites)
    if config.start != "dense" and calibration is None:
        raise SparseForgeError(
            "this preset starts from a layer-wise solution: pass calibration=[batches], or use paper_preset"
        )
    sparse = SparseModel(
        program, sites, config, w_task=w_task, w_kl=w_kl, divergence=divergence,
        features=features, w_features=w_features, slorb_block=slorb_block,
    )  # fmt: skip
    if calibration is not None and config.start != "dense":
        sparse.calibrate(calibration)
    if compile:
        sparse.compile()
    return sparse


def check_sites(program: Program, sites: Sequence[LinearSite]) -> None:
    """Raise a SparseForgeError if there is nothing to prune, or a weight that cannot be ranked."""
    if not eligible(sites):
        reasons = "; ".join(f"{s.fqn}: {s.reason}" for s in sites[:4]) or "the graph has no linear layer"
        raise SparseForgeError(f"nothing to prune: {reasons}")
    for site in eligible(sites):
        value = program.tensor(site.fqn)
        if value.is_meta:
            raise SparseForgeError(f"{site.fqn} is on the meta device: load the model's weights first")
        if not torch.isfinite(value).all():
            raise SparseForgeError(f"{site.fqn} holds NaN or infinite values: repair the checkpoint first")


def finalize(sparse: SparseModel) -> nn.Module:
    """Fix the masks, fold them into the weights (exact N:M, in place) and return the source model object.

    SLoRB branches become a child ``slorb`` of the module that owns the weight, added by a forward hook. A weight that
    two modules share gets its branch on the first.
    """
    sparse.method.fix()
    hardened, records = run_passes(sparse.program, [lambda p: harden_masks(p, sparse.method.config.pattern)])
    sparse.pass_records += records
    sparse.release()
    sparse.program = hardened
    for site in eligible(sparse.sites):
        if not check_pattern(hardened.tensor(site.fqn), sparse.method.config.pattern, site.reduction_dim):
            raise AssertionError(f"{site.fqn} is not {sparse.method.config.pattern} after hardening")
    source = sparse.dense.source
    assert source is not None
    for site in eligible(sparse.sites):
        x_name, s_name = branch_names(site.fqn)
        if x_name in hardened.state:
            owner = source.get_submodule(site.fqn.rpartition(".")[0])
            owner.add_module("slorb", LowRankBranch(hardened.tensor(x_name), hardened.tensor(s_name)))
            owner.register_forward_hook(LowRankBranch.add)
    return source


class LowRankBranch(nn.Module):
    """SLoRB's y + (x X^T) S^T beside a linear of the source model: X [rank, in], S [out, rank]."""

    def __init__(self, x: Tensor, s: Tensor):
        super().__init__()
        self.x, self.s = nn.Parameter(x.detach()), nn.Parameter(s.detach())

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(inputs, self.x), self.s)

    @staticmethod
    def add(owner: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Forward hook of the linear that owns a branch."""
        return output + owner.get_submodule("slorb")(args[0])
