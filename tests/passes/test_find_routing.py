"""How many experts a token goes to: the same whatever computes the experts, and whatever else the model has."""

import pytest
import torch
import transformers
from torch import nn

from sparseforge_fx.deploy.lowering.sparse_modules import SparseLinear
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.kernels.packed import pack
from sparseforge_fx.passes import find_linears
from sparseforge_fx.passes.find_routing import find_routing

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1,
    "max_position_embeddings": 64, "head_dim": 16, "intermediate_size": 48,
}  # fmt: skip


def mixtral(chosen=2):
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=chosen)
    return transformers.MixtralForCausalLM(config).eval()


def routings(program):
    found = {s.fqn: find_routing(program, s) for s in find_linears(program)}
    return {n: r for n, r in found.items() if r is not None}


@pytest.mark.parametrize("how", ["grouped_mm", "batched_mm", "eager"])
def test_whatever_computes_the_experts(how):
    model = mixtral()
    model.set_experts_implementation(how)
    program = capture(model, dynamic=False)
    assert set(routings(program).values()) == {(4, 2)} and len(routings(program)) == 2
    assert all(find_routing(program, s) is None for s in find_linears(program) if s.experts is None)


def test_one_expert_for_a_token():
    assert set(routings(capture(mixtral(1), dynamic=False)).values()) == {(4, 1)}


@pytest.mark.parametrize("name", ["moe", "gpt_oss"])
def test_where_sizes_are_symbols_and_beside_shared_experts(tiny, name):
    assert set(routings(tiny(name).program).values()) == {(4, 2)}


class Reads(nn.Module):
    """A mixture behind a tower of linears for pictures, which have more rows than the text has tokens."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(*(nn.Linear(8, 8) for _ in range(9)))
        self.router = nn.Linear(8, 4)
        self.experts = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x, pictures):
        x = x + self.tower(pictures).mean(0)
        chosen = self.router(x).topk(2).indices.reshape(-1)
        y = torch.bmm(x.repeat_interleave(2, 0)[None].expand(4, -1, -1), self.experts)
        return y[chosen, torch.arange(len(chosen))].view(len(x), 2, 8).sum(1)


class Sliced(nn.Module):
    """Every expert takes every second token."""

    def __init__(self):
        super().__init__()
        self.first, self.experts = nn.Linear(8, 8), nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        x = self.first(x)
        return torch.stack([nn.functional.linear(x[e % 2 :: 2], self.experts[e]).relu().sum() for e in range(4)])


def test_beside_rows_that_are_no_tokens():
    """Every token meets all four experts twice, which is no more than all of them; pictures count for nothing."""
    program = capture(Reads(), (torch.randn(6, 8), torch.randn(100, 8)), dynamic=False)
    assert routings(program) == {"experts": (4, 4)}


def test_where_the_graph_multiplies_by_one_after_the_other():
    net = Sliced()
    assert routings(capture(net, torch.randn(6, 8), dynamic=False)) == {"experts": (4, 2)}
    first = pack(net.first.weight.detach() * torch.tensor([1, 0, 0, 1, 1, 1, 0, 0]))
    net.first = SparseLinear(first, None)  # the linear before may be packed
    assert routings(capture(net, torch.randn(6, 8), dynamic=False)) == {"experts": (4, 2)}
