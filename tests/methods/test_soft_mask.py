"""The annealing's equations (arXiv 2605.06402) on weights without a model, then every combination on a real graph."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.curvature import ESTIMATORS
from sparseforge_fx.methods.soft_mask import SparseForge, SparseForgeConfig
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import Pattern, Unstructured, check_pattern, hard_mask
from sparseforge_fx.training.distillation import Distillation

TWO_FOUR = Pattern(2, 4)
# magnitude needs no curvature; one update per step, no pull, no ramp of the sparsity
PLAIN = {"score": "magnitude", "sparsity_warmup": 0.0, "structure": 0.0, "heat_end": 0.5, "quench_end": 0.9}


def masked(weight, dim=1, dtype=torch.float32):
    return MaskedWeight(
        "w", torch.as_tensor(weight, dtype=dtype), torch.ones(torch.as_tensor(weight).shape, dtype=dtype), dim
    )


def random_weight(out=6, width=16, seed=0, **options):
    return masked(torch.randn(out, width, generator=torch.Generator().manual_seed(seed)), **options)


def engine(weight, steps=100, **changes):
    return SparseForge(SparseForgeConfig(steps=steps, **PLAIN | changes), [weight])


def gate_by_patterns(group, temperature, n=2):
    """sum_k softmax(-cost_k / T) pattern_k, cost_k = what pattern k deletes, in shares of the group's mean score."""
    mean = sum(group) / len(group)
    patterns = list(itertools.combinations(range(len(group)), n))
    costs = [sum(s for i, s in enumerate(group) if i not in kept) / mean for kept in patterns]
    powers = [math.exp(-(c - min(costs)) / temperature) for c in costs]
    return [
        sum(p for p, kept in zip(powers, patterns, strict=True) if i in kept) / sum(powers) for i in range(len(group))
    ]


# -- scores ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("obd", [1.0, 8.0, 0.0, 9.0]),
        ("ratio", [1.0, 2 / math.sqrt(2), 3e6, 1 / 3]),
        ("magnitude", [1.0, 2.0, 3.0, 1.0]),
    ],
)
def test_scores_by_hand(score, expected):
    """obd: h w^2; ratio: |w| / sqrt(h + 1e-12)."""
    weight = masked([[1.0, -2.0, 3.0, 1.0]])
    forge = engine(weight, score=score)
    forge.curvature.fold("w", torch.tensor([[1.0, 2.0, 0.0, 9.0]]))
    torch.testing.assert_close(forge.score(weight), torch.tensor([expected]))


@pytest.mark.parametrize("h", [[0.0, 0.0, 0.0, 0.0, 0.0, 5.0, 0.0, 7.0], [0.0] * 8], ids=["some known", "none known"])
def test_where_curvature_is_zero_magnitude_decides(h):
    """Zeros tie: the first of a group would stay, whatever their size."""
    weight = masked([[0.1, -0.2, 3.0, 4.0, 5.0, 0.1, 2.0, 0.2]])
    forge = engine(weight, score="obd")
    forge.curvature.fold("w", torch.tensor([h]))
    kept = hard_mask(forge.score(weight), TWO_FOUR)
    assert kept.tolist() == [[0, 0, 1, 1, 0, 1, 0, 1] if any(h) else [0, 0, 1, 1, 1, 0, 1, 0]]


def test_hutchinson_probes_some_steps_before_masks_move():
    """One vector says little: the first probes follow each other, whatever ``probe_every``."""
    weight = masked([[1.0, 2.0, 3.0, 4.0]])
    forge = engine(weight, score="obd", curvature="hutchinson", probe_every=10)
    assert [step for step in range(31) if forge.wants_curvature(step)] == [0, 1, 2, 3, 10, 20, 30]
    forge.curvature.fold("w", torch.ones(1, 4))
    moved = []
    for step in range(5):
        before = weight.mask.clone()
        forge.after_step(step)
        moved.append(not torch.equal(before, weight.mask))
    assert moved == [False, False, False, True, True]
    short = engine(masked([[1.0, 2.0, 3.0, 4.0]]), score="obd", curvature="hutchinson", steps=5, probe_every=10)
    assert [step for step in range(5) if short.wants_curvature(step)] == [0]  # no time for that


