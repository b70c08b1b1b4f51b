"""Attention of one position becomes products and sums: torch's own numbers, whatever the mask; anything else stays."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from sparseforge_fx.graph.capture import capture
from sparseforge_fx.passes import expand_attention, run_passes

ATTENTION = "aten.scaled_dot_product_attention.default"


class Attends(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.proj, self.options = nn.Linear(8, 8), options

    def forward(self, query, key, value, mask=None):
        return self.proj(F.scaled_dot_product_attention(query, key, value, mask, **self.options))


def inputs(heads=4, key_heads=4, queries=1, length=10, dtype=torch.float32, mask=None):
    made = {
        "query": torch.randn(2, heads, queries, 8, dtype=dtype),
        "key": torch.randn(2, key_heads, length, 8, dtype=dtype),
        "value": torch.randn(2, key_heads, length, 8, dtype=dtype),
    }
    return made if mask is None else {**made, "mask": mask}


def expanded(options, given):
    program = capture(Attends(**options).to(given["query"].dtype).eval(), given)
    after, (record,) = run_passes(program, [expand_attention])
    assert program.op_counts()[ATTENTION] == 1  # the one given is left as it was
    return program, after, record


BOOLEAN = torch.rand(2, 1, 1, 10, generator=torch.Generator().manual_seed(0)) > 0.4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, {}),
        ({}, {"mask": BOOLEAN}),
        ({}, {"mask": BOOLEAN.expand(2, 4, 1, 10)}),
        ({"scale": 0.3}, {"mask": torch.randn(2, 4, 1, 10)}),
        ({"enable_gqa": True}, {"key_heads": 2, "mask": BOOLEAN}),
        ({"enable_gqa": True}, {"key_heads": 1}),
    ],
)
def test_the_numbers_are_torchs(options, change, dtype):
    torch.manual_seed(0)
    if "mask" in change and change["mask"].is_floating_point():
        change = {**change, "mask": change["mask"].to(dtype)}
    given = inputs(dtype=dtype, **change)
    program, after, record = expanded(options, given)
    assert record.modified == 1 and record.op_changes[ATTENTION] == -1
    assert record.op_changes["aten.sum.dim_IntList"] == 2 and record.op_changes["aten._safe_softmax.default"] == 1
    exact = F.scaled_dot_product_attention(
        *(given[n].double() for n in ("query", "key", "value")),
        given["mask"].double() if given.get("mask") is not None and given["mask"].is_floating_point() else given.get("mask"),
        **options,
    )  # fmt: skip
    found = after.module()(**given)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, program.module()(**given), rtol=8 * eps, atol=16 * eps)
    linear = program.module().state_dict()
    wanted = F.linear(exact.to(dtype), linear["proj.weight"], linear["proj.bias"])
    torch.testing.assert_close(found, wanted, rtol=4 * eps, atol=8 * eps)


def test_a_position_that_sees_nothing_gets_zeros():
    mask = BOOLEAN.clone()
    mask[1] = False
    given = inputs(mask=mask)
    _, after, _ = expanded({}, given)
    bias = after.module().state_dict()["proj.bias"]
    assert torch.equal(after.module()(**given)[1], bias.expand(4, 1, 8))


def test_any_batch_and_length():
    class Decodes(nn.Module):
        def forward(self, query, key, mask):
            return F.scaled_dot_product_attention(query, key, key, mask)

    def given(rows, length):
        return torch.randn(rows, 2, 1, 8), torch.randn(rows, 2, length, 8), torch.rand(rows, 1, 1, length) > 0.3

    free = {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    from sparseforge_fx.graph.exported import Exported

    program = Exported(torch.export.export(Decodes(), given(3, 7), dynamic_shapes=free))
    after, (record,) = run_passes(program, [expand_attention])
    assert record.modified == 1
    for rows, length in ((3, 7), (1, 1), (5, 40)):
        query, key, mask = given(rows, length)
        torch.testing.assert_close(after.module()(query, key, mask), program.module()(query, key, mask))


@pytest.mark.parametrize(
    ("options", "change"),
    [({}, {"queries": 2}), ({"is_causal": True}, {}), ({"dropout_p": 0.5}, {})],
)
def test_what_is_left_alone(options, change):
    program, after, record = expanded(options, inputs(**change))
    assert record.modified == 0 and record.op_changes == {} and after.op_counts() == program.op_counts()


def test_once_more_changes_nothing():
    _, after, _ = expanded({}, inputs(mask=BOOLEAN))
    _, (record,) = run_passes(after, [expand_attention])
    assert record.modified == 0 and record.op_changes == {}
