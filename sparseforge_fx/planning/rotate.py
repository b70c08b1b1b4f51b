"""``rotate``: the same function in a basis in which 2:4 loses less, before anything is pruned."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import as_call
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.graph.forward import unwrapped
from sparseforge_fx.methods.one_shot import SparseGPTConfig
from sparseforge_fx.methods.rotate import Term, find_rotation
from sparseforge_fx.models.ties import untied
from sparseforge_fx.passes.find_linears import LinearSite, find_linears
from sparseforge_fx.passes.find_rotations import find_rotations
from sparseforge_fx.passes.globs import Globs
from sparseforge_fx.passes.spaces import Norm, Rotation
from sparseforge_fx.pattern import TWO_FOUR, Pattern, parse_pattern
from sparseforge_fx.planning.observe import READING, check_answer, observe
from sparseforge_fx.ranges import Count, Positive, checked
from sparseforge_fx.report import environment
from sparseforge_fx.training.distillation import Distillation
from sparseforge_fx.training.inputs import Run, open_run
from sparseforge_fx.training.objective import Objective
from sparseforge_fx.training.recipe import Recipe
from sparseforge_fx.training.undo import dense_again_on_error
from sparseforge_fx.training.unused import unused_arguments

CALIBRATION = 32  # sequences
#: share of a weight's entries: dense ones have some, where small numbers underflow
MOST_ZEROS = 0.05


@checked
@torch.inference_mode(False)
@torch.no_grad()
def rotate(
    model: nn.Module,
    data: Any,
    *,
    pattern: str | Pattern = TWO_FOUR,
    steps: Count = 300,
    lr: Positive = 1e-2,
    tokenizer: Any = None,
    example_inputs: Any = None,
    cache_dir: str | Path | None = None,
    **reading: Any,
) -> dict[str, Any]:
    """Turn the vectors between the blocks of ``model``, in place, so that its linears lose less when they are pruned.

    The model computes the same before and after it (to rounding, which is checked), with the same modules, so that
    ``sparsify``, ``plan``, ``quantize`` and every exporter take it as they take any model. It works where blocks norm
    what they read (passes/find_rotations.py); scales of norms go into what reads them, and a head that is tied to an
    embedding gets a weight of its own, since the two are no longer the same.

    Args:
        data: as for :func:`sparseforge_fx.sparsify`.
        steps, lr: of the optimizer (methods/rotate.py).
        example_inputs: for capture, where they cannot be made from the model's config or from ``data``.
        cache_dir: where the token file of text is kept.
        reading: fields of a :class:`Recipe` that say what is read: include, exclude (of the linears that count),
            calibration (sequences, default 32), batch_size, length, seed, text_column, separator. A weight that the
            batches do not use (an adapter that is not active, a head for training alone) may need the same vectors:
            these turn if ``exclude`` names it, and it stays as it is.

    Returns a report: of every space its width, how many weights write and read, ``lost_before`` and ``lost_after``
    (shares of what the readers compute that the pattern is predicted to lose); ``error``, relative, of the answers
    after it; notes.

    Raises SparseForgeError, the model as it was, where nothing may be rotated, where what would turn is pruned
    already, or if the answers change.
    """
    wanted = parse_pattern(pattern) if isinstance(pattern, str) else pattern
    if not isinstance(wanted, Pattern):
        raise SparseForgeError(f"a rotation is for the groups of N:M, and {wanted} has none: nothing to do")
    if data is None:
        raise SparseForgeError("a rotation needs data, which says what is lost: pass text, tokens or batches")
    if unknown := sorted(set(reading) - set(READING)):
        raise SparseForgeError(f"a rotation has no option {', '.join(unknown)}; it has {', '.join(READING)}")
    clock = time.monotonic()
    recipe = Recipe(calibration=CALIBRATION).changed(**reading)
    with untied(unwrapped(model)) as parted:
        run = open_run(
            model, data, recipe, SparseGPTConfig(pattern=wanted), None,
            tokenizer=tokenizer, cache_dir=cache_dir, example_inputs=example_inputs,
        )  # fmt: skip
        check_answer(run)
        run.notes += unused_arguments(
            recipe, {"tokenizer": tokenizer, "cache_dir": cache_dir}, data=data, method="a rotation", trains=False,
            calibrates=True, batches=run.batches,
        )  # fmt: skip
        rotations = _rotations(run, wanted, recipe.exclude)
        with dense_again_on_error(run.program) as copies:
            copies += [(tensor, tensor.clone()) for tensor in _written(run.program, rotations)]
            spaces, error = _turn(run, recipe, rotations, wanted, steps=steps, lr=lr)
    frozen = [a.fqn for r, _ in rotations for a in r.axes if not run.program.tensor(a.fqn).requires_grad]
    if frozen:
        more = f" and {len(frozen) - 1} more" if len(frozen) > 1 else ""
        run.notes.append(f"turned like the others, though frozen: {frozen[0]}{more}")
    for name, embedding in parted.items():
        run.notes.append(f"{name} has a weight of its own now: it was that of {embedding}, which is turned otherwise")
    return {
        "pattern": str(wanted), "spaces": spaces, "error": error, "steps": steps, "lr": lr, "seed": recipe.seed,
        "seconds": time.monotonic() - clock,
        "notes": list(dict.fromkeys([*run.notes, *run.reader.notes])), **environment(),
    }  # fmt: skip


def _rotations(run: Run, pattern: Pattern, exclude: Globs) -> list[tuple[Rotation, list[LinearSite]]]:
    """With the readers that are to be pruned."""
    sites = {site.fqn: site for site in run.sites if site.reason is None}
    found, reasons = find_rotations(run.program, find_linears(run.program, Pattern(1, 1), "*"), exclude)
    reading = [(rotation, [sites[a.fqn] for a in rotation.readers.values() if a.fqn in sites]) for rotation in found]
    useful = [(r, s) for r, s in reading if s and r.width % pattern.m == 0 and r.width > pattern.m]
    run.notes += [f"some vectors keep their basis: {reason}" for reason in reasons]
    if not useful:
        why = reasons[0] if reasons else "no linear to prune reads what others write, through norms and sums alone"
        raise SparseForgeError(f"nothing of {type(run.program.source).__name__} can be rotated: {why}")
    for axis in (axis for rotation, _ in useful for axis in rotation.axes):
        weight = run.program.tensor(axis.fqn)
        if weight.dim() > 1 and (share := _zeros(weight, axis.dim)) > MOST_ZEROS:
            told = f"{share:.0%} of {axis.fqn} are zeros, which another basis fills"
            raise SparseForgeError(f"{told}: rotate the dense model, and prune it then")
    return useful


def _zeros(tensor: Tensor, dim: int) -> float:
    """Their share in the vectors along this dimension, but for those that are zero as a whole: they stay so."""
    vectors = (tensor != 0).transpose(dim, -1).reshape(-1, tensor.shape[dim])
    some = vectors[vectors.any(-1)]
    return 1 - float(some.double().mean()) if some.numel() else 0.0


def _written(program: Exported, rotations: Sequence[tuple[Rotation, Any]]) -> Iterator[Tensor]:
    for name in sorted({name for rotation, _ in rotations for name in rotation.names}):
        yield program.tensor(name)


def _turn(
    run: Run,
    recipe: Recipe,
    rotations: Sequence[tuple[Rotation, list[LinearSite]]],
    pattern: Pattern,
    **how: Any,
) -> tuple[list[dict[str, Any]], float]:
    """Fold the norms' scales, learn, rotate, compare."""
    before = _answer(run)
    for norm in (norm for rotation, _ in rotations for norm in rotation.norms):
        _fold(run.program, norm)
    sites = [site for _, reading in rotations for site in reading]
    terms = _terms(run, recipe, sites)
    spaces = []
    for rotation, reading in rotations:
        found = find_rotation(
            [terms[s.fqn] for s in reading], pattern, centred=rotation.centred, seed=recipe.seed, **how
        )
        for axis in rotation.axes:
            _rotate(run.program.tensor(axis.fqn), axis.dim, found.matrix)
        spaces.append(
            {
                "width": rotation.width, "turned": len(rotation.axes), "readers": len(reading),
                "centred": rotation.centred, "lost_before": found.before, "lost_after": found.after,
            }
        )  # fmt: skip
    after = _answer(run)
    error = float((after - before).norm() / before.norm().clamp(min=1e-30))
    allowed = max(torch.finfo(run.program.tensor(site.fqn).dtype).eps for site in sites) ** 0.5
    if not error <= allowed:
        raise SparseForgeError(f"the rotated model answers otherwise (by {error:.2g} of its answers' size): not taken")
    return spaces, error


