"""What a batch is to a model: inputs, labels, real positions; and what is said of the rest."""

from collections import namedtuple

import numpy as np
import pytest
import torch
from tiny_models import seq2seq, t5
from torch import nn

from sparseforge_fx.data.reading import Reader, by_name, example_of, is_causal_lm, shifted_labels
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.training.distillation import Distillation

IDS = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x, y=None, labels=None):
        return self.norm(self.one(x) if y is None else self.one(x) + y)


class Nested(Sum):
    def forward(self, batch):
        return self.norm(self.one(batch["x"]))


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def reader_of(model, example):
    return Reader(capture(model, example))


def test_shifted_labels_score_the_next_token():
    ids = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    assert shifted_labels(ids).tolist() == [[6, 7, 8, -100], [2, 3, 4, -100]]
    assert ids.tolist() == [[5, 6, 7, 8], [1, 2, 3, 4]]


def test_shifted_labels_leave_padding_out():
    """Neither is a padding token predicted, nor does one predict."""
    ids = torch.tensor([[5, 6, 7, 0, 0], [0, 0, 7, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    assert shifted_labels(ids, mask).tolist() == [[6, 7, -100, -100, -100], [-100, -100, 8, 9, -100]]


# -- inputs and labels by name -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["mapping", "pair", "named tuple", "alias"])
def test_labels_in_every_usual_place(form):
    x, y = torch.randn(3, 8), torch.arange(3)
    reader = reader_of(Sum(), (torch.randn(4, 8),))
    args, kwargs = {
        "mapping": ((), {"labels": y, "x": x}),
        "pair": ((x, None, y), {}),
        "named tuple": (namedtuple("Row", "x y labels")(x, None, y), {}),
        "alias": ((), {"x": x, "label": y}),
    }[form]
    found = reader.read(tuple(args), kwargs)
    assert found.labels is y and len(found.args) == 1 and found.args[0] is x and not found.kwargs
    assert reader.notes == []


def test_one_item_more_than_forward_takes_is_the_labels_and_several_are_named():
    reader = reader_of(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), (torch.randn(4, 8),))
    x, y = torch.randn(3, 8), torch.arange(3)
    assert reader.read((x, y), {}).labels is y and reader.notes == []
    assert reader.read((x, y, y), {}).labels is None
    assert len(reader.notes) == 2 and "item 1" in reader.notes[0] and "not used" in reader.notes[0]


def test_what_the_model_does_not_take_is_named_once():
    model = Sum()
    reader = reader_of(model, example_of(model, {"x": torch.randn(4, 8), "text": ["a"] * 4, "index": torch.arange(4)}))
    for _ in range(2):
        found = reader.read((), {"text": ["a"] * 3, "x": torch.randn(3, 8), "index": torch.arange(3)})
    assert list(found.kwargs) == ["x"]
    assert len(reader.notes) == 2 and all("not used" in n for n in reader.notes)


def test_nested_inputs():
    model, x = Nested(), torch.randn(3, 8)
    for batch in ({"x": x}, ({"x": x},)):
        reader = reader_of(model, example_of(model, batch))
        args, kwargs = (batch, {}) if isinstance(batch, tuple) else ((), batch)
        assert reader.read(args, kwargs).given["batch"]["x"] is x


def test_another_form_than_captured_is_a_sentence():
    reader = reader_of(Sum(), (torch.randn(4, 8),))
    with pytest.raises(SparseForgeError, match="lacks x"):
        reader.read((), {"inputs": torch.randn(3, 8), "y": None})
    with pytest.raises(SparseForgeError, match="another form"):
        reader.read(([torch.randn(3, 8)],), {})


def test_a_wrapper_that_takes_anything_passes_tensors_on():
    model = Wrapper(Sum())
    given = example_of(model, {"x": torch.randn(3, 8), "text": ["a"] * 3, "labels": torch.arange(3)})
    assert list(given) == ["x"]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": [[5, 6], [7, 8]]}, "holds no tensor but int"),
        ([5, 6, 7], "holds no tensor but int"),
        ({"input_ids": np.ones((2, 3), dtype=int)}, "holds no tensor but ndarray"),
        ({}, "holds no tensor but nothing"),
        ({"input_ids": [[5, 6], [7, 8]], "labels": torch.ones(2, 2)}, "input_ids of a batch is of type list, not a tensor"),
        ({"input_ids": torch.ones(2, 3).long(), "attention_mask": np.ones((2, 3))}, "attention_mask of a batch is of type ndarray"),
        ({"input_ids": torch.ones(3).long()}, r"input_ids of a batch is \[3\], a row without a batch dimension"),
        (torch.ones(3).long(), r"input_ids of a batch is \[3\], a row without a batch dimension"),
    ],
)  # fmt: skip
def test_what_is_no_batch_of_tensors(tiny, batch, message):
    with pytest.raises(SparseForgeError, match=message):
        example_of(tiny("llama").model, batch)


