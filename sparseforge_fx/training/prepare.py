"""``prepare`` and ``finalize``: into the soft-masked model, and out of it to exact N:M."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_fx.data.batches import as_batches, is_text
from sparseforge_fx.data.opening import LENGTH, text_length
from sparseforge_fx.data.reading import example_of
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import capture, has_no_values
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.graph.forward import unwrapped
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.config import MethodConfig
from sparseforge_fx.methods.curvature import DRAWN
from sparseforge_fx.models import low_rank
from sparseforge_fx.models.low_rank import LowRankBranch, attach
from sparseforge_fx.passes import LinearSite, find_linears, harden_passes, run_passes
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.globs import unmatched
from sparseforge_fx.passes.insert_low_rank import branch_names
from sparseforge_fx.pattern import check_pattern
from sparseforge_fx.ranges import Count, Seed, checked
from sparseforge_fx.training.basis import check_basis
from sparseforge_fx.training.distillation import Distillation, check_objective
from sparseforge_fx.training.recipe import Recipe
from sparseforge_fx.training.sharded import Sharding
from sparseforge_fx.training.sparse_model import SparseModel
from sparseforge_fx.training.teacher import weights_of
from sparseforge_fx.training.trainable import choose_trainable
from sparseforge_fx.training.undo import dense_again_on_error
from sparseforge_fx.training.unused import UNCALIBRATED, UNDRAWN, UNTAUGHT, unused_for_experts, unused_options


@checked
@torch.inference_mode(False)
@torch.enable_grad()  # training needs both, whatever the caller stands in
def prepare(
    model: nn.Module,
    example_inputs: Any = None,
    config: MethodConfig | None = None,
    *,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    calibration: Any = None,
    objective: Distillation | None = None,
    slorb_block: Count | None = None,
    teacher: nn.Module | None = None,
    compile: bool = False,
    seed: Seed = 0,
) -> SparseModel:
    """Capture ``model`` and give it soft masks, curvature probes and a dense teacher, for a loop of one's own.

    What trains is what :func:`sparseforge_fx.sparsify` trains: the sites and all vectors (norms, biases); other
    matrices do not require grad until :func:`finalize`.

    Args:
        example_inputs: as for :func:`sparseforge_fx.graph.capture.capture`; ``labels`` in it are left to the loss.
        config: what :func:`configure`, :func:`annealed_preset` or another preset made; holds the number of steps.
            What a preset's authors set beside the method is for the caller to give: for ``paper`` an objective with
            ``temperature=2``, ``slorb_block=64``, and a weight decay of 0.1 for the optimizer.
        include, exclude: globs over weight or module names.
        calibration: for a config with a layer-wise ``start``: batches or token ids, as :func:`as_batches` takes them,
            or an iterator over batches. All of them are looked at, once.
        objective: the loss; default: cross-entropy and KL from the dense model, both with the weight 1.
        slorb_block: width of SLoRB's blocks; None for no low-rank branch.
        teacher: the same model as it was before it was pruned, for a ``model`` that is N:M already; None: ``model``
            itself, as it is now.
        seed: of what the curvature draws (``fisher``, ``hutchinson``), and of the order of ``calibration``.

    What of this has no part in the run is named in ``reader.notes`` of what is returned. Raises SparseForgeError if
    nothing is eligible (with the reasons), or if weights are not finite.
    """
    if config is None:
        raise SparseForgeError(
            "prepare needs a config that knows the run's length: pass annealed_preset(steps) or alps_kd_preset(steps)"
        )
    if not isinstance(config, TrainedConfig):
        raise SparseForgeError(f"{type(config).__name__} is of a method that does not train: run it with sparsify()")
    if not config.by_gradient:
        raise SparseForgeError(f"{type(config).__name__} learns without gradients: run it with sparsify()")
    if config.values != "float":
        raise SparseForgeError(f"values {config.values!r} are rounded by the loop of sparsify(): train with that")
    if objective is not None:
        check_objective(objective)
    check_weights(model)
    program = capture(model, None if example_inputs is None else example_of(model, example_inputs))
    sites = find_linears(program, config.pattern, include, exclude)
    check_sites(program, sites)
    if config.calibrates and calibration is None:
        raise SparseForgeError(
            "this preset starts from a layer-wise solution: pass calibration=[batches], or use annealed_preset"
        )
    calibrated = _calibration(model, calibration, seed) if config.calibrates else []
    taught_by = None if teacher is None else weights_of(teacher, program)
    check_basis(sites, program.state, taught_by, config, objective)
    with dense_again_on_error(program) as written:
        sparse = prepare_captured(
            program, sites, config, objective, slorb_block=slorb_block, taught_by=taught_by, seed=seed
        )
        if config.start != "dense":
            written += sparse.copies() if sparse.teacher is not None else []  # calibrate has copies of its own
            sparse.calibrate(calibrated)
        if compile:
            sparse.compile()
    told = [*unmatched(model, include=include, exclude=exclude), *unused_for_experts(config, sites)]
    told += unused_options(config, Recipe(method=config, objective=objective), True)
    unused = {
        "calibration": UNCALIBRATED if calibration is not None and not config.calibrates else None,
        "teacher": UNTAUGHT if teacher is not None and sparse.teacher is None and not config.reconstruct else None,
        "seed": UNDRAWN if seed != 0 and not (config.calibrates or _draws(sparse)) else None,
    }
    for sentence in [*told, *(f"{name} is given and not used: {why}" for name, why in unused.items() if why)]:
        sparse.reader.note(sentence)
    return sparse


def _draws(sparse: SparseModel) -> bool:
    """Is there anything random in what a step estimates?"""
    curvature = sparse.method.curvature
    return curvature is not None and curvature.estimator in DRAWN


def _calibration(model: nn.Module, given: Any, seed: int = 0) -> list[Any]:
    """The batches of a calibration set. Raises a SparseForgeError if it has none, or is none."""
    if is_text(given):
        raise SparseForgeError("calibration is text: tokenise it and pass token ids or batches")
    given = list(given) if isinstance(given, Iterator) else given
    length = text_length(model, LENGTH)
    batches = list(as_batches(given, batch_size=Recipe.batch_size, length=length, seed=seed).first_pass())
    example_of(model, batches[0])  # refuses what is no batch
    return batches


def prepare_captured(
    program: Exported,
    sites: Sequence[LinearSite],
    config: TrainedConfig,
    objective: Distillation | None = None,
    *,
    slorb_block: int | None = None,
    sharding: Sharding | None = None,
    taught_by: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> SparseModel:
    """The soft-masked model of a captured one, whose parameters require grad where they train. To be called inside of
    :func:`dense_again_on_error`. ``taught_by``: of :func:`weights_of`; ``seed``: of what curvature draws."""
    set_back = choose_trainable(program, sites, config)
    return SparseModel(
        program, sites, config, objective, slorb_block=slorb_block, set_back=set_back, sharding=sharding,
        taught_by=taught_by, seed=seed,
    )  # fmt: skip


def check_weights(model: nn.Module) -> None:
    """Raise a SparseForgeError unless the weights are here, all of them: a capture would take its time first."""
    absent = next((n for n, p in unwrapped(model).named_parameters() if p.is_meta), None)
    if absent is not None:
        parts = set(map(str, getattr(model, "hf_device_map", {}).values())) & {"cpu", "disk"}
        why = f"{' and '.join(sorted(parts))} hold them until they are asked for" if parts else "it has a shape alone"
        raise SparseForgeError(
            f"{absent} is on the meta device ({why}): load the model with all of its weights, and without a device_map "
            "that offloads them"
        )


def check_sites(program: Exported, sites: Sequence[LinearSite]) -> None:
    """Raise a SparseForgeError if there is nothing to prune, or a weight that cannot be ranked."""
    if program.source is not None and low_rank.branches(program.source):
        raise SparseForgeError("the model has low-rank branches already: start from the dense model")
    if program.graph.find_nodes(op="call_function", target=OP):
        raise SparseForgeError("linears of the model are packed: start from the dense model (model.dequantize())")
    if not eligible(sites):
        reasons = "; ".join(f"{s.fqn}: {s.reason}" for s in sites[:4]) or "the graph has no linear layer"
        raise SparseForgeError(f"nothing to prune: {reasons}")
    for site in eligible(sites):
        value = program.tensor(site.fqn)
        if not has_no_values(value) and not torch.isfinite(value).all():  # on disk: when it is fetched
            raise SparseForgeError(f"{site.fqn} holds NaN or infinite values: repair the checkpoint first")


def finalize(sparse: SparseModel) -> nn.Module:
    """Fix the masks, fold them into the weights (exact N:M, in place) and return the source model object.

    SLoRB branches become a child ``slorb`` of the module that owns the weight, added by a forward hook.
    """
    sparse.fix()
    hardened, records = run_passes(sparse.program, harden_passes(sparse.method.config.pattern))
    sparse.pass_records += records
    if sparse.shards is not None:
        sparse.shards.give_back(sparse.dense)
    sparse.release()
    sparse.program = hardened
    for site in eligible(sparse.sites):
        if not check_pattern(hardened.tensor(site.fqn), sparse.method.config.pattern, site.reduction_dim):
            raise AssertionError(f"{site.fqn} is not {sparse.method.config.pattern} after hardening")
    source = sparse.dense.source
    assert source is not None
    for branch in sparse.branches:
        x, s = (hardened.tensor(name) for name in branch_names(branch.weight.fqn))
        attach(source.get_submodule(branch.weight.fqn.rpartition(".")[0]), LowRankBranch(x, s))
    return source
