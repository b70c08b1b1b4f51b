"""The tests' own tolerance: as wide as rounding, and no wider than a fault."""

import pytest
import torch
from rounding import rounding, same_products


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_another_order_of_the_sums_passes_and_a_lost_term_does_not(dtype):
    x, weight = torch.randn(50, 64).to(dtype), torch.randn(40, 64).to(dtype)
    order = torch.randperm(64)
    y = torch.nn.functional.linear(x, weight)
    assert same_products(torch.nn.functional.linear(x[:, order], weight[:, order]), y, depth=1)
    assert not same_products(torch.nn.functional.linear(x[:, 1:], weight[:, 1:]), y)
    assert not same_products(y.double() if dtype != torch.float64 else y.float(), y)
    assert not same_products(torch.where(y == y.max(), float("nan"), y), y)


def test_it_grows_with_the_depth():
    assert rounding(torch.float32, 8) == 2 * rounding(torch.float32, 4) < 1e-4
