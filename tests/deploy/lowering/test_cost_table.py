"""Cost tables in files."""

import json

import pytest

from sparseforge_fx.deploy.lowering import cost_table
from sparseforge_fx.errors import SparseForgeError

SHAPE = cost_table.Shape(16, 32, "float32")
STACK = SHAPE._replace(routing=cost_table.Routing(8, 2))


def timing(tokens, ratio, shape=SHAPE, layout="rows"):
    return cost_table.Timing(shape, layout, tokens, 10.0 * ratio, (9.0 * ratio, 11.0 * ratio), 10.0, (9.0, 11.0))


def test_matrices_and_stacks_of_the_same_sides_are_different_rows(tmp_path):
    table = cost_table.as_table([timing(1, 1.5), timing(1, 2.5, STACK)])
    cost_table.save_table(table, tmp_path / "table.json")
    assert cost_table.load_table(tmp_path / "table.json") == table and set(table) == {SHAPE, STACK}


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
        cost_table.load_table(path)
    with pytest.raises(SparseForgeError, match=r"none\.json cannot be read: No such file"):
        cost_table.load_table(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("entry", "value"),
    [("experts", 0), ("experts", 1), ("chosen", 9), ("chosen", "2"), ("out", -1), ("in", 1 << 70), ("in", "x"), ("in", True), ("dtype", "object"), ("layout", 3), ("format", "3:4"), ("tokens", 1.5),
     ("dense_us", float("inf")), ("packed_us", -1), ("packed_us", "1"), ("dense_quartiles", []),
     ("packed_quartiles", [1, float("nan")])],
)  # fmt: skip
def test_a_damaged_row(tmp_path, entry, value):
    row = {**timing(1, 1.5, STACK).describe(), entry: value}
    (tmp_path / "table.json").write_text(json.dumps({"version": 3, "rows": [row]}))
    with pytest.raises(SparseForgeError, match="is not a cost table") as caught:
        cost_table.load_table(tmp_path / "table.json")
    assert "\n" not in str(caught.value)


def test_a_table_of_an_older_version_is_to_be_measured_again(tmp_path):
    (tmp_path / "table.json").write_text('{"version": 2, "rows": []}')
    with pytest.raises(SparseForgeError, match=r"is a cost table of version 2: measure again"):
        cost_table.load_table(tmp_path / "table.json")
