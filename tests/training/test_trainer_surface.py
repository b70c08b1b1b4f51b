"""What trainers see of a prepared model: which of its parameters they decay."""

import copy

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import sparseforge_fx as sf


def decayed(model, folder):
    """By the Trainer's own rule."""
    run = Trainer(model=model, args=TrainingArguments(folder, report_to=[], use_cpu=True))
    return set(run.get_decay_parameter_names(model))


def test_what_is_decayed_of_the_model_is_decayed_of_the_prepared_one(captured_once, tmp_path):
    found = captured_once("gpt2")
    sparse = found.sparse(sf.annealed_preset(2))
    names = decayed(sparse, tmp_path)
    assert {id(sparse.get_parameter(n)) for n in names} == {
        id(found.model.get_parameter(n)) for n in decayed(found.model, tmp_path)
    }
    assert names and all(sparse.get_parameter(n).dim() == 2 for n in names)
    assert "ln_f): Vectors(weight: [" in str(sparse)
    sparse.release()


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(16))

    def forward(self, x):
        return x * self.gain


def test_norms_of_ones_own_are_not_decayed_and_train(tmp_path):
    model = nn.Sequential(nn.Sequential(Scale(), Scale()), nn.Linear(16, 8), nn.BatchNorm1d(8))
    sparse = sf.prepare(model, torch.randn(4, 16), sf.annealed_preset(2))
    assert decayed(sparse, tmp_path) == {"graph.1.weight"}
    state = copy.deepcopy(sparse.state_dict())
    sparse.load_state_dict(state)
    sparse.train()(torch.randn(4, 16)).sum().backward()
    assert model[0][0].gain.grad is not None and sf.finalize(sparse) is model and type(model[0][0]) is Scale