@pytest.mark.parametrize("dim", [0, 1])
def test_activation_curvature_belongs_to_the_inputs(dim):
    value = torch.arange(1.0, 9).reshape(2, 4)
    weight = masked(value if dim else value.t(), dim=dim)
    forge = engine(weight, score="obd")
    forge.curvature.fold("w", torch.tensor([1.0, 0.0, 2.0, 3.0]))  # one entry per input
    expected = torch.tensor([[1.0, 0, 18, 48], [25, 0, 98, 192]])
    torch.testing.assert_close(forge.score(weight), expected if dim else expected.t())


# -- gates -----------------------------------------------------------------------------------------------------------
SCORES = [0.3, 2.0, 1.1, 5.0, 0.1, 0.9, 4.0, 3.2]


@pytest.mark.parametrize(("reached", "tau"), [(1.0, 25.0), (0.5, 6.25), (0.0, 0.0)])
def test_site_gate_by_hand(reached, tau):
    """101 scores (k / 10)^2: the quantile at q is (10 q)^2, half the 16-84 % range is (8.4^2 - 1.6^2) / 2 = 34."""
    scores = (torch.randperm(101, generator=torch.Generator().manual_seed(0)) / 10) ** 2
    expected = [[1 / (1 + math.exp(-(s - tau) / 34 / 0.2)) for s in scores.tolist()]]
    gate = engine(random_weight(), gate="site").gate(scores[None], 1, 0.2, reached)
    torch.testing.assert_close(gate, torch.tensor(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e12])
def test_site_gate_knows_no_units(factor):
    scores = torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
    gate = engine(random_weight(), gate="site").gate
    torch.testing.assert_close(gate(factor * scores, 1, 0.3, 1.0), gate(scores, 1, 0.3, 1.0), rtol=1e-4, atol=1e-5)


def test_site_gate_hardens_as_it_cools():
    scores = torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
    gate = engine(random_weight(), gate="site").gate(scores, 1, 1e-6, 1.0)
    kept = gate > 0.5
    assert 255 <= kept.sum() <= 256 and scores[kept].min() > scores[~kept].max()
    assert ((gate < 1e-3) | (gate > 1 - 1e-3)).sum() >= 511  # all but the threshold itself


def test_site_gate_of_equal_scores_is_undecided():
    gate = engine(random_weight(), gate="site").gate(torch.zeros(6, 16), 1, 0.1, 1.0)
    torch.testing.assert_close(gate, torch.full((6, 16), 0.5))


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0, 10.0])
def test_pattern_gate_by_enumeration(temperature):
    weight = masked([SCORES])
    gate = engine(weight, gate="pattern").gate(torch.tensor([SCORES]), 1, temperature, 1.0)
    expected = gate_by_patterns(SCORES[:4], temperature) + gate_by_patterns(SCORES[4:], temperature)
    torch.testing.assert_close(gate, torch.tensor([expected]), rtol=1e-4, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    pattern=st.sampled_from([Pattern(2, 4), Pattern(1, 4), Pattern(1, 2), Pattern(4, 8)]),
    temperature=st.floats(1e-3, 1e3),
    reached=st.floats(0, 1),
    scale=st.floats(-20, 20),
    dim=st.integers(0, 1),
    seed=st.integers(0, 1000),
)
def test_pattern_gate_keeps_the_mass_of_every_group(pattern, temperature, reached, scale, dim, seed):
    scores = torch.rand(3, 2 * pattern.m, generator=torch.Generator().manual_seed(seed)) * 10**scale
    weight = masked(torch.ones(3, 2 * pattern.m))
    forge = engine(weight, gate="pattern", pattern=pattern)
    gate = forge.gate(scores if dim else scores.t(), dim, temperature, reached)
    gate = gate if dim else gate.t()
    mass = gate.reshape(3, 2, pattern.m).sum(-1)
    wanted = pattern.m + reached * (pattern.n - pattern.m)
    torch.testing.assert_close(mass, torch.full((3, 2), wanted), rtol=1e-4, atol=1e-4)
    assert gate.min() >= -1e-6 and gate.max() <= 1 + 1e-6


def test_pattern_gate_at_both_ends_of_the_temperature():
    scores = torch.rand(16, 32, generator=torch.Generator().manual_seed(0))
    forge = engine(random_weight(), gate="pattern")
    torch.testing.assert_close(forge.gate(scores, 1, 1e-5, 1.0), hard_mask(scores, TWO_FOUR).float(), atol=1e-2, rtol=0)
    torch.testing.assert_close(forge.gate(scores, 1, 1e6, 1.0), torch.full((16, 32), 0.5), atol=1e-4, rtol=0)


