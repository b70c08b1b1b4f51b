"""Which mask speaks of which value, and the rows that it leaves."""

import pytest
import torch
from tiny_models import seq2seq, t5

from sparseforge_fx.data.reading import example_of
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.graph.padding import DECODER_MASK, MASK, mask_names, positions_of, real_rows
from sparseforge_fx.passes import find_linears

REAL = torch.tensor([[True, True, False], [True, False, False]])


def test_rows_in_every_layout():
    value = torch.arange(12.0).view(2, 3, 2)
    expected = value[REAL]
    assert torch.equal(real_rows(value, REAL), expected)
    assert torch.equal(real_rows(value.flatten(0, 1), REAL), expected)
    assert torch.equal(real_rows(value.transpose(0, 1), REAL), value.transpose(0, 1)[REAL.t()])
    assert torch.equal(real_rows(value.unsqueeze(2).expand(2, 3, 4, 2), REAL)[::4], expected)


def test_rows_that_are_samples_have_no_padding():
    pooled = torch.randn(2, 5)
    assert torch.equal(real_rows(pooled, REAL), pooled)


def test_rows_of_which_nothing_is_known():
    value = torch.randn(4, 5)
    assert real_rows(value, REAL) is None
    assert torch.equal(real_rows(value, torch.ones(2, 3, dtype=torch.bool)), value)  # no padding: nothing to know
    assert torch.equal(real_rows(value, None), value)


@pytest.mark.parametrize("target", [10, 6])
def test_encoder_and_decoder_have_masks_of_their_own(target):
    """By what a value depends on: sizes do not tell them apart where both texts have one length."""
    model, batch = t5(), seq2seq()
    batch["labels"] = torch.nn.functional.pad(batch["labels"], (0, target - 6), value=-100)
    program = capture(model, example_of(model, batch))
    inputs = {node.name: node for node in program.user_inputs()}
    names = mask_names(program.graph, inputs.values())
    nodes = {n.name: n for n in program.graph.nodes}
    for site in find_linears(program):
        for use in site.uses:
            node = nodes[use.node]
            cross_key = "EncDecAttention.k" in site.fqn or "EncDecAttention.v" in site.fqn
            of_encoder = site.fqn.startswith("encoder") or cross_key
            assert names[node.args[0]] == (MASK if of_encoder else DECODER_MASK), site.fqn
            assert positions_of(node.args[0], names, inputs) is inputs[names[node.args[0]]]


def test_another_tower_has_no_mask(tiny):
    found = tiny("vit")
    assert mask_names(found.program.graph, found.program.graph.find_nodes(op="placeholder")) == {}