def _answer(run: Run) -> Tensor:
    """To the first batch."""
    assert run.batches is not None
    batch = run.reader.read(*as_call(run.batches.batch(0)))
    objective = Objective(Distillation(task=0), getattr(run.program.source, "config", None), run.reader.note)
    return objective.answer(run.program.module()(*batch.args, **batch.kwargs)).value.double()


def _terms(run: Run, recipe: Recipe, sites: Sequence[LinearSite]) -> dict[str, Term]:
    terms: dict[str, Term] = {}
    moments: Tensor | None = None

    def see(name: str, weight: Tensor, found: Tensor, curvature: Tensor) -> None:
        nonlocal moments
        if moments is None or not torch.equal(moments, found):  # q, k and v read the same: one matrix
            moments = found
        terms[name] = Term(weight * curvature.sqrt()[:, None], moments)

    observe(run, recipe, sites, see, "lose")
    return terms


def _fold(program: Exported, norm: Norm) -> None:
    """What reads the normed vectors takes the scale, up to one number, which stays: weights keep their size on the
    whole, since a learning rate that suits them does not suit others. A shift is then in units of what they took."""
    scale = program.tensor(norm.scale)
    factor = scale.double() + norm.offset
    weights = [(program.tensor(axis.fqn), axis.dim) for axis in norm.readers]
    scaled = [weight.double() * _along(factor, weight, dim) for weight, dim in weights]
    size = sum(float(w.square().sum()) for w in scaled) / (
        sum(float(w.double().square().sum()) for w, _ in weights) or 1
    )
    left = size**0.5 or 1.0
    if norm.shift is not None:
        shift = program.tensor(norm.shift)
        small = factor.abs() < 1e-4 * factor.abs().max()
        if bool((small & (shift != 0)).any()):
            raise SparseForgeError(f"{norm.scale} is zero where {norm.shift} is not: its norm cannot be folded")
        shift.copy_(shift.double() * left / torch.where(small, 1.0, factor))
    for (weight, _), value in zip(weights, scaled, strict=True):
        weight.copy_(value / left)
    scale.fill_(left - norm.offset)


def _along(factor: Tensor, weight: Tensor, dim: int) -> Tensor:
    """As a tensor that is multiplied along this dimension."""
    return factor.view([-1 if d == dim else 1 for d in range(weight.dim())])


def _rotate(tensor: Tensor, dim: int, matrix: Tensor) -> None:
    turned = tensor.double().transpose(dim, -1) @ matrix.to(tensor.device)
    tensor.copy_(turned.transpose(dim, -1))
