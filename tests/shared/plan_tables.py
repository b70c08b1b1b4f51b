"""Cost tables that nobody measured."""

from __future__ import annotations

from collections.abc import Mapping

from sparseforge_fx.deploy.lowering import cost_table
from sparseforge_fx.formats import DENSE, parse_format
from sparseforge_fx.planning.candidates import candidates
from sparseforge_fx.planning.make import _shape


def table_of_shares(program, shares: Mapping[str, float]) -> cost_table.Table:
    """Times, at 1 and 8 tokens, of what a plan of this program may choose: shares, by format, of the dense ones."""
    formats = [parse_format(form) for form in shares]
    shapes = {_shape(c, form) for c in candidates(program, formats)[0] for form in c.formats if form != DENSE}
    rows = []
    for shape in shapes:
        dense = shape.out_features * shape.in_features / 100
        packed = dense * shares[str(shape.format)]
        rows += [cost_table.Timing(shape, "rows", t, dense * t, (1.0, 1.0), packed * t, (1.0, 1.0)) for t in (1, 8)]
    return cost_table.as_table(rows)