def test_groups_that_score_nothing_stay_undecided():
    gate = engine(random_weight(), gate="pattern").gate(torch.zeros(2, 8), 1, 0.1, 1.0)
    torch.testing.assert_close(gate, torch.full((2, 8), 0.5))


# -- mask updates ----------------------------------------------------------------------------------------------------
def test_mask_update_by_hand():
    """m <- (1 - a) m + a (G - eta (m - top2(s))), all of it in one group."""
    weight = masked([[3.0, 1.0, 2.0, 0.5]])
    forge = engine(
        weight, gate="pattern", structure=0.4, mask_rate=0.1, temperature_floor=0.3, temperature_start=0.3,
        quench_end=0.5, heat_end=0.5,
    )  # fmt: skip
    forge.after_step(24)  # progress 1/4: eta = 0.4 * 1/2
    gate, top = gate_by_patterns([3.0, 1.0, 2.0, 0.5], 0.3), [1, 0, 1, 0]
    expected = [min(1, max(0, 0.9 + 0.1 * (g - 0.2 * (1 - t)))) for g, t in zip(gate, top, strict=True)]
    torch.testing.assert_close(weight.mask, torch.tensor([expected]))
    second = [
        min(1, max(0, 0.9 * m + 0.1 * (g - 0.208 * (m - t)))) for m, g, t in zip(expected, gate, top, strict=True)
    ]
    forge.after_step(25)  # progress 0.26: eta = 0.4 * 0.52
    torch.testing.assert_close(weight.mask, torch.tensor([second]))


def test_the_pull_begins_where_it_is_asked_to():
    """eta from structure_start to structure between the warm-up and the end of the quench."""
    weight = masked([[3.0, 1.0, 2.0, 0.5]])
    forge = engine(
        weight, gate="pattern", structure_start=0.2, structure=0.4, mask_rate=0.1, temperature_floor=0.3,
        temperature_start=0.3, quench_end=0.5, heat_end=0.5,
    )  # fmt: skip
    forge.after_step(24)  # progress 1/4: eta = 0.3
    gate, top = gate_by_patterns([3.0, 1.0, 2.0, 0.5], 0.3), [1, 0, 1, 0]
    expected = [min(1, max(0, 0.9 + 0.1 * (g - 0.3 * (1 - t)))) for g, t in zip(gate, top, strict=True)]
    torch.testing.assert_close(weight.mask, torch.tensor([expected]))


def test_the_gate_is_mixed_with_the_best_of_its_groups():
    """G <- (1 - beta) G + beta top2(s), beta along a smooth step over the quench."""
    weight = masked([[3.0, 1.0, 2.0, 0.5]])
    forge = engine(
        weight, gate="pattern", group_mix=0.8, mask_rate=1.0, temperature_floor=0.3, temperature_start=0.3,
        heat_end=0.5, quench_end=0.9, softness_start=1.0,
    )  # fmt: skip
    forge.after_step(49)  # heated only
    gate = gate_by_patterns([3.0, 1.0, 2.0, 0.5], 0.3)
    torch.testing.assert_close(weight.mask, torch.tensor([gate]))
    forge.after_step(69)  # half-way: beta = 0.4
    mixed = [0.6 * g + 0.4 * t for g, t in zip(gate, [1, 0, 1, 0], strict=True)]
    torch.testing.assert_close(forge.soft["w"], torch.tensor([mixed]))


def test_masks_move_at_another_pace_after_the_heating():
    weight = random_weight()
    forge = engine(weight, update_every=5, update_every_late=2, heat_end=0.1, first_update=0.04)
    moved = []
    for step in range(16):
        before = forge.soft.get("w", weight.mask).clone()
        forge.after_step(step)
        moved.append(not torch.equal(before, forge.soft.get("w", weight.mask)))
    assert [step + 1 for step, m in enumerate(moved) if m] == [5, 10, 12, 14, 16]


def test_a_floor_that_is_given_is_added_to_h():
    weight = masked([[1.0, -2.0, 3.0, 1.0]])
    for score, expected in (
        ("obd", [1.5, 4 * 2.5, 9 * 0.5, 9.5]),
        ("ratio", [1.5**-0.5, 2 * 2.5**-0.5, 3 * 0.5**-0.5, 9.5**-0.5]),
    ):
        forge = engine(weight, score=score, score_noise_floor=0.5)
        forge.curvature.fold("w", torch.tensor([[1.0, 2.0, 0.0, 9.0]]))
        torch.testing.assert_close(forge.score(weight), torch.tensor([expected]), rtol=1e-4, atol=0)


