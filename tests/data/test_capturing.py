"""What a model is captured with: the example of its user, the data's inputs, or ids that capture makes."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int

import sparseforge_fx as sf
from sparseforge_fx.data.capturing import capture_for
from sparseforge_fx.errors import SparseForgeError

IDS = torch.arange(3, 21).view(3, 6)


class Steps(nn.Module):
    """A recurrent model of text, which walks over the positions: the graph has the example's number of them."""

    main_input_name = "input_ids"

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"vocab_size": 32})()
        self.table, self.step, self.head = nn.Embedding(32, 16), nn.Linear(16, 16), nn.Linear(16, 32)

    def forward(self, input_ids, attention_mask=None):
        x, rows = self.table(input_ids), []
        state = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            state = torch.tanh(self.step(state) + x[:, t])
            rows.append(state)
        return self.head(torch.stack(rows, 1))


def sizes(program):
    """Of each input: the fixed sizes, None where it is dynamic."""
    found = {n.name: n.meta["val"].shape for n in program.user_inputs() if n.meta.get("val") is not None}
    return {name: [int(size) if is_concrete_int(size) else None for size in shape] for name, shape in found.items()}


def test_a_sequence_that_the_model_fixes_is_the_datas():
    program = capture_for(Steps(), {"input_ids": IDS})
    assert sizes(program)["input_ids"] == [None, 6] and "fixed at 6 by the model" in " ".join(program.notes)
    assert program.module()(input_ids=IDS[:2]).shape == (2, 6, 32)


@pytest.mark.parametrize("run", ["sparsify", "quantize"])
def test_runs_of_such_a_model(run):
    model = Steps()
    if run == "sparsify":
        notes = sf.sparsify(model, IDS, method="sparsegpt", show_progress=False).report["notes"]
    else:
        notes = sf.quantize(model, "int8", IDS)["notes"]
    assert any("sequence dimension of input_ids is fixed at 6" in note for note in notes)


def test_a_users_example_goes_first_and_a_mask_makes_the_data_the_example():
    assert sizes(capture_for(Steps(), {"input_ids": IDS}, {"input_ids": IDS[:, :4]}))["input_ids"] == [None, 4]
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    assert list(sizes(capture_for(Steps(), batch))) == ["input_ids", "attention_mask"]
    assert sizes(capture_for(nn.Linear(4, 4), None, torch.randn(2, 4))) == {"input": [None, 4]}


def test_the_form_of_the_data_is_looked_at_beside_an_example():
    with pytest.raises(SparseForgeError, match="a row without a batch dimension"):
        capture_for(Steps(), {"input_ids": IDS[0]}, {"input_ids": IDS})
