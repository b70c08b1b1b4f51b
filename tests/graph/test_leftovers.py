"""A trace leaves nothing of itself in the model."""

import pytest
import torch
import transformers
from torch import nn

from sparseforge_fx.graph.capture import capture


class Keeps(nn.Module):
    """Makes something at its first call, in one of the ways that real models do."""

    def __init__(self, how):
        super().__init__()
        self.a, self.how, self.tables, self.seen = nn.Linear(8, 8), how, {}, []

    def forward(self, x):
        made = torch.linspace(0, 1, 8, device=x.device)
        if self.how == "attribute":
            if not hasattr(self, "table"):
                self.table = made
            made = self.table
        elif self.how == "buffer":
            if not hasattr(self, "table"):
                self.register_buffer("table", made, persistent=False)
            made = self.table
        elif self.how == "dict":
            made = self.tables.setdefault(8, made)
        else:
            self.seen.append(made)
            made = self.seen[0]
        return self.a(x + made)


@pytest.mark.parametrize("how", ["attribute", "buffer", "dict", "list"])
@pytest.mark.parametrize("called", [False, True], ids=["new", "called before"])
def test_what_is_made_at_the_first_call(how, called):
    model, x = Keeps(how).eval(), torch.randn(3, 8)
    expected = nn.functional.linear(x + torch.linspace(0, 1, 8), model.a.weight, model.a.bias)
    if called:
        model(x)
    for _ in range(2):
        torch.testing.assert_close(capture(model, x).module()(x), expected)
    got = model(x)
    assert type(got) is torch.Tensor
    torch.testing.assert_close(got, expected)


def test_rotary_tables_of_long_contexts():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = transformers.Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, max_position_embeddings=64, original_max_position_embeddings=8,
        rope_parameters={**rope, "original_max_position_embeddings": 8},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(config).eval()
    ids = [torch.randint(64, (2, length)) for length in (6, 24)]
    program = capture(model).module()
    with torch.no_grad():
        expected = [model(x).logits for x in ids]
        assert all(type(value) is torch.Tensor for value in expected)
        for x, want in zip(ids, expected, strict=True):
            torch.testing.assert_close(program(input_ids=x).logits, want)
