"""The gate: what it measures, what it decides, and the tables that it keeps."""

import json

import pytest
import torch

from sparseforge_fx.deploy.lowering import cost
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import parse_format
from sparseforge_fx.kernels.layouts import PLANES, ROWS, find_target, layouts_of

CPU = torch.device("cpu")
SHAPE = cost.Shape(16, 32, "float32")


def timing(tokens, ratio, shape=SHAPE, layout="rows"):
    return cost.Timing(shape, layout, tokens, 10.0 * ratio, (9.0 * ratio, 11.0 * ratio), 10.0, (9.0, 11.0))


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


@pytest.mark.parametrize(("numbers", "copies"), [(1 << 25, 2), (1 << 16, 1024), (16, cost.MOST_COPIES)])
def test_a_weight_is_cold_when_its_turn_comes(numbers, copies):
    """As many copies as 256 MiB hold, and of the least no more than calls are timed."""
    made = cost._copies((torch.zeros(numbers), None))
    assert len(made) == copies and len({copy[0].data_ptr() for copy in made}) == copies


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


def test_measuring_a_tiny_shape():
    layouts = [ROWS, PLANES, PLANES._replace(name="none", limits=lambda *_: "never")]
    by_layout = cost.measure([SHAPE], [1, 3], CPU, layouts, rounds=3, seconds=1e-4)[SHAPE]
    assert {name: set(found) for name, found in by_layout.items()} == {"rows": {1, 3}, "planes": {1, 3}}
    for row in (row for found in by_layout.values() for row in found.values()):
        low, high = row.packed_quartiles
        assert 0 < low <= row.packed_us <= high and row.dense_us > 0
        described = row.describe()
        assert described["ratio"] == row.dense_us / row.packed_us
        assert described["packed_gb_per_s"] * row.packed_us * 1e3 == pytest.approx(16 * 32 * (2 + 1 / 8))


def test_every_format_is_timed():
    formats = ["2:4", "dense int8", "2:4 int8", "dense int4/32", "2:4 int4/128"]
    shapes = [cost.Shape(16, 128, "float32", parse_format(text)) for text in formats]
    table = cost.measure(shapes, [1, 3], CPU, layouts_of(CPU), rounds=3, seconds=1e-4)
    assert set(table) == set(shapes)
    for shape, by_layout in table.items():
        taking = {layout.name for layout in layouts_of(CPU) if not layout.refuses(16, 128, torch.float32, CPU, shape.format)}
        assert set(by_layout) == taking >= {"rows"} and all(set(rows) == {1, 3} for rows in by_layout.values())
        row = by_layout["rows"][1]
        assert row.packed_us > 0 and cost.read_row(row.describe()) == row
        assert shape.bytes == pytest.approx(16 * 128 * shape.format.bits(128, 32) / 8)
    assert set(cost.gains(table, shapes[2], "rows", shapes[2].rival)) == {1, 3}  # over dense int8


def test_each_shape_is_measured_once(monkeypatch):
    seen = []
    monkeypatch.setattr(
        cost, "measure", lambda shapes, *_: seen.extend(shapes) or {SHAPE: {"rows": {1: timing(1, 2.0)}}}
    )
    assert set(cost.timings([SHAPE, SHAPE], [1], CPU, find_target("cpu", CPU), None)) == {SHAPE}
    assert seen == [SHAPE]


