"""transformers' switch for experts: set while a model is captured, and back where it was."""

import pytest
import torch
from tiny_models import build
from torch import nn

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.graph.grouped_experts import grouped_experts


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_one_product_for_each_stack_whatever_the_owner_chose(how):
    torch.manual_seed(0)
    model = build("moe").eval()
    model.set_experts_implementation(how)
    ids = torch.randint(3, 97, (2, 12))
    program = capture(model, {"input_ids": ids}, dynamic=False)
    assert model.get_experts_implementation()[""] == how
    assert sum(n for op, n in program.op_counts().items() if "grouped_mm" in op) == 2
    torch.testing.assert_close(
        program.module()(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5
    )


def test_a_part_of_a_module_and_an_error_inside():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = build("moe").eval()
            self.part.set_experts_implementation("eager")

        def forward(self, x):
            raise RuntimeError("no")

    owner = Owner()
    with grouped_experts(owner):
        assert owner.part.config._experts_implementation == "grouped_mm"
    assert owner.part.config._experts_implementation == "eager"
    with pytest.raises(SparseForgeError):
        capture(owner, torch.randn(2, 3))
    assert owner.part.config._experts_implementation == "eager"


def test_models_without_experts_are_left_alone():
    model = build("llama")
    before = model.get_experts_implementation()
    with grouped_experts(model):
        assert model.get_experts_implementation() == before
    with grouped_experts(nn.Linear(2, 2)):
        pass
