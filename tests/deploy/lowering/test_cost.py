"""The gate: what it decides."""

import json

import pytest
import torch
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.deploy.lowering import backend, cost, cost_table
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import parse_format
from sparseforge_fx.kernels.layouts import PLANES, ROWS, find_target
from sparseforge_fx.pattern import TWO_FOUR, hard_mask

CPU = torch.device("cpu")
X = torch.ones(2, 32)
SHAPE = cost_table.Shape(16, 32, "float32")


def timing(tokens, ratio, shape=SHAPE, layout="rows"):
    return cost_table.Timing(shape, layout, tokens, 10.0 * ratio, (9.0 * ratio, 11.0 * ratio), 10.0, (9.0, 11.0))


@pytest.mark.parametrize(
    ("ratios", "reason"),
    [
        ({1: 1.5, 8: 1.2}, None),
        ({1: 1.5, 8: 0.98}, None),  # within the noise
        ({1: 1.5, 8: 0.9}, "slower than dense at 8 tokens (0.90x)"),
        ({1: 1.02, 8: 0.99}, "no faster than dense (at best 1.02x, at 1 tokens)"),
        ({1: 1.5}, "not measured at 8 tokens"),
    ],
)
def test_verdict(ratios, reason):
    assert cost.verdict(ratios, [1, 8]) == reason


def test_only_the_token_counts_asked_for_matter():
    assert cost.verdict({1: 1.5, 2048: 0.5}, [1]) is None


@pytest.mark.parametrize(
    ("rows", "planes", "chosen"),
    [
        ((1.5, 1.1), (1.2, 1.3), ROWS),  # products 1.65 and 1.56
        ((1.5, 1.0), (1.2, 1.3), PLANES),
        ((1.5, 0.9), (1.1, 1.0), PLANES),  # the other is slower somewhere
        ((1.5, 1.5), None, ROWS),
        (None, (1.2, 1.2), PLANES),
        ((0.9, 1.0), (0.8, 1.0), "rows: slower than dense at 1 tokens (0.90x); planes: slower than dense at 1 tokens (0.80x)"),
        ((0.9, 1.0), None, "slower than dense at 1 tokens (0.90x)"),
        (None, None, "not measured at 1, 8 tokens"),
    ],
)  # fmt: skip
def test_the_layout_that_gains_most(rows, planes, chosen):
    given = {"rows": rows, "planes": planes, "of another machine": (9.0, 9.0)}
    timings = {
        name: {t: timing(t, r, layout=name) for t, r in zip((1, 8), ratios, strict=True)}
        for name, ratios in given.items() if ratios
    }  # fmt: skip
    layout, reason = cost.choose({SHAPE: timings}, SHAPE, [ROWS, PLANES], [1, 8])
    assert (layout or reason) == chosen


def test_each_shape_is_measured_once(monkeypatch):
    seen = []
    monkeypatch.setattr(
        cost, "measure", lambda shapes, *_: seen.extend(shapes) or {SHAPE: {"rows": {1: timing(1, 2.0)}}}
    )
    assert set(cost.timings([SHAPE, SHAPE], [1], CPU, find_target("cpu", CPU), None)) == {SHAPE}
    assert seen == [SHAPE]


def test_a_table_goes_through_a_file_and_needs_no_measuring(tmp_path, monkeypatch):
    table = cost_table.as_table(
        [timing(1, 1.5), timing(8, 1.1), timing(1, 0.9, SHAPE._replace(dtype="bfloat16"), "planes")]
    )
    cost_table.save_table(table, tmp_path / "table.json")
    assert cost_table.load_table(tmp_path / "table.json") == table
    assert "device" in json.loads((tmp_path / "table.json").read_text())
    monkeypatch.setattr(cost, "measure", None)
    other = SHAPE._replace(out_features=17)
    found = cost.timings([SHAPE, other], [1], CPU, find_target("cpu", CPU), table)
    assert found[SHAPE] == table[SHAPE]
    assert cost.choose(found, other, [ROWS], [1]) == (None, "not measured at 1 tokens")


