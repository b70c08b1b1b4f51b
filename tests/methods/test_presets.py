"""SparseForge's presets: the authors' constants on the authors' run, and what becomes of them in a short one."""

import math

import pytest
import torch

from sparseforge_fx.methods.catalog import TRAINED, configure, find_beside, find_preset
from sparseforge_fx.methods.config import Beside
from sparseforge_fx.methods.presets import alps_kd_preset, annealed_preset, paper_preset, paper_universal_preset
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import Pattern, parse_pattern

PRESETS = [alps_kd_preset, paper_preset, paper_universal_preset, annealed_preset]


def test_the_default_anneals_nothing():
    config = alps_kd_preset(100)
    assert config.start == "alps" and config.starts_fixed and find_preset("sparseforge") == "alps+kd"
    assert config.reorder and config.reconstruct == 1


@pytest.mark.parametrize(
    "changes", [{"start": "wanda"}, {"start": "dense"}, {"quench_end": 0.4, "softness_start": 0.6}]
)
def test_the_default_leaves_alone_what_is_not_final_or_moves_no_weight(changes):
    config = alps_kd_preset(100, **changes)
    assert not config.reorder and not config.reconstruct


def test_the_default_takes_what_it_is_told():
    config = alps_kd_preset(100, reorder=False, reconstruct=3)
    assert not config.reorder and config.reconstruct == 3
    loose = alps_kd_preset(100, parse_pattern("50%"))
    assert not loose.reorder and loose.reconstruct == 1


def test_what_was_called_tuned_is_the_default():
    assert find_preset("sparseforge", "tuned") == "alps+kd"
    assert configure("sparseforge", 7, preset="tuned") == alps_kd_preset(7)


# -- the authors' scripts --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("preset", "score", "gamma", "pull", "mix"),
    [(paper_preset, "ratio", 0.97, (0.01, 0.01), 0.0), (paper_universal_preset, "obd", 0.98, (0.06, 0.3), 1.0)],
)
def test_the_authors_constants_on_the_authors_run(preset, score, gamma, pull, mix):
    config = preset(20_000)
    assert (config.curvature, config.probe_every, config.curvature_vectors) == ("hutchinson", 1, 1)
    assert (config.curvature_beta, config.curvature_start) == (0.98, "zero")
    assert (config.score, config.score_noise_floor, config.gate, config.start) == (score, 1e-8, "site", "dense")
    assert (config.update_every, config.update_every_late, config.mask_rate) == (30, 10, 0.1)
    assert config.first_update * 20_000 == config.sparsity_warmup * 20_000 == pytest.approx(500)
    assert config.heat_end * 20_000 == pytest.approx(2000) and config.quench_end * 20_000 == pytest.approx(17_000)
    assert 0.5 ** (30 / 20_000 / config.temperature_half_life) == pytest.approx(gamma)
    assert (config.structure_start, config.structure) == pull and config.group_mix == mix


def test_what_the_scripts_set_beside_the_method():
    assert find_beside("sparseforge", "paper") == Beside(temperature=2.0, weight_decay=0.1, slorb_block=64)
    assert find_beside("sparseforge", "paper-universal") == Beside(temperature=2.0, weight_decay=0.1, slorb_block=16)
    assert find_beside("ast") == Beside(task=1 / 3, kl=2 / 3, temperature=2.0, weight_decay=0.1)
    said = {(m, p) for m, presets in TRAINED.items() for p in presets if find_beside(m, p) != Beside()}
    assert said == {("sparseforge", "paper"), ("sparseforge", "paper-universal"), ("ast", "paper")}
    assert find_beside("alps") == Beside()


def moves(config, steps):
    """Steps after which the masks moved."""
    value = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    weight = MaskedWeight("w", value, torch.ones(4, 16), 1)
    forge, moved = config.build([weight]), []
    for step in range(steps):
        forge.curvature.fold("w", torch.rand(4, 16, generator=torch.Generator().manual_seed(step)))
        before = weight.mask.clone()
        forge.after_step(step)
        if not torch.equal(before, weight.mask):
            moved.append(step + 1)
    return moved


def test_masks_first_move_after_500_of_20_000_steps_then_every_30():
    assert moves(paper_preset(20_000), 600) == [510, 540, 570, 600]


def test_in_a_short_run_the_same_shares_and_at_least_one_step():
    config = paper_preset(2000)
    assert (config.update_every, config.update_every_late) == (3, 1)
    assert moves(config, 70) == [51, 54, 57, 60, 63, 66, 69]
    short = paper_preset(60)
    assert (short.update_every, short.update_every_late, short.mask_rate, short.curvature_beta) == (1, 1, 0.1, 0.98)
    assert moves(short, 8) == [4, 5, 6, 7, 8]  # four probes come first, whatever 2.5 % of the run are


# -- ours ------------------------------------------------------------------------------------------------------------
def test_annealed_on_the_authors_run():
    config = annealed_preset(20_000)
    assert (config.steps, config.update_every, config.start, config.curvature) == (20_000, 30, "dense", "gauss_newton")
    assert config.mask_rate == pytest.approx(0.1, rel=5e-3)
    assert 0.98 <= config.curvature_beta <= 0.99
    assert (config.temperature_start, config.temperature_floor) == (1.0, 0.05)
    gamma = 0.5 ** (30 / 20_000 / config.temperature_half_life)
    assert 0.97 <= gamma <= 0.98
    assert config.heat_end * 20_000 == pytest.approx(2000) and config.quench_end * 20_000 == pytest.approx(17_000)
    assert config.structure > 0 and config.gate == "site" and config.score == "obd"


@pytest.mark.parametrize("steps", [10, 60, 500, 3000, 20_000, 60_000])
def test_annealed_travels_as_far_in_any_number_of_steps(steps):
    config, whole = annealed_preset(steps), annealed_preset(20_000)
    updates = max(1, steps // config.update_every)
    forgotten, reference = updates * math.log(1 - config.mask_rate), 666 * math.log(1 - whole.mask_rate)
    assert forgotten == pytest.approx(reference, rel=0.01)
    assert updates * math.log(config.curvature_beta) == pytest.approx(666 * math.log(whole.curvature_beta), rel=0.01)
    same = (
        "heat_end",
        "quench_end",
        "sparsity_warmup",
        "temperature_half_life",
        "temperature_start",
        "temperature_floor",
    )
    assert [getattr(config, n) for n in same] == [getattr(whole, n) for n in same]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_take_changes_and_describe_themselves(preset):
    config = preset(40, Pattern(1, 4), curvature="activation", update_every=3)
    assert (config.steps, config.pattern, config.curvature, config.update_every) == (40, (1, 4), "activation", 3)
    described = config.describe()
    assert described["pattern"] == "1:4" and described["steps"] == 40
    assert all(isinstance(v, str | int | float | bool | None) for v in described.values())
