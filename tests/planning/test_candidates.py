"""Which weights have a choice, and between what."""

import pytest
import torch

from sparseforge_fx.formats import parse_format
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.planning.candidates import candidates

FORMATS = [parse_format(f) for f in ("2:4", "dense int8", "2:4 int4/32", "dense int4/128")]


def texts(found):
    return {c.site.fqn: [str(f) for f in c.formats] for c in found}


@pytest.mark.parametrize(
    ("name", "linear", "head", "tied"),
    [("llama", "model.layers.0.mlp.up_proj.weight", "lm_head.weight", False),
     ("opt", "model.decoder.layers.0.fc1.weight", "model.decoder.embed_tokens.weight", True),
     ("gpt2", "transformer.h.0.mlp.c_fc.weight", "transformer.wte.weight", True)],
)  # fmt: skip
def test_a_linear_may_be_all_and_a_head_tied_or_not_may_be_quantised(tiny, name, linear, head, tied):
    found, skipped = candidates(tiny(name).program, FORMATS)
    assert texts(found)[linear] == ["dense", "2:4", "dense int8", "2:4 int4/32"]  # 32 inputs make no group of 128
    assert texts(found)[head] == ["dense", "dense int8"]
    assert [(c.tied, len(c.taken)) for c in found if c.site.fqn == head] == [(tied, int(tied))]
    assert not any(c.tied or c.taken for c in found if c.site.fqn != head)
    assert not set(skipped) & set(texts(found))


def test_what_is_named(tiny):
    program = tiny("llama").program
    found, skipped = candidates(program, FORMATS, include=["lm_head", "*.up_proj"], exclude="*.1.*")
    names = ("model.layers.0.mlp.up_proj.weight", "lm_head.weight")
    assert texts(found) == {name: ["dense", "2:4", "dense int8", "2:4 int4/32"] for name in names}
    assert skipped["model.layers.1.mlp.up_proj.weight"] == "excluded by name"
    found, _ = candidates(tiny("opt").program, FORMATS, exclude="model.decoder.embed_tokens")
    assert "model.decoder.embed_tokens.weight" not in texts(found)


def test_where_no_format_is_left_the_reason_is_that_of_the_analysis(tiny):
    found, skipped = candidates(tiny("llama").program, FORMATS[:1])
    assert "lm_head.weight" not in texts(found)
    assert skipped["lm_head.weight"] == "output layer (head); include it by name to prune it"


def test_what_is_deployed_as_one_product_is_a_group(tiny):
    found, _ = candidates(tiny("llama").program, FORMATS)
    groups = {}
    for c in found:
        groups.setdefault(c.group, []).append(c)
    leaves = [[c.site.fqn.split(".")[-2] for c in group] for group in groups.values()]
    assert leaves == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2 + [
        ["lm_head"]
    ]
    assert all(c.group_outputs == sum(o.site.out_features for o in group) for group in groups.values() for c in group)
    found, _ = candidates(tiny("llama").program, FORMATS, exclude="*.q_proj")
    assert [c.group.split(".")[-2] for c in found][:2] == ["k_proj", "k_proj"]
    found, _ = candidates(tiny("gpt2").program, FORMATS)  # x @ W: nothing merges these
    assert all(c.group == c.site.fqn and c.group_outputs == c.site.out_features for c in found)


@pytest.mark.parametrize("name", ["moe", "gpt_oss"])
def test_stacks_of_experts_are_candidates_by_themselves(tiny, name):
    found, skipped = candidates(tiny(name).program, FORMATS)
    stacks = [c for c in found if c.site.experts]
    assert stacks and all(c.routing == (4, 2) and c.group == c.site.fqn for c in stacks)
    assert all(c.routing is None for c in found if not c.site.experts)
    assert {"dense", "2:4", "dense int8"} <= set(texts(stacks)[stacks[0].site.fqn])
    assert not any("experts" in reason for reason in skipped.values())


class Loop(torch.nn.Module):
    """A mixture that multiplies every token by every expert, one after the other."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        self.experts = torch.nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x):
        x = self.first(x)
        return self.last(sum(torch.nn.functional.linear(x, self.experts[e]) for e in range(3)).relu())


def test_where_every_token_meets_every_expert_all_are_chosen():
    program = capture(Loop(), torch.randn(5, 8))
    found, _ = candidates(program, FORMATS)
    (stack,) = [c for c in found if c.site.experts]
    assert stack.routing == (3, 3) and texts([stack]) == {"experts": ["dense", "2:4"]}  # nobody could pack it in few bits
