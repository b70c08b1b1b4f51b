"""Tables of blocks by projections."""

import pytest

from sparseforge_fx.formats import parse_format
from sparseforge_fx.page.layers import ELSEWHERE, of_formats, of_numbers, place, tables


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.layers.12.self_attn.q_proj.weight", ("model.layers", "12", "self_attn.q_proj")),
        ("h.0.weight", ("", ELSEWHERE, "h.0")),
        ("0.fc.weight", ("", "0", "fc")),
        ("lm_head.weight", ("", ELSEWHERE, "lm_head")),
        ("encoder.layer.3.experts.7.up", ("encoder.layer", "3", "experts.7.up")),
    ],
)
def test_the_place_of_a_weight(name, wanted):
    assert place(name) == wanted


def test_a_table_for_everything_that_holds_blocks():
    values = {"enc.0.a.x.weight": 1.0, "enc.1.a.x.weight": 3.0, "enc.1.b.x.weight": 2.0, "dec.0.fc.weight": 1.0}
    enc, dec = tables(of_numbers(values, "{:.0f}"))
    assert (enc.title, enc.columns) == ("enc", ["a.x", "b.x"])  # x alone would not tell them apart
    assert [(block, [c and c.text for c in cells]) for block, cells in enc.rows] == [
        ("0", ["1", None]),
        ("1", ["3", "2"]),
    ]
    assert [c.heat for c in enc.rows[1][1]] == [1.0, 0.5] and dec.columns == ["fc"]


def test_many_experts_share_a_column():
    values = {f"m.0.experts.{e}.up.weight": float(e) for e in range(21)}
    (table,) = tables(of_numbers(values))
    assert table.columns == ["up"] and table.rows[0][1][0].text == "10"  # the middle one


def test_colours():
    assert [c.heat for c in of_numbers({"a": 1e-6, "b": 1e-3, "c": 1.0}, log=True).values()] == [0, 0.5, 1]
    assert of_numbers({"a": 2.0})["a"].heat == 0.5
    formats = {"a": parse_format("dense"), "b": parse_format("2:4 int4")}
    cells = of_formats(formats, {"a": 16.0, "b": 3.5})
    assert (cells["a"].heat, cells["b"].heat, cells["b"].text) == (0.0, 1.0, "2:4 int4/32")
