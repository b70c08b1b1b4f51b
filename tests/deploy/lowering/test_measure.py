"""Products that are timed: of matrices and of stacks of experts, in every format."""

import pytest
import torch

from sparseforge_fx.deploy.lowering import cost, cost_table, measure
from sparseforge_fx.formats import parse_format
from sparseforge_fx.kernels.layouts import PLANES, ROWS, layouts_of

CPU = torch.device("cpu")
SHAPE = cost_table.Shape(16, 32, "float32")
ROUTING = cost_table.Routing(6, 2)


@pytest.mark.parametrize(("numbers", "copies"), [(1 << 25, 2), (1 << 16, 1024), (16, measure.MOST_COPIES)])
def test_a_weight_is_cold_when_its_turn_comes(numbers, copies):
    """As many copies as 256 MiB hold, and of the least no more than calls are timed."""
    made = measure._copies((torch.zeros(numbers), None))
    assert len(made) == copies and len({copy[0].data_ptr() for copy in made}) == copies


def test_measuring_a_tiny_shape():
    layouts = [ROWS, PLANES, PLANES._replace(name="none", limits=lambda *_: "never")]
    by_layout = measure.measure([SHAPE], [1, 3], CPU, layouts, rounds=3, seconds=1e-4)[SHAPE]
    assert {name: set(found) for name, found in by_layout.items()} == {"rows": {1, 3}, "planes": {1, 3}}
    for row in (row for found in by_layout.values() for row in found.values()):
        low, high = row.packed_quartiles
        assert 0 < low <= row.packed_us <= high and row.dense_us > 0
        described = row.describe()
        assert described["ratio"] == row.dense_us / row.packed_us
        assert described["packed_gb_per_s"] * row.packed_us * 1e3 == pytest.approx(16 * 32 * (2 + 1 / 8))


def test_every_format_is_timed():
    formats = ["2:4", "dense int8", "2:4 int8", "dense int4/32", "2:4 int4/128"]
    shapes = [cost_table.Shape(16, 128, "float32", parse_format(text)) for text in formats]
    table = measure.measure(shapes, [1, 3], CPU, layouts_of(CPU), rounds=3, seconds=1e-4)
    assert set(table) == set(shapes)
    for shape, by_layout in table.items():
        taking = {
            layout.name for layout in layouts_of(CPU) if not layout.refuses(16, 128, torch.float32, CPU, shape.format)
        }
        assert set(by_layout) == taking >= {"rows"} and all(set(rows) == {1, 3} for rows in by_layout.values())
        row = by_layout["rows"][1]
        assert row.packed_us > 0 and cost_table.read_row(row.describe()) == row
        assert shape.bytes == pytest.approx(16 * 128 * shape.format.bits(128, 32) / 8)
    assert set(cost.gains(table, shapes[2], "rows", shapes[2].rival)) == {1, 3}  # over dense int8


def test_a_stack_is_timed_in_every_format_by_the_rows_that_its_experts_get():
    formats = ["2:4", "dense int8", "2:4 int8", "2:4 int4/32"]
    shapes = [cost_table.Shape(16, 32, "float32", parse_format(text), ROUTING) for text in formats]
    table = measure.measure(shapes, [1, 5], CPU, layouts_of(CPU), rounds=3, seconds=1e-4)
    assert set(table) == set(shapes)
    for shape, by_layout in table.items():
        row = by_layout["rows"][5]
        assert row.packed_us > 0 and row.dense_us > 0 and cost_table.read_row(row.describe()) == row
        assert shape.bytes == pytest.approx(6 * 16 * 32 * shape.format.bits(32, 32) / 8)
        assert shape.bytes_read(1) == pytest.approx(shape.bytes / 3) and shape.bytes_read(1000) == shape.bytes
        assert shape.rival is None or shape.rival.routing == ROUTING


@pytest.mark.parametrize("tokens", [1, 4, 100])
def test_every_token_goes_to_as_many_experts_as_are_chosen(tokens):
    ends = measure._drawn(tokens, ROUTING)
    assert len(ends) == measure.ROUTINGS and len({tuple(e.tolist()) for e in ends}) > 10
    for of_one in ends:
        rows = of_one.diff(prepend=torch.tensor([0]))
        assert rows.sum() == 2 * tokens and (rows >= 0).all() and (rows <= tokens).all() and len(rows) == 6


def test_what_is_timed_of_a_stack_is_its_product():
    """Every expert's rows by its own copy of the same weight: as one product of all rows."""
    weight = torch.randn(16, 32)
    (stack,), *_ = measure._copies((weight,), ROUTING)
    ends, x = measure._drawn(5, ROUTING)[0], torch.randn(10, 32)
    want = x @ weight.t()
    torch.testing.assert_close(measure._dense_experts(x, ends, (stack,)), want)
    packed = measure._random(weight, parse_format("dense int8"))
    (copy, *_) = measure._copies((*ROWS.convert(packed), packed.scales), ROUTING)
    got = measure._packed_experts("rows", x, ends, copy)
    assert (got - want).norm() < 0.02 * want.norm()