def test_rows_and_values_that_are_inputs():
    """Of a model of one's own a single dimension may be the batch, a list an option."""
    x = torch.randn(8)
    assert example_of(nn.Linear(8, 8), x)[0] is x
    assert example_of(Sum(), {"x": x, "y": [1, 2]}) == {"x": x, "y": [1, 2]}


def test_an_example_keeps_the_users_form():
    x, y = torch.randn(3, 8), torch.randn(3, 8)
    model = Sum()
    assert isinstance(example_of(model, (x, y)), tuple) and len(example_of(model, (x, y, torch.arange(3)))) == 2
    assert list(example_of(model, {"y": y, "x": x, "labels": 1})) == ["y", "x"]
    assert len(example_of(model, x)) == 1


# -- language models ---------------------------------------------------------------------------------------------------
def test_who_is_a_causal_language_model(tiny):
    llama = tiny("llama").model
    assert is_causal_lm(llama) and is_causal_lm(Wrapper(llama))
    assert not is_causal_lm(tiny("bert").model) and not is_causal_lm(t5()) and not is_causal_lm(tiny("mlp").model)


def test_labels_of_a_causal_model_are_moved_and_padding_is_never_one(tiny):
    found = tiny("gpt2")
    ids = found.batch()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    reader = reader_of(found.model, {"input_ids": ids, "attention_mask": mask})
    for extra in ({}, {"labels": ids}):  # also where the user's labels hold padding
        read = reader.read((), {"input_ids": ids, "attention_mask": mask, **extra})
        assert torch.equal(read.labels, shifted_labels(ids, mask)) and (read.labels[0, 7:] == -100).all()
        assert torch.equal(read.real_rows(torch.zeros(*ids.shape, 97)), mask.bool())
    assert read.real_rows(torch.zeros(2, 4)) is None


def test_padding_without_a_mask_is_named(tiny):
    found = tiny("llama")
    reader = Reader(found.program)
    ids = found.batch()["input_ids"].clamp(min=3)
    reader.read((), {"input_ids": ids})
    assert reader.notes == []
    ids[0, -3:] = 0
    reader.read((), {"input_ids": ids})
    assert len(reader.notes) == 1 and "padding token 0" in reader.notes[0]


def test_masks_that_do_not_say_which_positions_are_padding_are_named(tiny):
    found = tiny("llama")
    reader = Reader(found.program)
    ids = found.batch()["input_ids"].clamp(min=3)
    read = reader.read((), {"input_ids": ids, "attention_mask": torch.zeros(2, 1, 12, 12)})
    assert not read.real and any("attention_mask" in n for n in reader.notes)


# -- encoder and decoder -----------------------------------------------------------------------------------------------
def test_a_decoders_inputs_are_made_from_its_labels():
    model, batch = t5(), seq2seq()
    given = by_name(model, (), batch)
    assert torch.equal(given["decoder_input_ids"], model.prepare_decoder_input_ids_from_labels(batch["labels"]))
    assert torch.equal(given["decoder_attention_mask"], (batch["labels"] != -100).long())
    assert set(example_of(model, batch)) == {
        "input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask",
    }  # fmt: skip


def test_each_mask_speaks_of_its_own_rows():
    model, batch = t5(), seq2seq()
    reader = reader_of(model, example_of(model, batch))
    read = reader.read((), batch)
    assert torch.equal(read.real_rows(torch.zeros(2, 6, 97)), batch["labels"] != -100)
    assert read.labels is batch["labels"] and reader.notes == []
    again = reader.read((), {k: v for k, v in read.given.items() if k not in ("labels", "decoder_attention_mask")})
    assert again.real_rows(torch.zeros(2, 6, 97)) is None  # nothing says that a position is padding


def test_the_models_own_loss_of_a_pair_of_texts():
    """Also where source and target have one length, so that shapes do not tell the masks apart."""
    import sparseforge_fx as sf

    model = t5()
    for width in (10, 6):
        batch = seq2seq()
        batch["labels"] = torch.nn.functional.pad(batch["labels"], (0, width - 6), value=-100)
        sparse = sf.prepare(model, batch, sf.annealed_preset(4), objective=Distillation(kl=0.0)).train()
        torch.testing.assert_close(sparse(**batch).loss, model(**batch).loss, rtol=1e-5, atol=1e-6)


def test_a_decoder_whose_inputs_cannot_be_made_is_a_sentence():
    model, batch = t5(), seq2seq()
    model.config.decoder_start_token_id = model.config.pad_token_id = None
    with pytest.raises(SparseForgeError, match="decoder_input_ids"):
        by_name(model, (), batch)


def test_a_batch_without_padding_needs_no_mask(tiny):
    found = tiny("gpt2")
    ids = found.batch()["input_ids"]
    reader = reader_of(found.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert torch.equal(reader.read((), {"input_ids": ids}).kwargs["attention_mask"], torch.ones_like(ids))


def test_no_module():
    with pytest.raises(SparseForgeError, match="expected a torch"):
        example_of(len, torch.ones(2))