def test_masks_move_every_k_steps_only():
    weight = random_weight()
    forge = engine(weight, update_every=5)
    moved = []
    for step in range(20):
        before = weight.mask.clone()
        forge.after_step(step)
        moved.append(not torch.equal(before, weight.mask))
    assert [step for step, m in enumerate(moved) if m] == [4, 9, 14, 19]


def test_masks_wait_for_the_first_curvature():
    weight = random_weight()
    forge = engine(weight, score="obd")
    forge.after_step(0)
    assert (weight.mask == 1).all()
    forge.curvature.fold("w", torch.ones(6, 16))
    forge.after_step(1)
    assert (weight.mask < 1).any()


def test_a_weight_that_no_gradient_reaches_is_judged_by_its_size():
    reached, alone = random_weight(seed=1), random_weight(seed=2)
    alone.fqn = "alone"
    forge = SparseForge(SparseForgeConfig(steps=40, gate="pattern"), [reached, alone])
    for step in range(40):
        forge.curvature.fold("w", torch.rand(6, 16))
        forge.after_step(step)
    assert torch.equal(alone.mask.bool(), hard_mask(alone.weight.abs(), TWO_FOUR))


@pytest.mark.parametrize("gate", ["site", "pattern"])
@pytest.mark.parametrize("dim", [0, 1])
def test_magnitude_scores_end_at_magnitude_masks(gate, dim):
    weight = random_weight(16, 16, dim=dim)
    forge = SparseForge(SparseForgeConfig(steps=200, score="magnitude", gate=gate), [weight])
    for step in range(200):
        forge.after_step(step)
    assert torch.equal(weight.mask.bool(), hard_mask(weight.weight.abs(), TWO_FOUR, dim))


def test_saturated_gates_do_not_decide_by_position():
    """All of the second row is far above the threshold: sigmoid gives 1 four times, the scores still rank them."""
    low = torch.rand(15, 4, generator=torch.Generator().manual_seed(0)) / 100
    weight = masked(torch.cat([low, torch.tensor([[100.0, 101.0, 102.0, 103.0]])]))
    forge = SparseForge(SparseForgeConfig(steps=100, score="magnitude", gate="site"), [weight])
    for step in range(100):
        forge.after_step(step)
    assert weight.mask[15].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("score", ["magnitude", "obd"])
def test_structural_hardening_brings_masks_nearer_to_the_pattern(score):
    """What hard(m) has still to change at the end of the heating; m = (G + eta top2) / (1 + eta) where scores rest."""
    generator = torch.Generator().manual_seed(1)
    curvature = torch.outer(*torch.randn(2, 64, generator=generator).exp())
    distance = {}
    for structure in (0.0, 0.5):
        weight = random_weight(64, 64)
        forge = engine(weight, score=score, gate="site", structure=structure, heat_end=1.0, quench_end=1.0)
        forge.curvature.fold("w", curvature)
        for step in range(99):
            forge.after_step(step)
        distance[structure] = (weight.mask - hard_mask(weight.mask, TWO_FOUR).float()).abs().mean()
    assert distance[0.5] < 0.75 * distance[0.0]


def test_masks_stay_shares():
    weight = random_weight(32, 32)
    forge = engine(weight, gate="site", structure=3.0, mask_rate=1.0)
    for step in range(60):
        forge.after_step(step)
        assert weight.mask.min() >= 0 and weight.mask.max() <= 1


# -- the quench ------------------------------------------------------------------------------------------------------
def test_effective_mask_of_the_quench():
    """e = lambda m + (1 - lambda) hard(m), m moving on as if nothing were."""
    soft, quenched = random_weight(seed=3), random_weight(seed=3)
    never = engine(soft, gate="pattern", heat_end=1.0, quench_end=1.0)
    forge = engine(quenched, gate="pattern", heat_end=0.2, quench_end=0.7)
    for step in range(70):
        assert not forge.fixed
        never.after_step(step)
        forge.after_step(step)
        lam = min(1.0, (70 - (step + 1)) / 50)
        expected = lam * soft.mask + (1 - lam) * hard_mask(soft.mask, TWO_FOUR)
        torch.testing.assert_close(quenched.mask, expected, msg=f"step {step}")
        assert forge.metrics()["lambda"] == pytest.approx(lam)
    assert forge.fixed


