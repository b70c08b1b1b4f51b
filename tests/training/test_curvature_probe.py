"""What estimators draw: of the run's seed, another for every step, vector, micro-batch and process."""

import itertools

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

import sparseforge_fx as sf
from sparseforge_fx.methods.soft_mask import SparseForgeConfig
from sparseforge_fx.training import curvature_probe

X, LABELS = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 2, 0, 1])


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 3)

    def forward(self, x):
        return SequenceClassifierOutput(logits=self.head(self.body(x)))


def estimate(estimator, seed, noise=0, **options):
    """The curvature of one step."""
    config = SparseForgeConfig(steps=10, curvature=estimator, **options)
    sparse = sf.prepare(Classifier(), {"x": X}, config, seed=seed).train()
    torch.manual_seed(noise)
    sparse(x=X, labels=LABELS).loss.backward()
    sparse.step()
    return torch.stack([v.sum() for v in sparse.method.curvature.values.values()]), sparse.reader.notes


@pytest.mark.parametrize("estimator", ["fisher", "hutchinson"])
def test_what_is_drawn_follows_the_seed_and_nothing_else(estimator):
    (first, told), (again, _), (other, _) = (
        estimate(estimator, 1),
        estimate(estimator, 1, noise=9),
        estimate(estimator, 2),
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not any("seed" in note for note in told)


def test_a_seed_that_nothing_is_drawn_with_is_noted():
    assert "seed is given and not used: nothing is drawn in this run" in estimate("gauss_newton", 1)[1]
    assert not any("seed" in note for note in estimate("gauss_newton", 0)[1])


def test_the_vectors_of_a_step_are_others_each(monkeypatch):
    drawn, diagonal = [], curvature_probe.hutchinson_diagonal

    def watched(loss, weights, *, generator):
        drawn.append(torch.randint(2, (64,), generator=generator.clone_state()).tolist())
        return diagonal(loss, weights, generator=generator)

    monkeypatch.setattr(curvature_probe, "hutchinson_diagonal", watched)
    estimate("hutchinson", 0, curvature_vectors=3)
    assert len(drawn) == 3 and len(set(map(tuple, drawn))) == 3


def test_every_number_counts():
    numbers = list(itertools.product((0, 1, 1 << 32), repeat=3))
    draws = [torch.rand(4, generator=curvature_probe.generator_of(torch.device("cpu"), *n)) for n in numbers]
    assert len({tuple(d.tolist()) for d in draws}) == len(numbers)
