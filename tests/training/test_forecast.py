"""What a run is predicted to take: counted on a machine whose every number is known, and once on the real one."""

import math

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from sparseforge_fx.formats import parse_format
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.methods.one_shot import AlpsConfig
from sparseforge_fx.passes import find_linears
from sparseforge_fx.training import forecast as module
from sparseforge_fx.training.distillation import Distillation
from sparseforge_fx.training.forecast import (
    BACKWARD,
    FORWARD,
    forecast,
    forecast_rounding,
)
from sparseforge_fx.training.machine import COPIED, MASK, OPTIMIZER, WIDTH, Machine, Product
from sparseforge_fx.training.recipe import Recipe

FLOP = 1e-12  # seconds of a multiply-add on the known machine
BYTE = 1e-15
SCORE = 1e-14  # seconds of one score's part in a loss


@pytest.fixture
def known(monkeypatch):
    """Products take a time that goes by their size, a loss by its scores, copies and attention next to none, a solver
    and an order one second."""
    monkeypatch.setattr(Machine, "_time", lambda self, run: BYTE * 2 * 4 * COPIED)
    monkeypatch.setattr(
        Machine,
        "product",
        lambda self, out, width, dtype=None: Product(FLOP * out * width, 2 * FLOP * out * width),
    )
    monkeypatch.setattr(Machine, "attention", lambda *_: Product(0.0, 0.0))
    monkeypatch.setattr(Machine, "loss", lambda self, classes, taught: SCORE * classes * (2 if taught else 1))
    monkeypatch.setattr(Machine, "solve", lambda *_: 1.0)
    monkeypatch.setattr(Machine, "order", lambda *_: 0.5)


def predict(program, **options):
    recipe = Recipe().changed(batch_size=2, length=32, **options).resolved(True)
    config = recipe.config(True)
    sites = find_linears(program, config.pattern)
    chosen = [s for s in sites if s.reason is None]
    return forecast(program, sites, chosen, recipe, config, torch.float32, torch.device("cpu")), sites, chosen


def multiplied(sites):
    """Multiply-adds of one row."""
    return sum(s.numel * len(s.uses) for s in sites)


def test_a_step_is_three_products_of_what_trains_two_of_the_rest_and_one_of_the_teacher(known, tiny):
    found = tiny("llama")
    got, sites, chosen = predict(found.program, tokens=6400, preset="annealed")
    assert (got.steps, got.start) == (100, 0.0) and got.seconds == pytest.approx(100 * got.step)
    rest = [s for s in sites if s.reason is not None]
    products = 64 * FLOP * (4 * multiplied(chosen) + 3 * multiplied(rest))
    states = BYTE * 4 * (MASK + OPTIMIZER) * sum(s.numel for s in chosen)
    logits = 2 * SCORE * 64 * found.model.config.vocab_size
    between = got.step - products - states - logits
    assert 0 < between < (2 * FORWARD + BACKWARD) * BYTE * 4 * 64 * 100 * found.model.config.hidden_size
    assert between < 0.1 * products
    longer, _, _ = predict(found.program, tokens=6400, preset="annealed", accumulate=3)
    assert longer.steps == 33 and 2.9 < longer.step / got.step < 3
    theirs, _, _ = predict(found.program, tokens=6400, preset="paper")  # Hutchinson at every step
    assert theirs.step == pytest.approx((1 + module.HUTCHINSON) * got.step, rel=0.01)
    task, _, _ = predict(found.program, tokens=6400, preset="annealed", objective=Distillation(kl=0.0))
    assert got.step - task.step == pytest.approx(64 * FLOP * multiplied(sites), rel=0.05)


def test_attention_is_that_of_texts_as_long_as_the_runs(known, tiny, monkeypatch):
    program, asked = tiny("llama").program, []
    plain, _, _ = predict(program, tokens=6400, preset="annealed")

    def attention(self, queries, keys, masked):
        asked.append((queries, keys, masked))
        return Product(1.0, 10.0)

    monkeypatch.setattr(Machine, "attention", attention)
    got, _, _ = predict(program, tokens=6400, preset="annealed")
    assert set(asked) == {((1, 2, 32, 16), (1, 2, 32, 16), asked[0][2])} and len(asked) == 2  # layers
    assert got.step - plain.step == pytest.approx(2 * 2 * (1 + 1 + 10))  # layers, texts; student, teacher, backwards


