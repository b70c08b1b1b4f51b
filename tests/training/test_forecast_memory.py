"""What a run is predicted to hold: the bytes of a weight, who shares them, and when the start is what counts."""

import pytest
import torch

from sparseforge_fx.methods.presets import alps_kd_preset
from sparseforge_fx.methods.soft_mask import SparseForgeConfig
from sparseforge_fx.passes import find_linears
from sparseforge_fx.training import forecast_memory
from sparseforge_fx.training.forecast import trained_beside
from sparseforge_fx.training.recipe import Recipe

ANNEALED = SparseForgeConfig(steps=4)
FIXED = SparseForgeConfig(steps=4, start="magnitude", heat_end=0.0, quench_end=0.0)
HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("config", "optimizer", "dtype", "bytes"),
    [
        (ANNEALED, "adamw", HALF, 26),  # docs/scale.md
        (FIXED, "adamw", HALF, 24),
        (ANNEALED, "adamw8bit", HALF, 20),
        (ANNEALED, "adamw", FULL, 28),
    ],
)
def test_bytes_of_a_weight_with_a_mask(config, optimizer, dtype, bytes):
    assert forecast_memory.states(1000, config, optimizer, dtype) + 1000 * dtype.itemsize == 1000 * bytes


def predict(found, config, shared_by=1, **options):
    recipe = Recipe().changed(batch_size=2, length=12, **options).resolved(True)
    chosen = [s for s in find_linears(found.program, config.pattern) if s.reason is None]
    parameters = sum(p.numel() for p in found.model.parameters())
    taken = forecast_memory.of_training(found.program, chosen, parameters, recipe, config, FULL, shared_by)
    return taken, 4 * parameters + forecast_memory.states(sum(s.numel for s in chosen), config, "adamw", FULL)


def test_processes_share_weights_and_states_not_activations(tiny):
    alone, states = predict(tiny("llama"), ANNEALED)
    two, _ = predict(tiny("llama"), ANNEALED, shared_by=2)
    assert alone - two == pytest.approx(states / 2)
    longer, _ = predict(tiny("llama"), ANNEALED, accumulate=4)
    assert longer == alone  # one micro-batch after the other


def test_activations_go_with_the_batch(tiny):
    found = tiny("llama")
    alone, states = predict(found, ANNEALED)
    kept = alone - states
    vocabulary, blocks, width = found.model.config.vocab_size, 2, found.model.config.hidden_size
    tokens = 24
    assert kept > 4 * tokens * (4 * vocabulary + blocks * 10 * width)
    assert kept < 4 * tokens * (4 * vocabulary + blocks * 100 * width)


def test_a_start_whose_problems_are_larger_than_the_states_is_what_counts(tiny):
    found = tiny("llama")
    alps = alps_kd_preset(4, reconstruct=0, reorder=False)
    trained, _ = predict(found, FIXED)
    assert predict(found, alps, calibration=2)[0] == trained
    assert predict(found, alps, calibration=512)[0] > trained


def test_matrices_that_train_without_a_mask_count(tiny):
    found = tiny("llama")
    every = SparseForgeConfig(steps=4, trainable="all")
    chosen = [s for s in find_linears(found.program, every.pattern) if s.reason is None]
    others = sum(p.numel() for n, p in found.model.named_parameters() if p.dim() > 1 and n not in {s.fqn for s in chosen})
    assert trained_beside(found.program, chosen, every) == others > 0
    assert trained_beside(found.program, chosen, ANNEALED) == 0
    more = predict(found, every)[0] - predict(found, ANNEALED)[0]
    assert more == 4 * 4 * others  # teacher, gradient and two moments
