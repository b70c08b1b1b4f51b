"""Each format's solution is in that format, and its error grows as the bits go."""

import torch

from sparseforge_fx.formats import parse_format
from sparseforge_fx.pattern import TWO_FOUR, check_pattern
from sparseforge_fx.planning.solutions import solutions


def test_all_formats():
    torch.manual_seed(0)
    weight, x = torch.randn(24, 64), torch.randn(500, 64) @ torch.randn(64, 64)
    moments = x.t() @ x / len(x)
    formats = [parse_format(f) for f in ("dense", "dense int8", "dense int4/32", "2:4", "2:4 int8", "2:4 int4/32")]
    formats += [parse_format(f) for f in ("dense int4/16", "2:4 int4/16")]
    found = {str(f): w for f, w in solutions(weight, moments, formats).items()}
    assert torch.equal(found["dense"], weight)
    for name, solved in found.items():
        assert not name.startswith("2:4") or check_pattern(solved, TWO_FOUR)
    assert all(len(row.unique()) <= 15 for row in found["2:4 int4/32"][:, :32])
    assert torch.equal(found["2:4 int8"] != 0, (found["2:4"] != 0) & (found["2:4 int8"] != 0))
    error = {n: float((((w - weight) @ moments) * (w - weight)).sum()) for n, w in found.items()}
    assert error["dense int8"] < error["dense int4/32"] < error["2:4"] < error["2:4 int4/32"]
    assert error["2:4 int8"] < 1.05 * error["2:4"]
    assert error["dense int8"] < error["dense int4/16"] < 0.8 * error["dense int4/32"]
    of_rounding = {group: found[f"2:4 int4/{group}"] - found["2:4"] for group in (16, 32)}
    left = {group: float(((delta @ moments) * delta).sum()) for group, delta in of_rounding.items()}
    assert left[16] < 0.95 * left[32]


def test_rows_alone_are_solved_as_among_all():
    torch.manual_seed(0)
    weight, x = torch.randn(40, 64), torch.randn(500, 64) @ torch.randn(64, 64)
    moments, rows = x.t() @ x / len(x), torch.tensor([3, 4, 30])
    formats = [parse_format(f) for f in ("2:4", "dense int8", "2:4 int4/32", "dense int4/32")]
    whole, few = (solutions(w, moments, formats) for w in (weight, weight[rows]))
    assert list(whole) == list(few) == formats
    for form in formats:
        torch.testing.assert_close(few[form], whole[form][rows], rtol=1e-3, atol=1e-3)
