"""``plan``: a format for every weight, chosen by measured times, bytes and predicted loss under one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_fx.decision import decide
from sparseforge_fx.deploy.lowering import cost, cost_table
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import DENSE, Format, parse_format
from sparseforge_fx.kernels.layouts import find_target
from sparseforge_fx.methods.one_shot import SparseGPTConfig
from sparseforge_fx.planning.again import plan_again
from sparseforge_fx.planning.candidates import Candidate, candidates
from sparseforge_fx.planning.observe import EXPERTS, READING, See, check_answer, observe
from sparseforge_fx.planning.sensitivity import drawn_outputs, predicted_loss
from sparseforge_fx.planning.solutions import solutions
from sparseforge_fx.plans import Plan, PlannedWeight, Price
from sparseforge_fx.progress import counted
from sparseforge_fx.ranges import AtLeastZero, Positive, ShareAboveZero, checked
from sparseforge_fx.report import environment
from sparseforge_fx.training.inputs import Run, open_run
from sparseforge_fx.training.recipe import Recipe
from sparseforge_fx.training.unused import unused_arguments

TOKENS = (1, 8)  # decoding, alone and in a small batch
CALIBRATION = 16  # sequences
OUTPUTS = 256  # of a weight that are solved in every format, to predict the error of all
Losses = Mapping[str, Mapping[Format, float]]


@checked
@torch.inference_mode(False)
def plan(
    model: nn.Module | Plan | str | Path,
    data: Any = None,
    *,
    tokens: Sequence[int] | None = None,
    speedup: Positive | None = None,
    bytes: ShareAboveZero | None = None,
    loss: AtLeastZero | None = None,
    formats: Sequence[str | Format] | None = None,
    table: str | Path | cost_table.Table | None = None,
    tokenizer: Any = None,
    example_inputs: Any = None,
    cache_dir: str | Path | None = None,
    **reading: Any,
) -> Plan:
    """Choose a format for every linear of ``model``, so that the predicted loss is least within one budget.

    Every weight is solved by itself in every format, on the inputs that the dense model gives it, and for 256 of its
    outputs that stand for all; the error is weighted by the curvature of the outputs. Times are measured here, of
    weights that are deployed as one product (q, k and v; gate and up) together: they get the same format. The model is
    left as it is.

    Args:
        model: or a plan (its path): another budget is then chosen from its prices, and nothing is measured or read.
        data: as for :func:`sparseforge_fx.sparsify`.
        tokens: token counts (batch x sequence) that speed is of; default 1 and 8.
        speedup: of the linears together, at least: the mean over the token counts of the time in relation to dense is
            held under 1 / speedup, so that the geometric mean of the speed-ups is not below it. What is between the
            linears is not counted.
        bytes: share of the dense linears' bytes, at most.
        loss: predicted increase in nats per answer (token), at most; what is minimised then is the time.
        formats: what may be chosen beside dense: ``["2:4", "dense int8", "2:4 int4/32"]``; default: all that there are
            kernels for on the model's device. ``sparsify`` and then ``quantize`` apply the plan.
        table: times to go by instead of measuring (see ``save_table`` of deploy/lowering/cost_table.py).
        example_inputs: for capture, where they cannot be made from the model's config or from ``data``.
        cache_dir: where the token file of text is kept.
        reading: fields of a :class:`Recipe` that say what is read: include, exclude, calibration (sequences, default
            16), batch_size, length, seed, text_column, separator. An output layer, a router, or a head that is tied to
            an embedding may be quantised; sparse they can be only where ``include`` names them (a tied head never).

    Raises SparseForgeError unless exactly one budget is given; where no choice of formats keeps it, OutOfReach, whose
    ``plan`` has what was measured.
    """
    goal = check_goal(speedup=speedup, bytes=bytes, loss=loss)
    wanted = None if formats is None else [parse_format(f) for f in formats]
    if not isinstance(model, nn.Module):
        beside = {"data": data, "table": table, "tokenizer": tokenizer, "cache_dir": cache_dir}
        return plan_again(model, goal, tokens, wanted, {**beside, "example_inputs": example_inputs, **reading})
    if data is None:
        raise SparseForgeError("a plan of a model needs data, which the loss is predicted by")
    tokens, known = cost.check_request(TOKENS if tokens is None else tokens, table)
    if unknown := sorted(set(reading) - set(READING)):
        raise SparseForgeError(f"a plan has no option {', '.join(unknown)}; it has {', '.join(READING)}")
    recipe = Recipe(calibration=CALIBRATION).changed(**reading)
    run = open_run(
        model, data, recipe, SparseGPTConfig(), None,
        tokenizer=tokenizer, cache_dir=cache_dir, example_inputs=example_inputs,
    )  # fmt: skip
    check_answer(run)  # before products are timed
    run.notes += unused_arguments(
        recipe, {"tokenizer": tokenizer, "cache_dir": cache_dir}, data=data, method="a plan", trains=False,
        calibrates=True, batches=run.batches,
    )  # fmt: skip
    device = next(iter(run.program.state.values())).device
    layouts = find_target("auto", device)
    found, skipped = candidates(
        run.program, cost.formats_of(device) if wanted is None else wanted, recipe.include, recipe.exclude
    )
    if not found:
        raise SparseForgeError(f"nothing to plan: {'; '.join(f'{n}: {r}' for n, r in list(skipped.items())[:4])}")
    times = cost.timings(_shapes(found, alone=known is not None), tokens, device, layouts, known)
    losses = predict(run, recipe, found)
    weights = [_priced(c, losses[c.site.fqn], times, tokens, run.notes) for c in found]
    made = Plan(
        weights, tuple(tokens), goal, environment()["device"], torch.get_num_threads(), environment()["versions"],
        skipped, list(dict.fromkeys([*run.notes, *run.reader.notes])),
    )  # fmt: skip
    return decide(made)


def check_goal(**given: float | None) -> dict[str, float]:
    """The one budget that is given. Raises SparseForgeError where there are none or several."""
    goals = {name: value for name, value in given.items() if value is not None}
    if len(goals) != 1:
        named = " and ".join(goals) or "none"
        raise SparseForgeError(f"give exactly one of speedup, bytes and loss as the budget of a plan, not {named}")
    return goals


# -- prices ------------------------------------------------------------------------------------------------------------
def _shape(candidate: Candidate, form: Format) -> cost_table.Shape:
    """Of the product that it is a part of."""
    site = candidate.site
    return cost_table.Shape.of(candidate.group_outputs, site.in_features, site.dtype, form, candidate.routing)


def _shapes(found: Sequence[Candidate], alone: bool) -> list[cost_table.Shape]:
    """Of all that is to be timed; ``alone``: of the weights one by one, too, as a table may have them."""
    each = [(c, form) for c in found for form in c.formats if form != DENSE]
    return [_shape(c, form) for c, form in each] + [_shape(_alone(c), form) for c, form in each if alone]


def _alone(candidate: Candidate) -> Candidate:
    return candidate._replace(group=candidate.site.fqn, group_outputs=candidate.site.out_features)


def _priced(
    candidate: Candidate,
    losses: Mapping[Format, float],
    times: cost_table.Table,
    tokens: Sequence[int],
    notes: list[str],
) -> PlannedWeight:
    """A weight with the prices of all formats that were measured."""
    site = candidate.site
    sides = f"{site.out_features} x {site.in_features}"
    if candidate.routing is not None:
        sides += f" by {candidate.routing.chosen} of {candidate.routing.experts} experts"
    if not any(times.get(_shape(candidate, form)) for form in losses):
        candidate = _alone(candidate)
    share = site.out_features / candidate.group_outputs
    rows = {form: times.get(_shape(candidate, form), {}).values() for form in losses}
    beside = {t: [by[t].dense_us for found in rows.values() for by in found if t in by] for t in tokens}
    if not all(beside.values()):
        raise SparseForgeError(
            f"the cost table has no time of {sides} {site.dtype} ({site.fqn}) at "
            f"{', '.join(map(str, tokens))} tokens: measure again, without a table"
        )
    dense = _shape(_alone(candidate), DENSE).bytes
    prices = {DENSE: Price(0.0, dense, {t: share * median(found) for t, found in beside.items()})}
    for form, predicted in losses.items():
        measured = [by for by in rows[form] if all(t in by for t in tokens)]
        if not measured:
            notes.append(f"{form} has no times for {sides}: it was not considered")
            continue
        size = _shape(_alone(candidate), form).bytes + (dense if candidate.tied and not candidate.taken else 0)
        best = cost.of_one_layout(measured, tokens)
        prices[form] = Price(predicted, size, {t: share * best[t].packed_us for t in tokens})
    chosen = None if candidate.routing is None else candidate.routing.chosen
    return PlannedWeight(site.fqn, site.sides, DENSE, prices, candidate.group, chosen)


def predict(
    run: Run,
    recipe: Recipe,
    found: Sequence[Candidate],
    seen: See = lambda *_: None,
) -> Losses:
    """By weight and format, nats per answer: one walk with gradients, one for the moments of the inputs.

    ``seen`` is told of every weight.
    """
    by_name = {c.site.fqn: c for c in found}
    losses = {c.site.fqn: dict.fromkeys(c.formats[1:], 0.0) for c in found}
    taken = {node: c.site.fqn for c in found for node in c.taken}
    off: dict[str, dict[Format, float]] = {name: {} for name in taken.values()}  # squared error of rows that are taken

    def solve(name: str, weight: Tensor, moments: Tensor, sharpness: Tensor) -> None:
        seen(name, weight, moments, sharpness)
        rows, shares = drawn_outputs(weight, moments, sharpness, OUTPUTS)
        weight = weight[rows]
        for form, solved in solutions(weight, moments, by_name[name].formats[1:]).items():
            losses[name][form] += predicted_loss(solved - weight, moments, shares)
            if name in off:
                off[name][form] = float((solved - weight).square().sum() / weight.square().sum().clamp(min=1e-30))
        advance()

    matrices = sum(min(EXPERTS, c.site.experts or 1) for c in found)
    with counted("losses of formats", matrices) as advance:
        stakes = observe(run, recipe, [c.site for c in found], solve, "cost", taken)
    for name, errors in off.items():
        for form, error in errors.items():
            losses[name][form] += 0.5 * error * stakes[name]
    return losses
