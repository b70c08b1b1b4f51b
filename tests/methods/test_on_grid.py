"""Training with rounded values: the graph sees codes times scales, float32 masters move, and the result is on the grid."""

import copy

import pytest
import torch
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import Format, parse_format
from sparseforge_fx.methods.on_grid import OnGrid, fitting
from sparseforge_fx.methods.rounding import Grid, round_weight, spread
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import TWO_FOUR, check_pattern, hard_mask, parse_pattern
from sparseforge_fx.scales import scale_values
from sparseforge_fx.training.master_weights import MasterWeights

HOW = {"method": "sparseforge", "preset": "alps+kd", "steps": 3, "batch_size": 2, "length": 12, "calibration": 4,
       "compile": False, "show_progress": False, "lr": 1e-2}  # fmt: skip


def ids(rows=16):
    return torch.randint(3, 97, (rows, 12), generator=torch.Generator().manual_seed(0))


def on_their_grid(model, scales, largest):
    for fqn, scale in scales.items():
        weight = model.get_parameter(fqn).float()
        codes = weight / scale.float().repeat_interleave(weight.shape[1] // scale.shape[1], 1)
        assert (codes - codes.round()).abs().max() < 1e-3 and -largest - 1 - 1e-3 <= codes.min() and codes.max() <= largest + 1e-3
        yield fqn, codes.round()


def test_what_trains_is_rounded_and_packs_exactly(captured_once):
    found = captured_once("llama")
    started = sf.sparsify(found.model, ids(), **HOW | {"steps": 1, "lr": 1e-12}, values="int8")
    first = {fqn: codes.clone() for fqn, codes in on_their_grid(found.model, started.scales, 127)}
    found.reset()
    result = sf.sparsify(found.model, ids(), **HOW, values="int8")
    assert set(result.scales) == {s["name"] for s in result.report["sites"]}
    moved = 0
    for fqn, codes in on_their_grid(found.model, result.scales, 127):
        assert check_pattern(found.model.get_parameter(fqn), TWO_FOUR)
        assert torch.equal(result.scales[fqn], started.scales[fqn])  # codes train, scales stay
        moved += int((codes != first[fqn]).sum())
    assert moved > 100
    packed = copy.deepcopy(found.model)
    report = sf.quantize(packed, "int8", scales=result.scales, dense=False)
    assert {site["format"] for site in report["sites"]} == {"2:4 int8"}
    for fqn in result.scales:
        module = packed.get_submodule(fqn.removesuffix(".weight"))
        assert torch.equal(module.weight, found.model.get_parameter(fqn))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_levels_train_and_pack_exactly(captured_once, dtype):
    found = captured_once("llama")
    model = type(found.model)(found.model.config).to(dtype)
    result = sf.sparsify(model, ids(), **HOW, values="int4/16")
    packed = copy.deepcopy(model)
    report = sf.quantize(packed, "int4/16", scales=result.scales, dense=False)
    assert {site["format"] for site in report["sites"]} == {"2:4 int4/16"} and result.scales
    for fqn in result.scales:
        assert torch.equal(packed.get_submodule(fqn.removesuffix(".weight")).weight, model.get_parameter(fqn))


def test_a_killed_run_goes_on_to_the_same_bits(captured_once, tmp_path):
    found = captured_once("llama")

    class Stop(Exception):
        pass

    def stop(step, row):
        if step == 1:
            raise Stop

    saved = {"state_path": tmp_path / "s", "save_seconds": 0.0, "values": "int8"}
    with pytest.raises(Stop):
        sf.sparsify(found.model, ids(), **HOW, **saved, on_step=stop)
    resumed = sf.sparsify(found.model, ids(), **HOW, **saved)
    state = {k: v.clone() for k, v in found.model.state_dict().items()}
    found.reset()
    whole = sf.sparsify(found.model, ids(), **HOW, values="int8")
    assert all(torch.equal(v, state[k]) for k, v in found.model.state_dict().items())
    assert all(torch.equal(s, resumed.scales[fqn]) for fqn, s in whole.scales.items())


@pytest.mark.parametrize("dim", [0, 1])
def test_the_nearest_codes_of_either_orientation(dim):
    weight = nn.Parameter(torch.randn(64, 6) if dim == 0 else torch.randn(6, 64))
    grid = OnGrid([MaskedWeight("w", weight, torch.ones_like(weight), dim)], {"w": parse_format("int4")})
    assert grid.takes(weight) and not grid.takes(nn.Parameter(torch.ones(2)))
    grid.scales["w"].fill_(0.25)
    seen = grid.rounded(weight, weight.detach())
    assert torch.equal(seen, (weight.detach() / 0.25).round().clamp(-8, 7) * 0.25)


@pytest.mark.parametrize("pattern", ["dense", "2:4"])
def test_a_master_of_levels_begins_at_its_float_and_stays_with_its_code(pattern):
    """Steps between levels differ: near the middle of one, far in another."""
    form = parse_format(f"{pattern} int4/16")
    mask = hard_mask(torch.rand(6, 64), TWO_FOUR).float() if pattern == "2:4" else torch.ones(6, 64)
    floats = torch.randn(6, 64) * mask
    found = round_weight(floats, form)
    weight = nn.Parameter(found.weight)
    grid = OnGrid([MaskedWeight("w", weight, mask, 1)], {"w": form})
    grid.start("w", floats, found)
    (master,) = MasterWeights([weight], grid).masters
    assert torch.equal(grid.rounded(weight, master), found.weight)
    place = floats / spread(found.scales, 64)
    there = (place > -66) & (place < 56)
    assert there.float().mean() > 0.95
    torch.testing.assert_close(master[there], floats[there], rtol=0.02, atol=0.01)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_master_begins_at_the_float_that_its_code_stands_for(dim):
    floats = torch.randn(6, 64)
    found = round_weight(floats, parse_format("int4"))
    found.codes[0] = (found.codes[0] - 1).clamp(-8)  # one code farther than the nearest: as near as it can
    weight = nn.Parameter(found.weight.t().contiguous() if dim == 0 else found.weight)
    grid = OnGrid([MaskedWeight("w", weight, torch.ones_like(weight), dim)], {"w": parse_format("int4")})
    grid.start("w", floats, found)
    trained = MasterWeights([weight], grid)
    (master,) = trained.masters
    away = (master.t() if dim == 0 else master) - found.weight
    width = found.scales.float().abs().repeat_interleave(32, 1)
    assert (away.abs() <= 0.49 * width + 1e-6).all() and (away[1:] / width[1:]).std() > 0.2
    place = floats / spread(found.scales, 64)
    there = (place > -8.4) & (place < 7.4)  # what is not cut off
    there[0] = False
    assert there[1:].float().mean() > 0.95
    torch.testing.assert_close((away + found.weight)[there], floats[there], rtol=0.02, atol=0.01)
    before = weight.detach().clone()
    trained.write_back()
    assert torch.equal(weight, before)  # the codes are those that were found
    (again,) = MasterWeights([weight], grid).masters
    assert torch.equal(again, weight)  # told of once: what is loaded from a file comes later


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("values", ["int4", "int8", "int4/16"])
def test_what_a_learner_sees_and_learns(dim, values):
    """Before it moves: the rounded weight. Its gradients: straight through the codes, LSQ's of a width; none at pruned
    places. What it learned: on the grid again."""
    form, floats = parse_format(values), torch.randn(6, 64)
    mask = (torch.rand(6, 64) < 0.5).float()
    found = round_weight(floats * mask, form, mask=mask.bool())
    weight = nn.Parameter(found.weight.t().contiguous() if dim == 0 else found.weight)
    grid = OnGrid([MaskedWeight("w", weight, mask.t().contiguous() if dim == 0 else mask, dim)], {"w": form})
    grid.start("w", floats * mask, found)
    learner = grid.learner(weight)
    torch.testing.assert_close(learner.value().detach(), weight.detach())
    pull = torch.randn_like(weight)
    (learner.value() * pull).sum().backward()
    master, growth = learner.leaves
    width, pull = spread(found.scales, 64), pull.t() if dim == 0 else pull
    place = master.detach() / width
    levels = Grid(form)
    least, largest = levels.least, levels.largest
    inside = (place >= least) & (place <= largest)
    torch.testing.assert_close(master.grad, pull * mask * inside)
    slope = torch.where(inside, levels.nearest(place.clone()) - place, place.clamp(least, largest)) * width
    wanted = (slope * pull * mask).unflatten(1, (-1, form.group or 64)).sum(2)
    torch.testing.assert_close(growth.grad, wanted, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        master += 0.4 * width
        growth += 0.1
    seen = learner.value().detach()
    result = grid.learned(weight, learner)
    off = (result - seen).abs() > (2e-3 if form.group else 1e-5) * seen.abs()
    assert off.float().mean() < 0.01  # scales are stored in float16: a master half-way between two codes may fall
    wanted = scale_values(found.scales) * torch.tensor(0.1).exp()
    torch.testing.assert_close(scale_values(grid.scales["w"]), wanted, rtol=2e-3, atol=0)
    assert ((result.t() if dim == 0 else result)[mask == 0] == 0).all()
    (next_master,) = MasterWeights([weight], grid).masters
    assert torch.equal(grid.rounded(weight, next_master.detach()), result)


def test_a_width_that_does_not_fit_stays_in_floats():
    fits, odd = (nn.Parameter(torch.randn(4, width)) for width in (32, 40))
    weights = [MaskedWeight(n, p, torch.ones_like(p), 1) for n, p in (("fits", fits), ("odd", odd))]
    formats, against = fitting(weights, parse_format("int4"), TWO_FOUR)
    grid = OnGrid(weights, formats)
    assert set(grid.scales) == set(formats) == {"fits"}
    assert set(against) == {"odd"} and "no multiple of the group" in against["odd"]
    assert fitting(weights, Format(), TWO_FOUR) == ({}, {})
    assert grid.rounded(odd, odd.detach()) is not None and torch.equal(grid.rounded(odd, odd.detach()), odd)


def test_levels_are_those_of_the_pattern_that_the_weights_are_packed_in():
    weight = nn.Parameter(torch.randn(4, 32))
    weights = [MaskedWeight("w", weight, torch.ones_like(weight), 1)]
    formats, against = fitting(weights, parse_format("int4/16"), TWO_FOUR)
    assert formats == {"w": parse_format("2:4 int4/16")} and not against
    formats, against = fitting(weights, parse_format("int4/16"), parse_pattern("4:8"))
    assert not formats and "levels for 2:4 and dense weights, not for 4:8" in against["w"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": "int3"}, "int3"),
        ({"values": "int8", "preset": "paper"}, "final from the start"),
        ({"values": "int8", "method": "ast", "preset": None}, "final from the start"),
    ],
)
def test_what_cannot_be(captured_once, changes, message):
    found = captured_once("llama")
    with pytest.raises(SparseForgeError, match=message):
        sf.sparsify(found.model, ids(), **HOW | changes)
    assert all(torch.equal(v, found.first[k]) for k, v in found.model.state_dict().items())


def test_a_loop_of_ones_own_does_not_round(captured_once):
    with pytest.raises(SparseForgeError, match="loop of sparsify"):
        sf.prepare(captured_once("llama").model, None, sf.alps_kd_preset(3, values="int8"), calibration=[ids(2)])