def test_after_the_quench_masks_are_hard_and_final():
    weight = random_weight(16, 16)
    forge = SparseForge(SparseForgeConfig(steps=50, heat_end=0.2, quench_end=0.6), [weight])
    for step in range(50):
        if forge.wants_curvature(step):
            forge.curvature.fold("w", torch.rand(16, 16))
        forge.after_step(step)
        if step == 29:
            final = weight.mask.clone()
            assert set(final.unique().tolist()) == {0, 1} and (final.reshape(16, 4, 4).sum(-1) == 2).all()
            assert forge.fixed and not forge.curvature.values and not forge.soft
        if step >= 29:
            assert torch.equal(weight.mask, final)
            assert not forge.wants_curvature(step + 1)
            weight.weight.neg_().add_(torch.randn(16, 16))
    forge.fix()
    assert torch.equal(weight.mask, final)


def test_masks_fixed_before_any_update_are_by_magnitude():
    weight = random_weight()
    forge = engine(weight)
    forge.fix()
    assert torch.equal(weight.mask.bool(), hard_mask(weight.weight.abs(), TWO_FOUR))


def test_curves_of_a_run():
    weight = random_weight(32, 32)
    forge = SparseForge(SparseForgeConfig(steps=100, score="magnitude", gate="pattern"), [weight])
    assert forge.metrics()["density"] == 1 and forge.metrics()["lambda"] == 1 and forge.metrics()["temperature"] == 1
    rows = []
    for step in range(100):
        forge.after_step(step)
        rows.append(forge.metrics())
    assert rows[-1] | {"temperature": 0.05} == {
        "temperature": 0.05, "lambda": 0, "mask_distance_from_binary": 0, "flip_rate": 0, "density": 0.5,
    }  # fmt: skip
    for name in ("temperature", "lambda"):
        values = [row[name] for row in rows]
        assert values == sorted(values, reverse=True)
    assert max(row["mask_distance_from_binary"] for row in rows) > 0.1


def test_final_masks_are_looked_at_once(monkeypatch):
    forge = SparseForge(SparseForgeConfig(steps=10, score="magnitude"), [random_weight(32, 32)])
    for step in range(10):
        forge.after_step(step)
    expected = forge.metrics()
    monkeypatch.setattr(forge, "sample", lambda *_: pytest.fail("looked again"))
    assert forge.metrics() == expected | {"density": 0.5, "flip_rate": 0}
    monkeypatch.undo()
    state = forge.state()
    forge.weights[0].mask.fill_(1)
    forge.load_state(state)  # masks are another's now
    assert forge.metrics()["density"] == 1