def test_a_start_walks_solves_orders_and_lets_blocks_learn(known, tiny):
    program = tiny("llama").program
    plain, _, chosen = predict(program, calibration=8, reorder=False, reconstruct=0)
    assert plain.start == pytest.approx(len(chosen), rel=1e-3)  # seconds of solving; four batches are next to nothing
    ordered, _, _ = predict(program, calibration=8, reorder=True, reconstruct=0)
    assert ordered.start - plain.start > 0.5 and (ordered.start - plain.start) / 0.5 == pytest.approx(
        round((ordered.start - plain.start) / 0.5)
    )
    learnt = [predict(program, calibration=8, reorder=False, reconstruct=n)[0].start - plain.start for n in (1, 2, 3)]
    forward = 64 * sum(s.numel for s in chosen) * FLOP
    assert learnt[0] == pytest.approx(4 * (4 + 3) * forward, rel=0.05)
    assert learnt[2] - learnt[1] == pytest.approx(learnt[1] - learnt[0])


def test_methods_without_training(known, tiny):
    program = tiny("gpt2").program
    alps, _, chosen = predict(program, method="alps", calibration=4)
    assert (alps.step, alps.steps) == (0, 0) and alps.seconds == alps.start >= len(chosen)
    assert predict(program, method="magnitude")[0] == (0, 0, 0)


def test_images_count_by_samples(known):
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
    }
    model = ViTForImageClassification(ViTConfig(**sizes)).eval()
    got, sites, _ = predict(capture(model), steps=7, preset="annealed")
    blocks = multiplied([s for s in sites if s.fqn != "classifier.weight"])
    patches = (32 // 16) ** 2 + 1
    assert got.steps == 7 and 4 < got.step / (FLOP * 2 * patches * blocks) < 6


def test_on_this_machine(tiny):
    before = torch.random.get_rng_state()
    got, _, _ = predict(tiny("opt").program, tokens=1280)
    assert got.steps == 20 and 0 < got.step < 60 and 0 < got.start < 600 and math.isfinite(got.seconds)
    assert torch.equal(torch.random.get_rng_state(), before)  # whoever asks keeps the random numbers


def test_attention_and_losses_are_timed_by_what_they_have_to_do():
    machine = Machine(torch.float32, torch.device("cpu"))
    short, long = (machine.attention((1, 2, n, 16), (1, 1, n, 16), masked=True) for n in (16, 512))
    assert all(0 < a < b for a, b in zip(short, long, strict=True))
    assert machine.attention((1, 2, 16, 16), (1, 1, 16, 16), masked=True) is short  # not timed twice
    assert 0 < machine.loss(10, taught=True) < machine.loss(5000, taught=True)
    assert machine.loss(5000, taught=False) > 0


def test_a_wide_problem_is_solved_small():
    machine = Machine(torch.float32, torch.device("cpu"))
    seen = []

    class Watched(AlpsConfig):
        def solve(self, weight, mask, moments):
            seen.append(weight.shape)
            return super().solve(weight, mask, moments)

    machine.solve(Watched(iterations=1), 3 * WIDTH, 2 * WIDTH)
    assert set(seen) == {(3 * WIDTH // 2 // n, WIDTH // n) for n in (1, 2)}


def test_rounding_walks_the_model_and_its_twin(known, tiny):
    program = tiny("llama").program
    sites = find_linears(program, Recipe().config(False).pattern)
    forms = {s.fqn: parse_format("int4" if k % 2 else "int8") for k, s in enumerate(sites) if s.reason is None}
    found = [
        forecast_rounding(
            program, sites, forms, Recipe(calibration=n, batch_size=2, length=32), torch.float32, torch.device("cpu")
        )
        for n in (8, 16)
    ]
    assert [f[1:] for f in found] == [(0.0, 0)] * 2 and found[0].seconds == pytest.approx(len(forms), rel=1e-3)
    chosen = [s for s in sites if s.fqn in forms]
    products = 64 * FLOP * (multiplied(chosen) + sum(s.in_features**2 * len(s.uses) for s in chosen))
    assert found[1].seconds - found[0].seconds == pytest.approx(2 * 4 * products, rel=0.05)


def test_rounding_on_this_machine(tiny):
    program = tiny("opt").program
    sites = find_linears(program, Recipe().config(False).pattern)
    forms = {s.fqn: parse_format("int4") for s in sites if s.reason is None}
    got = forecast_rounding(program, sites, forms, Recipe(), torch.float32, torch.device("cpu"))
    assert 0 < got.seconds < 600
