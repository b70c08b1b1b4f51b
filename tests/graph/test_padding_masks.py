"""Which mask speaks of which value, and the rows that it leaves."""

import copy

import pytest
import torch
from tiny_models import seq2seq, t5
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.data.reading import example_of
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.graph.padding import DECODER_MASK, MASK, Rows, mask_names, positions_of, real_rows
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
            assert names[node.args[0]] == Rows(MASK if of_encoder else DECODER_MASK), site.fqn
            assert positions_of(node.args[0], names, inputs) is inputs[names[node.args[0]].mask]


def test_another_tower_has_no_mask(tiny):
    found = tiny("vit")
    assert mask_names(found.program.graph, found.program.graph.find_nodes(op="placeholder")) == {}


class Encoder(nn.Module):
    """torch's own attention, or linears between moves, flattened or not."""

    def __init__(self, kind):
        super().__init__()
        self.embed, self.kind = nn.Embedding(30, 8), kind
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True) if kind in ("fused", "weights") else None
        self.between, self.read = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        if self.attend is not None:
            y, _ = self.attend(x, x, x, key_padding_mask=attention_mask == 0, need_weights=self.kind == "weights")
            return self.read(self.between(x + y).tanh()).sin()
        x = x.transpose(0, 1) if self.kind != "batch first" else x
        rows = x.reshape(-1, 8) if self.kind != "time first" else x
        x = self.between(rows).tanh().view(x.shape)
        return self.read(x.transpose(0, 1) if self.kind != "batch first" else x).sin()


@pytest.mark.parametrize("kind", ["fused", "weights", "time first", "flat", "batch first"])
@pytest.mark.parametrize("rows", [3, 5])
def test_padding_is_left_out_whatever_runs_first(kind, rows):
    """As many rows as positions, too; each sample alone, without padding, has the same moments."""
    torch.manual_seed(0)
    dense = Encoder(kind).eval()
    ids, mask = torch.randint(1, 30, (rows, 5)), torch.ones(rows, 5, dtype=torch.long)
    for i in range(rows):
        mask[i, 1 + i % 5 :] = 0
    ids *= mask
    alone = [
        {"input_ids": ids[i : i + 1, :n], "attention_mask": mask[i : i + 1, :n]} for i, n in enumerate(mask.sum(1))
    ]
    found = []
    for data in ([{"input_ids": ids, "attention_mask": mask}], alone):
        model = copy.deepcopy(dense)
        report = sf.sparsify(model, data, method="sparsegpt", show_progress=False).report
        assert not any("padding" in note for note in (*report["notes"], *report["layer_notes"].values()))
        found.append(model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_sample_of_what_runs_by_positions_is_a_sample():
    class First(Encoder):
        def forward(self, input_ids, attention_mask):
            return self.read(self.between(self.embed(input_ids).transpose(0, 1)[0]))

    ids = torch.ones(3, 5, dtype=torch.long)
    program = capture(First("pooled").eval(), {"input_ids": ids, "attention_mask": ids})
    names = mask_names(program.graph, program.user_inputs())
    assert {names[n].positions_first for n in program.graph.nodes if "linear" in str(n.target)} == {False}