def test_flip_rate_counts_what_the_last_update_turned():
    weight = masked([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    forge = engine(weight, gate="pattern", mask_rate=1.0, temperature_start=0.1, temperature_floor=0.1)
    forge.after_step(0)
    assert forge.metrics()["flip_rate"] == 0  # ones before: the first two, as now
    weight.weight[0] = torch.tensor([1.0, 3.0, 2.0, 4.0])
    forge.after_step(1)
    assert forge.metrics()["flip_rate"] == 2 / 8
    forge.fix()
    assert forge.metrics()["flip_rate"] == 0


@pytest.mark.parametrize("pattern", [Pattern(8, 16), Unstructured(0.5)])
def test_too_many_patterns_for_a_gate_over_them(pattern):
    with pytest.raises(SparseForgeError, match=f"gate 'pattern'.*{pattern}"):
        SparseForgeConfig(steps=40, gate="pattern", pattern=pattern)


def test_masked_decay_takes_from_masked_weights():
    weight = masked([[1.0, 1.0, 1.0, 1.0]])
    forge = engine(weight, masked_decay=0.1, update_every=50)
    weight.mask.copy_(torch.tensor([[1.0, 0.5, 0.0, 1.0]]))
    forge.after_step(0)
    torch.testing.assert_close(weight.weight, torch.tensor([[1.0, 0.95, 0.9, 1.0]]))


# -- from the layer-wise solution ------------------------------------------------------------------------------------
def obs_engine(steps=10, dtype=torch.float32, **changes):
    """Dense weights, a made-up solution of OBS, and the engine between them."""
    weight = random_weight(4, 8, dtype=dtype)
    dense = weight.weight.clone()
    weight.mask.copy_(hard_mask(dense.abs(), TWO_FOUR))
    solution = ((dense + 0.5) * weight.mask).clone()
    weight.weight.copy_(solution)
    changes = {"softness_start": 0.6, "heat_end": 0.0, "quench_end": 0.5} | changes
    forge = SparseForge(SparseForgeConfig(steps=steps, start="sparsegpt", **changes), [weight])
    forge.start_from({"w": dense})
    return forge, weight, dense, solution


def test_fading_goes_straight_from_dense_to_the_solution():
    """Survivors: dense + (1 - lambda) (solution - dense); pruned: the dense weight times lambda."""
    forge, weight, dense, solution = obs_engine()
    kept = solution != 0
    for step in range(-1, 6):
        if step >= 0:
            forge.after_step(step)
        lam = 0.6 * max(0.0, 1 - (step + 1) / 5)
        expected = torch.where(kept, dense + (1 - lam) * (solution - dense), lam * dense)
        torch.testing.assert_close(weight.weight * weight.mask, expected, msg=f"step {step}")
    assert forge.fixed and torch.equal(weight.mask.bool(), kept)


@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_stopping_early_still_gives_the_whole_compensation(stop):
    forge, weight, _, solution = obs_engine()
    for step in range(stop):
        forge.after_step(step)
    forge.fix()
    torch.testing.assert_close(weight.weight * weight.mask, solution)


def test_without_a_quench_the_solution_is_fixed_at_once():
    forge, weight, _, solution = obs_engine(quench_end=0.0)
    assert forge.fixed
    assert torch.equal(weight.weight, solution)
    assert not forge.wants_curvature(0)


# -- configurations --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"curvature": "exact"},
        {"score": "wanda"},
        {"gate": "group"},
        {"curvature_start": "one"},
        {"update_every_late": 0},
        {"score_noise_floor": 0.0},
        {"first_update": 1.5},
        {"start": "random"},
        {"heat_end": 0.8, "quench_end": 0.5},
        {"quench_end": 1.5},
        {"heat_end": -0.1},
        {"update_every": 0},
        {"probe_every": 0},
        {"mask_rate": 0.0},
        {"mask_rate": 1.5},
    ],
    ids=str,
)
def test_configurations_that_make_no_sense(wrong):
    with pytest.raises(SparseForgeError, match=next(iter(wrong)).split("_")[0]):
        replace(SparseForgeConfig(steps=10), **wrong)


def test_no_time_to_choose_masks():
    with pytest.raises(SparseForgeError, match="quench_end 0"):
        SparseForge(SparseForgeConfig(steps=10, heat_end=0.0, quench_end=0.0), [random_weight()])


def test_curvature_is_asked_for_until_the_quench_ends():
    forge = SparseForge(SparseForgeConfig(steps=20, probe_every=3, heat_end=0.2, quench_end=0.5), [random_weight()])
    assert [s for s in range(20) if forge.wants_curvature(s)] == [0, 3, 6, 9]
    forge = engine(random_weight())  # by magnitude: never
    assert not any(forge.wants_curvature(s) for s in range(100))


# -- resuming --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stop", [0, 3, 12, 19, 25])
def test_state_goes_on_where_it_was(stop):
    def run(forge, weight, steps):
        for step in steps:
            if forge.wants_curvature(step):
                forge.curvature.fold("w", torch.rand(6, 16, generator=torch.Generator().manual_seed(step)))
            forge.after_step(step)
        return weight.mask

    config = SparseForgeConfig(steps=30, heat_end=0.3, quench_end=0.7, probe_every=2)
    straight = random_weight()
    run(SparseForge(config, [straight]), straight, range(30))
    first, second = random_weight(), random_weight()
    before = SparseForge(config, [first])
    run(before, first, range(stop))
    after = SparseForge(config, [second])
    second.mask.copy_(first.mask)
    after.load_state(before.state())
    assert after.metrics() == before.metrics()
    assert torch.equal(run(after, second, range(stop, 30)), straight.mask)


@pytest.mark.parametrize("stop", [0, 2, 4, 7])
def test_fading_goes_on_where_it_was(stop):
    before, first, _, solution = obs_engine()
    for step in range(stop):
        before.after_step(step)
    after, second, _, _ = obs_engine()
    second.weight.copy_(first.weight)
    second.mask.copy_(first.mask)
    after.load_state(before.state())
    for step in range(stop, 10):
        after.after_step(step)
    torch.testing.assert_close(second.weight * second.mask, solution)


