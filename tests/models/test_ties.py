"""Which linears share an embedding's weight, and that nothing ties them again once they are parted."""

import pytest
import torch
from tiny_checkpoint import tiny_llama
from tiny_models import build, t5
from torch import nn

from sparseforge_fx.models.ties import part, tied_heads, untied


class Small(nn.Module):
    def __init__(self, heads=1):
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 8) for _ in range(heads))
        for head in self.heads:
            head.weight = self.table.weight


@pytest.mark.parametrize(
    ("model", "found"),
    [(tiny_llama, {"lm_head": "model.embed_tokens"}),
     (lambda: tiny_llama(tie_word_embeddings=False), {}),
     (lambda: build("gpt2"), {"lm_head": "transformer.wte"}),
     (t5, {}),  # three embeddings and a head under one switch
     (Small, {"heads.0": "table"}),
     (lambda: Small(2), {})],
)  # fmt: skip
def test_which_they_are(model, found):
    assert tied_heads(model()) == found


def test_a_head_under_a_switch_that_ties_more_stays():
    model = tiny_llama()
    model.all_tied_weights_keys["model.norm.weight"] = "model.layers.0.input_layernorm.weight"
    assert tied_heads(model) == {}


def test_parted_for_good():
    model = tiny_llama()
    part(model, "lm_head")
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    model.tie_weights()
    assert not model.lm_head.weight.any() and model.model.embed_tokens.weight.any()
    assert not model.config.tie_word_embeddings and model.all_tied_weights_keys == {}
    part(Small(), "heads.0")  # who has no configuration has nothing to say


@pytest.mark.parametrize("build_one", [tiny_llama, Small])
def test_untied_unless_the_block_fails(build_one):
    model = build_one()
    (name, embedding), *_ = tied_heads(model).items()
    head, table = model.get_submodule(name), model.get_submodule(embedding)
    with pytest.raises(KeyboardInterrupt), untied(model) as parted:
        assert parted == {name: embedding} and head.weight is not table.weight
        assert torch.equal(head.weight, table.weight)
        raise KeyboardInterrupt
    assert head.weight is table.weight and tied_heads(model) == {name: embedding}
    with untied(model):
        pass
    assert head.weight is not table.weight and tied_heads(model) == {}
