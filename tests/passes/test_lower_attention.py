"""Attention of one position becomes one operator: torch's own numbers, whatever the mask; anything else stays."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import build
from torch import nn
from torch.export import Dim

from sparseforge_fx.deploy.export.generation import Step
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.kernels.decode_attention import DECODE_ATTENTION_OP
from sparseforge_fx.passes import lower_attention, run_passes

ATTENTION = "aten.scaled_dot_product_attention.default"
OURS = "sparseforge.decode_attention.default"


class Attends(nn.Module):
    def __init__(self, repeats=1, **options):
        super().__init__()
        self.proj, self.repeats, self.options = nn.Linear(8, 8), repeats, options

    def forward(self, query, key, value, mask=None):
        key, value = (repeated(t, self.repeats) for t in (key, value))
        return self.proj(F.scaled_dot_product_attention(query, key, value, mask, **self.options))


def repeated(t, count):
    """As transformers' repeat_kv does it."""
    batch, heads, length, size = t.shape
    wide = t[:, :, None, :, :].expand(batch, heads, count, length, size)
    return t if count == 1 else wide.reshape(batch, heads * count, length, size)


def inputs(heads=4, key_heads=4, queries=1, length=10, dtype=torch.float32, mask=None):
    made = {
        "query": torch.randn(2, heads, queries, 8, dtype=dtype),
        "key": torch.randn(2, key_heads, length, 8, dtype=dtype),
        "value": torch.randn(2, key_heads, length, 8, dtype=dtype),
    }
    return made if mask is None else {**made, "mask": mask}


def lowered(options, given):
    program = capture(Attends(**options).to(given["query"].dtype).eval(), given)
    after, (record,) = run_passes(program, [lower_attention])
    assert program.op_counts()[ATTENTION] == 1  # the one given is left as it was
    return program, after, record


BOOLEAN = torch.rand(2, 1, 1, 10, generator=torch.Generator().manual_seed(0)) > 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, {}),
        ({}, {"mask": BOOLEAN}),
        ({}, {"mask": BOOLEAN.expand(2, 4, 1, 10)}),
        ({"scale": 0.3}, {"mask": torch.randn(2, 4, 1, 10)}),
        ({"enable_gqa": True}, {"key_heads": 2, "mask": BOOLEAN}),
        ({"enable_gqa": True}, {"key_heads": 1}),
        ({"repeats": 2}, {"key_heads": 2, "mask": BOOLEAN}),
        ({"repeats": 4}, {"key_heads": 1}),
    ],
)
def test_the_numbers_are_torchs(options, change, dtype):
    torch.manual_seed(0)
    if "mask" in change and change["mask"].is_floating_point():
        change = {**change, "mask": change["mask"].to(dtype)}
    given = inputs(dtype=dtype, **change)
    program, after, record = lowered(options, given)
    assert record.modified == 1 and record.op_changes[ATTENTION] == -1 and record.op_changes[OURS] == 1
    (node,) = after.graph.find_nodes(op="call_function", target=DECODE_ATTENTION_OP)
    assert [t.meta["val"].shape[1] for t in node.args[1:3]] == [given["key"].shape[1]] * 2  # each head is read once
    exactly = Attends(**options).double()
    exactly.load_state_dict(program.module().state_dict())
    exact = exactly(**{n: t.double() if t.is_floating_point() else t for n, t in given.items()})
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(after.module()(**given).double(), exact, rtol=4 * eps, atol=8 * eps)


def test_a_position_that_sees_nothing_gets_zeros():
    mask = BOOLEAN.clone()
    mask[1] = False
    given = inputs(mask=mask)
    _, after, _ = lowered({}, given)
    bias = after.module().state_dict()["proj.bias"]
    assert torch.equal(after.module()(**given)[1], bias.expand(4, 1, 8))


def test_any_batch_and_length():
    class Decodes(nn.Module):
        def forward(self, query, key, mask):
            return F.scaled_dot_product_attention(query, repeated(key, 2), repeated(key, 2), mask)

    def given(rows, length):
        return torch.randn(rows, 4, 1, 8), torch.randn(rows, 2, length, 8), torch.rand(rows, 1, 1, length) > 0.3

    free = {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 2: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = Exported(torch.export.export(Decodes(), given(3, 7), dynamic_shapes=free))
    after, (record,) = run_passes(program, [lower_attention])
    assert record.modified == 1 and record.op_changes["aten.expand.default"] == -2
    for rows, length in ((3, 7), (1, 2), (5, 140)):
        query, key, mask = given(rows, length)
        torch.testing.assert_close(after.module()(query, key, mask), program.module()(query, key, mask))


class Interleaves(nn.Module):
    """Heads in another order than the operator's."""

    def forward(self, query, key, value):
        key, value = (t[:, None].expand(2, 2, 2, 10, 8).reshape(2, 4, 10, 8) for t in (key, value))
        return F.scaled_dot_product_attention(query, key, value)


def test_what_is_repeated_otherwise_is_read_as_it_is():
    given = inputs(key_heads=2)
    program = capture(Interleaves(), given)
    after, (record,) = run_passes(program, [lower_attention])
    assert record.modified == 1 and "aten.expand.default" not in record.op_changes
    torch.testing.assert_close(after.module()(**given), program.module()(**given))


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, {"queries": 2}),
        ({"is_causal": True}, {}),
        ({"dropout_p": 0.5}, {}),
        ({}, {"dtype": torch.float64}),
    ],
)
def test_what_is_left_alone(options, change):
    program, after, record = lowered(options, inputs(**change))
    assert record.modified == 0 and record.op_changes == {} and after.op_counts() == program.op_counts()


def test_once_more_changes_nothing():
    _, after, _ = lowered({}, inputs(mask=BOOLEAN))
    _, (record,) = run_passes(after, [lower_attention])
    assert record.modified == 0 and record.op_changes == {}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_models_next_token(kind):
    model = build(kind).eval()
    step = Step(model, 16)
    program = capture(step, step.example(length=1))
    after, (record,) = run_passes(program, [lower_attention])
    assert record.modified == model.config.num_hidden_layers and ATTENTION not in after.op_counts()
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    for node in after.graph.find_nodes(op="call_function", target=DECODE_ATTENTION_OP):
        assert (
            node.args[1].meta["val"].shape[1] == node.args[2].meta["val"].shape[1] == model.config.num_key_value_heads
        )
    torch.testing.assert_close(after.module()(**step.example(1)), program.module()(**step.example(1)))
    several = capture(step, step.example(length=3))
    assert run_passes(several, [lower_attention])[1][0].modified == 0
