"""Padding never counts: the same texts, padded and not, give the same masks by every method that looks at data."""

import functools
import importlib

import pytest
import tiny_models
import torch
import transformers as t
from tiny_models import t5
from torch.utils import _pytree as pytree

import sparseforge_fx as sf
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.training.distillation import Distillation

TRAINED = [
    ("sparseforge", {"preset": "annealed", "curvature": "gauss_newton"}),
    ("sparseforge", {"preset": "annealed", "curvature": "fisher"}),
    ("sparseforge", {"preset": "annealed", "curvature": "activation"}),
    ("sparseforge", {"preset": "annealed", "curvature": "squared_gradient"}),
    ("sparseforge", {"preset": "annealed", "curvature": "hutchinson"}),
    ("sparseforge", {"preset": "alps+kd"}),
    ("ast", {}),
    ("sr-ste", {}),
    ("maskllm", {}),
    ("maskpro", {}),
]
LAYERWISE = [("wanda", {}), ("sparsegpt", {}), ("alps", {})]


def masks_after(model, batches, method, **options):
    with torch.random.fork_rng():
        report = sf.sparsify(
            model, batches, method=method, steps=4, calibration=8, show_progress=False, compile=False, lr=1e-3, **options
        ).report
    assert report["sites"]
    return {s["name"]: model.get_parameter(s["name"]) != 0 for s in report["sites"]}, report


def texts(lengths=(9, 6), rows=4, low=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(low, tiny_models.VOCABULARY, (rows, n), generator=generator) for n in lengths]


def padded(ids, width, side):
    """Filled with a token that is none of padding's own, which would show if it were looked at."""
    space = torch.full((len(ids), width - ids.shape[1]), 5)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(space)], 1)
    whole = torch.cat([ids, space], 1)
    return (whole, mask) if side == "right" else (whole.roll(space.shape[1], 1), mask.roll(space.shape[1], 1))


def assert_equal_masks(one, two):
    for name in one:
        assert torch.equal(one[name], two[name]), f"{name}: {int((one[name] != two[name]).sum())} differ"


@functools.cache
def captured_llama():
    """Captured with a mask, once for all methods."""
    torch.manual_seed(0)
    model = tiny_models.build("llama").double().eval()
    ids = texts()[0]
    program = capture(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return model, program, {n: v.clone() for n, v in model.state_dict().items()}


@pytest.fixture
def llama(monkeypatch):
    model, program, first = captured_llama()
    monkeypatch.setattr(importlib.import_module("sparseforge_fx.data.capturing"), "capture", lambda *_: program)

    def reset():
        model.load_state_dict(first)
        return model

    return reset


@pytest.mark.parametrize("method, options", [*LAYERWISE, *TRAINED], ids=lambda v: v if isinstance(v, str) else "")
def test_language_model(llama, method, options):
    results = []
    for width in (None, 12):
        model = llama()
        batches = []
        for ids in texts():
            whole, mask = (ids, torch.ones_like(ids)) if width is None else padded(ids, width, "right")
            batches.append({"input_ids": whole, "attention_mask": mask})
        results.append(masks_after(model, batches, method, **options))
    assert_equal_masks(results[0][0], results[1][0])
    tokens = [report.get("tokens") for _, report in results]
    assert tokens[0] == tokens[1]  # padding is no training token


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_left_padding(method):
    results = []
    for side in (None, "left"):
        torch.manual_seed(0)
        model = tiny_models.build("opt").double().eval()  # positions are counted by the mask
        batches = []
        for ids in texts():
            whole, mask = (ids, torch.ones_like(ids)) if side is None else padded(ids, 12, side)
            batches.append({"input_ids": whole, "attention_mask": mask})
        results.append(masks_after(model, batches, method)[0])
    assert_equal_masks(*results)


@pytest.mark.parametrize("kind", ["squarehead", "tinybert", "mobilebert"])
def test_features(llama, kind):
    results = []
    for width in (None, 12):
        model = llama()
        batches = []
        for ids in texts():
            whole, mask = (ids, torch.ones_like(ids)) if width is None else padded(ids, width, "right")
            batches.append({"input_ids": whole, "attention_mask": mask})
        options = {"steps": 2, "show_progress": False, "objective": Distillation(features=kind), "preset": "annealed", "compile": False}
        curves = sf.sparsify(model, batches, **options).report["curves"]
        results.append(torch.tensor([row["loss"] for row in curves]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "method, options",
    [("wanda", {}), ("sparsegpt", {}), ("sparseforge", {"preset": "annealed", "curvature": "activation"})],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_encoder_and_decoder(method, options):
    """Source and target are padded apart, to one width, so that shapes do not tell the masks apart."""
    results = []
    for width in (None, 11):
        model = t5().double()
        batches = []
        for source, target in zip(texts((9, 7)), texts((5, 8)), strict=True):
            mask = torch.ones_like(source)
            if width is not None:
                source, mask = padded(source, width, "right")
                target, real = padded(target, width, "right")
                target = target.masked_fill(real == 0, -100)
            batches.append({"input_ids": source, "attention_mask": mask, "labels": target})
        results.append(masks_after(model, batches, method, **options)[0])
    assert_equal_masks(*results)


def test_choices_of_a_question():
    config = t.BertConfig(
        vocab_size=97, hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    results = []
    for width in (None, 12):
        torch.manual_seed(0)
        model = t.BertForMultipleChoice(config).double().eval()
        batches = []
        for ids in texts((9,), rows=6):
            whole, mask = (ids, torch.ones_like(ids)) if width is None else padded(ids, width, "right")
            shaped = {"input_ids": whole.view(2, 3, -1), "attention_mask": mask.view(2, 3, -1)}
            batches.append({**shaped, "labels": torch.tensor([0, 2])})
        results.append(masks_after(model, batches, "wanda"))
    assert_equal_masks(results[0][0], results[1][0])
    assert not results[1][1]["layer_notes"]


def test_values_of_an_encoder_are_distilled_where_they_are_real():
    results = []
    for width in (None, 12):
        torch.manual_seed(0)
        model = tiny_models.build("bert").double().eval()
        batches = []
        for ids in texts():
            whole, mask = (ids, torch.ones_like(ids)) if width is None else padded(ids, width, "right")
            batches.append({"input_ids": whole, "attention_mask": mask})
        options = {"steps": 3, "show_progress": False, "preset": "annealed", "compile": False}
        sf.sparsify(model, batches, **options)
        results.append(pytree.tree_map(torch.clone, dict(model.named_parameters())))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-6, atol=1e-8)
