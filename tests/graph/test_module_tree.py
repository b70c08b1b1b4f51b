"""Blocks become modules that own what they alone read; the numbers stay, to the bit."""

import pytest
import tiny_models
import torch
from torch import nn

from sparseforge_fx.graph.module_tree import BlockModule, with_block_modules


def held(module):
    return {id(p): p.shape for p in module.parameters()}


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "moe", "mlp"])
def test_the_same_numbers_and_the_same_parameters(tiny, name):
    found = tiny(name)
    module = found.program.module()
    batch = found.batch()
    given = ((), batch) if isinstance(batch, dict) else ((batch,), {})
    expected, before = module(*given[0], **given[1]), held(module)
    twin = with_block_modules(module)
    got = twin(*given[0], **given[1])
    one, two = (o if isinstance(o, torch.Tensor) else o.logits for o in (expected, got))
    assert torch.equal(one, two)
    assert held(twin) == before
    blocks = [m for m in twin.modules() if isinstance(m, BlockModule)]
    assert len(blocks) == (2 if name in ("llama", "gemma3") else 0)
    for block in blocks:
        inside = dict(found.model.named_parameters())
        mine = {n: p for n, p in block.named_parameters()}
        assert set(block.names.values()) == {n for n in inside if n.startswith(f"{block.path}.")}
        assert all(mine[a] is inside[n] for a, n in block.names.items())


def test_what_two_blocks_share_stays_outside():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            make = lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(8)))  # noqa: E731
            self.layers = nn.ModuleList([make(), make()])
            self.layers[1][0].weight = self.layers[0][0].weight

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).relu()
            return x

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(2, 8)
    module = tiny_models.capture(model, x).module()
    expected = module(x)
    twin = with_block_modules(module)
    assert torch.equal(twin(x), expected)
    names = [n for m in twin.modules() if isinstance(m, BlockModule) for n in m.names.values()]
    assert len(names) == 30 and "layers.0.0.weight" not in names and "layers.1.0.weight" not in names