def test_a_table_goes_through_a_file_and_needs_no_measuring(tmp_path, monkeypatch):
    table = cost.as_table([timing(1, 1.5), timing(8, 1.1), timing(1, 0.9, SHAPE._replace(dtype="bfloat16"), "planes")])
    cost.save_table(table, tmp_path / "table.json")
    assert cost.load_table(tmp_path / "table.json") == table
    assert "device" in json.loads((tmp_path / "table.json").read_text())
    monkeypatch.setattr(cost, "measure", None)
    other = SHAPE._replace(out_features=17)
    found = cost.timings([SHAPE, other], [1], CPU, find_target("cpu", CPU), table)
    assert found[SHAPE] == table[SHAPE]
    assert cost.choose(found, other, [ROWS], [1]) == (None, "not measured at 1 tokens")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "[" * 100_000, '{"version": 99, "rows": []}', '{"version": 3}', '{"version": 3, "rows": [{"out": 1}]}',
     '{"version": 3, "rows": [{"out": 1, "in": 4, "dtype": "float32", "format": "2:4", "layout": "rows", "tokens": 1, "dense_us": 0, "packed_us": 1,'
     ' "dense_quartiles": [0, 0], "packed_quartiles": [1, 1]}]}'],
)  # fmt: skip
def test_files_that_are_no_table(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(SparseForgeError, match="cost table"):
        cost.load_table(path)
    with pytest.raises(SparseForgeError, match=r"none\.json cannot be read: No such file"):
        cost.load_table(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("entry", "value"),
    [("out", -1), ("in", 1 << 70), ("in", "x"), ("in", True), ("dtype", "object"), ("layout", 3), ("format", "3:4"), ("tokens", 1.5),
     ("dense_us", float("inf")), ("packed_us", -1), ("packed_us", "1"), ("dense_quartiles", []),
     ("packed_quartiles", [1, float("nan")])],
)  # fmt: skip
def test_a_damaged_row(tmp_path, entry, value):
    row = {**timing(1, 1.5).describe(), entry: value}
    (tmp_path / "table.json").write_text(json.dumps({"version": 3, "rows": [row]}))
    with pytest.raises(SparseForgeError, match="is not a cost table") as caught:
        cost.load_table(tmp_path / "table.json")
    assert "\n" not in str(caught.value)


def test_a_table_of_an_older_version_is_to_be_measured_again(tmp_path):
    (tmp_path / "table.json").write_text('{"version": 2, "rows": []}')
    with pytest.raises(SparseForgeError, match=r"is a cost table of version 2: measure again"):
        cost.load_table(tmp_path / "table.json")


@pytest.mark.parametrize(
    ("dense_int8_us", "reason"), [(15.0, None), (9.0, "slower than dense int8 at 1 tokens (0.90x)")]
)
def test_a_sparse_weight_must_beat_the_dense_one_of_the_same_bits(dense_int8_us, reason):
    sparse = SHAPE._replace(format=parse_format("2:4 int8"))
    assert sparse.rival == SHAPE._replace(format=parse_format("dense int8")) and SHAPE.rival is None
    rival = timing(1, 4.0, sparse.rival)._replace(packed_us=dense_int8_us)
    table = cost.as_table([timing(1, 4.0, sparse), rival])
    assert cost.choose(table, sparse, [ROWS], [1]) == ((None, reason) if reason else (ROWS, None))
    without = cost.as_table([timing(1, 4.0, sparse)])
    assert cost.choose(without, sparse, [ROWS], [1]) == (None, "not measured at 1 tokens")
    assert set(cost.timings([sparse], [1], CPU, [ROWS], without)) == {sparse, sparse.rival}


def test_where_no_kernel_takes_the_rival_it_is_the_dense_weight_of_the_models_own_dtype():
    sparse = SHAPE._replace(format=parse_format("2:4 int8"))
    for ratio, reason in ((1.5, None), (0.8, "slower than dense at 1 tokens (0.80x)")):
        table = cost.as_table([timing(1, ratio, sparse)._replace(layout="planes")])
        assert cost.choose(table, sparse, [PLANES], [1]) == ((None, reason) if reason else (PLANES, None))


@pytest.mark.parametrize("tokens", [[], [0], [4, -1]])
def test_token_counts_that_make_no_sense(tokens):
    with pytest.raises(SparseForgeError, match="token counts"):
        cost.check_request(tokens, None)


@pytest.mark.parametrize("tokens", [[], [0], "8", 8.0, [1.5], 0])
def test_token_counts_that_are_none(tokens):
    with pytest.raises(SparseForgeError, match="give a list of token counts of at least 1"):
        cost.check_request(tokens, None)