def test_state_of_another_configuration_is_refused():
    config = SparseForgeConfig(steps=30)
    state = SparseForge(config, [random_weight()]).state()
    with pytest.raises(SparseForgeError, match="steps 30 instead of 60"):
        SparseForge(replace(config, steps=60), [random_weight()]).load_state(state)


# -- experts ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("score", ["obd", "ratio"])
def test_an_expert_that_saw_too_few_tokens_is_scored_by_magnitude(score):
    value = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    h = torch.rand(3, 4, 8, generator=torch.Generator().manual_seed(1))
    forge = SparseForge(SparseForgeConfig(steps=10, score=score, expert_tokens=20), [masked(value, dim=2)])
    forge.curvature.fold("w", h)
    by_curvature = forge.score(forge.weights[0])  # nobody counts
    forge.tokens = {"w": [20, 19, 0]}
    found = forge.score(forge.weights[0])
    assert torch.equal(found[0], by_curvature[0]) and torch.equal(found[1:], value[1:].abs())
    assert not torch.equal(by_curvature[1], value[1].abs())


def test_tokens_are_part_of_the_state():
    config, value = SparseForgeConfig(steps=10), torch.randn(2, 4, 8)
    first, second, third = (SparseForge(config, [masked(value, dim=2)]) for _ in range(3))
    first.tokens, second.tokens, third.tokens = {"w": [3, 40]}, {"w": [0, 0]}, {"w": [0, 0, 0]}
    second.load_state(first.state())
    assert second.curvature.tokens == {"w": [3, 40]}
    with pytest.raises(SparseForgeError, match="is no list of 3"):
        third.load_state(first.state())


# -- on a graph ------------------------------------------------------------------------------------------------------
def anneal(found, config, seed=0):
    sparse = found.sparse(config).train()
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.01)
    for step in range(config.steps):
        sparse(found.batch(seed=100 * seed + step, rows=4))
        sparse.last_loss.total.backward()
        optimizer.step()
        sparse.step()
        optimizer.zero_grad()
    return sparse


@pytest.mark.parametrize("gate", ["site", "pattern"])
@pytest.mark.parametrize("score", ["obd", "ratio", "magnitude"])
@pytest.mark.parametrize("curvature", ESTIMATORS)
def test_every_combination_ends_hard(tiny, curvature, score, gate):
    found = tiny("mlp")
    config = SparseForgeConfig(steps=6, curvature=curvature, score=score, gate=gate, mask_rate=0.5)
    sparse = anneal(found, config)
    for w in sparse.method.weights:
        assert set(w.mask.unique().tolist()) == {0, 1}
        assert check_pattern(w.mask, TWO_FOUR, w.dim) and w.mask.mean() == 0.5
        assert torch.isfinite(w.weight).all()


@pytest.mark.parametrize("curvature", ESTIMATORS)
def test_equal_seeds_give_equal_bits(tiny, curvature):
    runs = []
    for seed in (0, 0, 1):
        found = tiny("mlp")
        sparse = anneal(found, SparseForgeConfig(steps=4, curvature=curvature, quench_end=1.0, heat_end=0.9), seed)
        runs.append(
            [w.mask.clone() for w in sparse.method.weights] + [w.weight.detach().clone() for w in sparse.method.weights]
        )
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_masked_weights_get_straight_through_gradients(tiny, name):
    """The gradient of a masked weight is that of the weight W * m in the dense model, also where m is 0."""
    found = tiny(name)
    batch = found.batch()
    sparse = found.sparse(SparseForgeConfig(steps=10), Distillation(kl=0.0)).train()
    generator = torch.Generator().manual_seed(1)
    for w in sparse.method.weights:
        w.mask.copy_(hard_mask(torch.rand(w.mask.shape, generator=generator), TWO_FOUR, w.dim))
    sparse(**batch).loss.backward()
    found_grads = {n: p.grad.clone() for n, p in found.weights.items()}
    with torch.no_grad():
        for w in sparse.method.weights:
            w.weight.mul_(w.mask)
    found.model.zero_grad()
    found.model(**batch, labels=batch["input_ids"]).loss.backward()
    for w in sparse.method.weights:
        expected = found.weights[w.fqn].grad
        assert expected[w.mask == 0].abs().max() > 0
        torch.testing.assert_close(found_grads[w.fqn], expected, rtol=1e-4, atol=1e-6)
