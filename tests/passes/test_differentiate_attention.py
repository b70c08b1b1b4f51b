"""Attention in bfloat16 on a CPU becomes the operator with gradients of its own; anything else stays."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparseforge_fx.graph.capture import capture
from sparseforge_fx.passes import differentiate_attention, run_passes

ATTENTION, OURS = "aten.scaled_dot_product_attention.default", "sparseforge.attention.default"


class Attends(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.proj, self.options = nn.Linear(8, 8), options

    def forward(self, x, mask=None):
        q = k = v = self.proj(x)
        if self.options.get("enable_gqa"):
            k = v = v[:, :2]
        return F.scaled_dot_product_attention(q, k, v, mask, **self.options)


@pytest.mark.parametrize(
    ("options", "mask"),
    [
        ({}, None),
        ({"is_causal": True, "scale": 0.3}, None),
        ({"enable_gqa": True}, None),
        ({}, torch.rand(2, 1, 10, 10, generator=torch.Generator().manual_seed(0)) > 0.4),
        ({}, torch.randn(1, 4, 10, 10, generator=torch.Generator().manual_seed(0)).bfloat16()),
    ],
    ids=["plain", "causal", "gqa", "boolean", "additive"],
)
def test_values_stay_to_the_bit_and_gradients_nearly(options, mask):
    torch.manual_seed(0)
    model, x = Attends(**options).bfloat16().eval(), torch.randn(2, 4, 10, 8).bfloat16()
    given = {"x": x} if mask is None else {"x": x, "mask": mask}
    program = capture(model, given)
    after, (record,) = run_passes(program, [differentiate_attention])
    assert record.modified == 1 and record.op_changes == {ATTENTION: -1, OURS: 1}
    assert program.op_counts()[ATTENTION] == 1  # the one given is left as it was
    assert run_passes(after, [differentiate_attention])[1][0].modified == 0
    found = {}
    for name, run in (("torch", model), ("ours", after.module())):
        model.proj.weight.grad = None
        out = run(**given)
        out.float().square().sum().backward()
        found[name] = out, model.proj.weight.grad.float()
    assert torch.equal(found["ours"][0], found["torch"][0])
    largest = found["torch"][1].abs().max()
    torch.testing.assert_close(found["ours"][1], found["torch"][1], rtol=2**-6, atol=float(largest) * 2**-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_types_stay(dtype):
    program = capture(Attends().to(dtype).eval(), {"x": torch.randn(2, 4, 10, 8, dtype=dtype)})
    after, (record,) = run_passes(program, [differentiate_attention])
    assert record.modified == 0 and after.op_counts() == program.op_counts()
