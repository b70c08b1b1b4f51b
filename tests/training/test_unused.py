"""Arguments that have no part in a run are named in its report; those that have are not."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.data.tokens import TokenData
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.training.distillation import Distillation
from sparseforge_fx.training.processes import unheard

QUIET = {"show_progress": False, "compile": False}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))


def named(notes):
    return {note.split()[0] for note in notes if "is given and not used" in note}


KL = Distillation(kl=0.5)
X = [torch.randn(4, 16)] * 2
LOOP = {
    "compile": True, "save_seconds": 5, "state_path": "/tmp/never-written", "on_step": print,
    "accelerator": SimpleNamespace(num_processes=1), "activation_checkpointing": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"data": X, "method": "wanda", "lr": 1e-3, "objective": KL, "steps": 3, "calibration": 8}, {"lr", "objective", "steps"}),
        ({"data": X, "method": "magnitude", "length": 8, "example_inputs": X[0]}, {"data", "length"}),
        ({"data": X, "method": "ast", "steps": 2, "batch_size": 2, "calibration": 9}, {"batch_size", "calibration"}),
        ({"data": X, "method": "wanda", "calibration": 8, "separator": " ", "tokenizer": object()}, {"separator", "tokenizer"}),
        ({"data": X, "method": "wanda", "calibration": 8}, set()),
        ({"data": X, "method": "wanda", "calibration": 8} | LOOP, {*LOOP}),
        (LOOP | {"example_inputs": X[0]}, {*LOOP}),
        ({"seed": 3, "example_inputs": X[0]}, {"seed"}),
        ({"data": X, "method": "ast", "steps": 2, "save_seconds": 5, "seed": 3}, {"save_seconds"}),
        ({"data": X, "method": "ast", "steps": 2, "objective": Distillation(feature_weight=2.0)}, {"feature_weight"}),
        ({"data": X, "method": "maskpro", "steps": 2, "lr": 1e-3, "weight_decay": 0.1}, {"lr", "weight_decay"}),
        ({"data": X, "method": "ast", "steps": 2, "lr": 1e-3, "objective": KL, "accumulate": 2}, set()),
        ({"example_inputs": X[0]}, set()),
    ],
)  # fmt: skip
def test_of_a_module(options, expected):
    assert named(sf.sparsify(mlp(), **{**QUIET, **options}).report["notes"]) == expected


@pytest.mark.parametrize("method", ["ast", "wanda"])
@pytest.mark.parametrize("compile", ["on", "off", 1, None])
def test_compile_is_one_of_three(method, compile):
    with pytest.raises(SparseForgeError, match="give True, False or 'auto'"):
        sf.sparsify(mlp(), X, method=method, calibration=8, show_progress=False, compile=compile)


def test_of_an_accelerator():
    told = Accelerator(cpu=True, gradient_accumulation_steps=4)
    told.state.dynamo_plugin, kept = TorchDynamoPlugin(backend="inductor"), told.state.dynamo_plugin
    try:
        accumulated, compiled = unheard(told)
    finally:
        told.state.dynamo_plugin = kept
    assert accumulated.startswith("gradient_accumulation_steps=4 of the accelerator is given and not used: accumulate=")
    assert compiled.startswith("the dynamo backend inductor of the accelerator is given and not used: compile=")
    notes = sf.sparsify(mlp(), X, method="ast", steps=2, accelerator=told, **QUIET).report["notes"]
    assert accumulated in notes
    assert unheard(Accelerator(cpu=True)) == []  # which takes what they share back, too


PLAIN = {"data": X, "method": "sparseforge", "steps": 2, "preset": "annealed"}
FORGE = {**PLAIN, "preset": "alps+kd", "calibration": 8}
GRADUAL = {"data": X, "steps": 2}


@pytest.mark.parametrize(
    "options, expected",
    [
        (FORGE, set()),
        ({**FORGE, "curvature": "fisher", "mask_rate": 0.9, "score": "magnitude"}, {"curvature", "mask_rate", "score"}),
        ({**FORGE, "probe_every": 1, "gate": "site"}, set()),  # as they are anyway
        ({**FORGE, "softness_start": 0.5, "reconstruct": 0, "reconstruct_lr": 0.1}, {"softness_start", "reconstruct_lr"}),
        ({**FORGE, "softness_start": 0.5, "quench_end": 0.4, "reconstruct": 0, "reorder": False}, set()),
        ({**PLAIN, "curvature": "fisher", "mask_rate": 0.9, "temperature_start": 2.0}, set()),
        ({**PLAIN, "score": "magnitude", "curvature": "fisher", "gate": "pattern"}, {"curvature"}),
        ({**PLAIN, "curvature_vectors": 2}, {"curvature_vectors"}),
        ({**GRADUAL, "method": "gmp", "rounds": 3, "update_every": 2}, {"rounds"}),
        ({**GRADUAL, "method": "imp", "rounds": 3, "update_every": 2}, {"update_every"}),
        ({"data": X, "method": "wanda", "calibration": 8, "reconstruct_lr": 0.1}, {"reconstruct_lr"}),
    ],
)  # fmt: skip
def test_of_the_method(options, expected):
    assert named(sf.sparsify(mlp(), **options, **QUIET).report["notes"]) == expected


@pytest.mark.parametrize("preset", ["alps+kd", "paper", "annealed"])
def test_of_a_config(preset):
    """Of constants as Python has them, those that no preset has are asked for."""
    start = {"start": "alps", "heat_end": 0.0, "quench_end": 0.0}
    config = sf.configure("sparseforge", 2, preset=preset, **start, curvature="activation")
    assert named(sf.sparsify(mlp(), X, method=config, calibration=8, **QUIET).report["notes"]) == {"curvature"}


@pytest.mark.parametrize("data, expected", [("tensor", set()), ("rows", {"length"}), ("packed", {"length"})])
def test_of_token_ids(captured_once, data, expected):
    found = captured_once("llama")
    ids = torch.cat([found.batch(seed)["input_ids"] for seed in range(4)])
    given = {"tensor": ids.flatten(), "rows": ids, "packed": TokenData(ids.flatten(), 12)}[data]
    options = {"method": "wanda", "length": 6, "batch_size": 2, "calibration": 4}
    assert named(sf.sparsify(found.model, given, **options, **QUIET).report["notes"]) == expected


def test_two_lengths_of_one_run():
    with pytest.raises(SparseForgeError, match="steps=3 and tokens=9"):
        sf.sparsify(mlp(), X, steps=3, tokens=9)


def test_what_of_a_loss_has_no_part_in_it():
    assert Distillation(kl=0.0, temperature=2.0, divergence="reverse_kl").idle == {
        "temperature": "kl is 0", "divergence": "kl is 0",
    }  # fmt: skip
    assert Distillation(feature_weight=2.0).idle == {"feature_weight": "features names none"}
    assert Distillation(temperature=2.0, features="squarehead", feature_weight=2.0).idle == {}
    assert Distillation(kl=0.0).idle == {}