@pytest.mark.parametrize(
    ("dense_int8_us", "reason"), [(15.0, None), (9.0, "slower than dense int8 at 1 tokens (0.90x)")]
)
def test_a_sparse_weight_must_beat_the_dense_one_of_the_same_bits(dense_int8_us, reason):
    sparse = SHAPE._replace(format=parse_format("2:4 int8"))
    assert sparse.rival == SHAPE._replace(format=parse_format("dense int8")) and SHAPE.rival is None
    rival = timing(1, 4.0, sparse.rival)._replace(packed_us=dense_int8_us)
    table = cost_table.as_table([timing(1, 4.0, sparse), rival])
    assert cost.choose(table, sparse, [ROWS], [1]) == ((None, reason) if reason else (ROWS, None))
    without = cost_table.as_table([timing(1, 4.0, sparse)])
    assert cost.choose(without, sparse, [ROWS], [1]) == (None, "not measured at 1 tokens")
    assert set(cost.timings([sparse], [1], CPU, [ROWS], without)) == {sparse, sparse.rival}


def test_where_no_kernel_takes_the_rival_it_is_the_dense_weight_of_the_models_own_dtype():
    sparse = SHAPE._replace(format=parse_format("2:4 int8"))
    for ratio, reason in ((1.5, None), (0.8, "slower than dense at 1 tokens (0.80x)")):
        table = cost_table.as_table([timing(1, ratio, sparse)._replace(layout="planes")])
        assert cost.choose(table, sparse, [PLANES], [1]) == ((None, reason) if reason else (PLANES, None))


@pytest.mark.parametrize("tokens", [[], [0], [4, -1]])
def test_token_counts_that_make_no_sense(tokens):
    with pytest.raises(SparseForgeError, match="token counts"):
        cost.check_request(tokens, None)


@pytest.mark.parametrize("tokens", [[], [0], "8", 8.0, [1.5], 0])
def test_token_counts_that_are_none(tokens):
    with pytest.raises(SparseForgeError, match="give a list of token counts of at least 1"):
        cost.check_request(tokens, None)


UNTIMED = {
    "lower": lambda model, path, **how: sf.lower(model, X, gate=False, **how),
    "lower_modules": lambda model, path, **how: sf.lower_modules(model, gate=False, **how),
    "export": lambda model, path, **how: sf.export(model, path, X, gate=False, **how),
    "portable": lambda model, path, **how: sf.export(model, path, X, portable=True, **how),
    "backend": lambda model, path, **how: backend.sparseforge(model, [X], {"gate": False, **how}),
}


@pytest.mark.parametrize("entry", UNTIMED)
@pytest.mark.parametrize("given", [{"tokens": [1]}, {"table": {}}], ids=["tokens", "table"])
def test_what_is_for_timing_is_refused_where_nothing_is_timed(tmp_path, entry, given):
    model = nn.Sequential(nn.Linear(32, 16))
    model[0].weight.data.mul_(hard_mask(model[0].weight.abs(), TWO_FOUR))
    why = "portable=True" if entry == "portable" else "gate=False"
    with pytest.raises(SparseForgeError, match=f"{next(iter(given))} is for timing, and {why} packs all 2:4"):
        UNTIMED[entry](model, tmp_path / "m.pt2", **given)
    assert not list(tmp_path.iterdir())


def test_stacks_are_timed_on_cpus_alone(monkeypatch):
    """Their product asks for its offsets, which a CUDA graph cannot; a table may know them."""
    stack, seen = SHAPE._replace(routing=cost_table.Routing(4, 2)), []
    monkeypatch.setattr(cost, "measure", lambda shapes, *_: seen.extend(shapes) or {s: {} for s in shapes})
    assert cost.timings([SHAPE, stack], [1], torch.device("cuda"), [ROWS], None) == {SHAPE: {}, stack: {}}
    assert seen == [SHAPE]
    table = cost_table.as_table([timing(1, 1.5, stack)])
    found = cost.timings([stack], [1], torch.device("cuda"), [ROWS], table)
    assert cost.choose(found, stack, [ROWS], [1]) == (ROWS, None)
