"""Intermediate values found in the graph against those that Hugging Face models return themselves."""

import pytest
import torch
import transformers
from rounding import same_products
from torch import nn

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.graph.taps import Taps, tap

SIZE = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZE, intermediate_size=48, num_key_value_heads=2)
    ),
    "opt": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(**SIZE, ffn_dim=48, word_embed_proj_dim=32)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=61)
    ),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZE, intermediate_size=48)),
}


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_and_attention_are_the_models_own(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    ids = torch.randint(0, 61, (2, 9))
    program = capture(model, {"input_ids": ids})
    taps = Taps()
    tapped = tap(program.module(), taps, attention=True)
    with torch.no_grad():
        got = tapped(input_ids=ids)
        model.set_attn_implementation("eager")
        expected = model(input_ids=ids, output_hidden_states=True, output_attentions=True)
    assert len(taps.hidden) == len(taps.attention) == 3
    for mine, theirs in zip(taps.hidden[:2], expected.hidden_states[1:3], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(taps.attention, expected.attentions, strict=True):
        torch.testing.assert_close(mine.softmax(-1), theirs, rtol=1e-4, atol=1e-5)
    plain = program.module()(input_ids=ids)
    assert all(same_products(a, b) for a, b in zip(got.values(), plain.values(), strict=True) if torch.is_tensor(a))


def test_the_module_that_was_tapped_stays_as_it_was(tiny):
    found = tiny("llama")
    module = found.program.module()
    code, taps = module.code, Taps()
    twin = tap(module, taps)
    module(**found.batch())
    assert module.code == code and not taps.hidden
    assert list(twin.state_dict()) == list(module.state_dict())
    assert all(a is b for a, b in zip(twin.parameters(), module.parameters(), strict=True))
    twin(**found.batch())
    assert len(taps.hidden) == 2 and taps.hidden[0].requires_grad and not taps.attention
    taps.clear()
    assert not taps.hidden


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return x + self.two(self.one(x).relu().sigmoid().tanh() * 2 + 1).exp() / 3


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_model_without_blocks_or_attention():
    mlp = capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(2, 4)).module()
    with pytest.raises(SparseForgeError, match="no repeated blocks"):
        tap(mlp, Taps())
    with pytest.raises(SparseForgeError, match="no scaled_dot_product_attention"):
        tap(capture(Stack(), torch.randn(2, 3, 4)).module(), Taps(), attention=True)
