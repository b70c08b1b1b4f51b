"""Mixtures of experts through the whole job: every method, in place, exact, saved and loaded."""

import pytest
import torch
from tiny_models import own_loop
from transformers import AutoModelForCausalLM

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.catalog import METHODS
from sparseforge_fx.pattern import TWO_FOUR, check_pattern

ROWS, LENGTH, VOCABULARY = 16, 12, 97
TRAINED = {"tokens": 4 * 4 * LENGTH, "batch_size": 4, "lr": 1e-3}


def data():
    return torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def stacks(model):
    return {n: p for n, p in model.named_parameters() if p.dim() == 3}


def options(method):
    return {} if method in ("magnitude", "wanda", "sparsegpt", "alps") else TRAINED


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method(captured_once, method, tmp_path):
    found = captured_once("moe")
    addresses = {n: p.data_ptr() for n, p in found.model.named_parameters()}
    result = sf.sparsify(
        found.model, None if method == "magnitude" else data(), method=method, show_progress=False, **options(method)
    )
    assert addresses == {n: p.data_ptr() for n, p in found.model.named_parameters()}
    assert len(stacks(found.model)) == 2
    for name, weight in stacks(found.model).items():
        assert check_pattern(weight, TWO_FOUR) and result.report["density"][name] == pytest.approx(0.5, abs=0.01)
        (site,) = (s for s in result.report["sites"] if s["name"] == name)
        assert site["experts"] == 4
    skipped = {s["name"]: s["reason"] for s in result.report["skipped"]}
    assert "router" in next(r for n, r in skipped.items() if n.endswith("mlp.gate.weight"))
    assert "one output" in next(r for n, r in skipped.items() if n.endswith("shared_expert_gate.weight"))
    if method in ("wanda", "sparsegpt", "alps"):
        counts = {name: of_one["tokens"] for name, of_one in result.report["experts"].items()}
        assert all(0 < e < 1 for of_one in result.report["experts"].values() for e in of_one["error"])
        assert counts.keys() == stacks(found.model).keys()
        assert all(sum(of_one) == 2 * ROWS * LENGTH for of_one in counts.values())
    result.save(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=data()).logits, found.model(input_ids=data()).logits)


@pytest.mark.parametrize("estimator", ["gauss_newton", "activation", "squared_gradient"])
@pytest.mark.parametrize("name", ["moe", "gpt_oss"])
def test_soft_masks_of_experts_follow_their_own_curvature(captured_once, name, estimator):
    found = captured_once(name)
    sparse = sf.prepare(found.model, config=sf.annealed_preset(8, curvature=estimator))
    own_loop(sparse, [{**found.batch(seed), "labels": found.batch(seed)["input_ids"]} for seed in range(3)])
    values = sparse.method.curvature.values
    for fqn, weight in stacks(found.model).items():
        h = values[fqn]
        assert h.shape == (weight.shape if estimator != "activation" else (4, weight.shape[sparse_dim(name)]))
        assert h.isfinite().all() and (h >= 0).all() and len({float(of_one.sum()) for of_one in h}) > 1
    own_loop(sparse, [{**found.batch(seed), "labels": found.batch(seed)["input_ids"]} for seed in range(5)])
    assert sf.finalize(sparse) is found.model
    for weight in stacks(found.model).values():
        assert check_pattern(weight, TWO_FOUR, sparse_dim(name)) and weight.count_nonzero() == weight.numel() / 2


def sparse_dim(name):
    return 1 if name == "gpt_oss" else 2


def test_each_expert_has_thresholds_of_its_own(captured_once):
    """An expert with a thousandth of the others' curvature keeps as much of its mask as they do."""
    found = captured_once("moe")
    sparse = sf.prepare(found.model, config=sf.annealed_preset(8, update_every=1, probe_every=1))
    (w, *_) = (w for w in sparse.method.weights if w.weight.dim() == 3)
    h = torch.ones_like(w.weight)
    h[1] *= 1e-3
    sparse.method.curvature.values[w.fqn] = h.detach()
    gate = sparse.method.gate(sparse.method.score(w), w.dim, 0.1, 1.0)
    means = gate.mean((1, 2))
    assert (means - means.mean()).abs().max() < 0.02
    sparse.release()


def test_hutchinson_says_that_it_cannot(captured_once):
    found = captured_once("moe")
    before = {n: p.detach().clone() for n, p in found.model.named_parameters()}
    with pytest.raises(SparseForgeError, match="hutchinson needs second derivatives, which transformers"):
        sf.prepare(found.model, config=sf.annealed_preset(8, curvature="hutchinson"))
    assert all(torch.equal(p, before[n]) and p.requires_grad for n, p in found.model.named_parameters())


def test_values_of_experts_stay_floats(captured_once):
    found = captured_once("moe")
    result = sf.sparsify(found.model, data(), method="sparsegpt", options={"values": "int8"}, show_progress=False)
    assert stacks(found.model).keys().isdisjoint(result.scales) and result.scales
    assert any("experts stay floats" in note for note in result.report["notes"])


def test_too_few_tokens_are_told(captured_once):
    found = captured_once("moe")
    result = sf.sparsify(found.model, data(), method="wanda", options={"expert_tokens": 10_000}, show_progress=False)
    assert any("experts 0, 1, 2, 3 saw fewer than 10000 calibration tokens" in note for note in result.report["notes"])
    result = sf.sparsify(
        found.reset().model, data(), method="wanda", options={"every_token": True}, show_progress=False
    )
    assert all(of_one["tokens"] == [ROWS * LENGTH] * 4 for of_one in result.report["experts"].values())


def test_the_start_of_a_trained_method_has_the_same_options(captured_once):
    found = captured_once("moe")
    options = {"reconstruct": 0, "reorder": False}
    how = {"show_progress": False, "compile": False, **TRAINED}
    report = sf.sparsify(found.model, data(), options={**options, "every_token": True}, **how).report
    assert all(of_one["tokens"] == [ROWS * LENGTH] * 4 for of_one in report["experts"].values())
    assert report["config"]["every_token"] and report["experts"].keys() == stacks(found.model).keys()
    report = sf.sparsify(found.reset().model, data(), options={**options, "expert_tokens": 10_000}, **how).report
    assert any("experts 0, 1, 2, 3 saw fewer than 10000 calibration tokens" in note for note in report["notes"])


@pytest.mark.parametrize("method", ["wanda", "sparseforge"])
def test_what_is_for_experts_is_told_where_none_become_sparse(captured_once, method):
    found = captured_once("llama")
    asked = {"every_token": True, "expert_tokens": 8}
    report = sf.sparsify(
        found.model, data(), method=method, options=asked, show_progress=False, **options(method)
    ).report
    for name in asked:
        assert f"{name} is given and not used: no experts of a mixture become sparse in this run" in report["notes"]
    if method == "sparseforge":
        batch = found.batch()
        sparse = sf.prepare(found.reset().model, batch, sf.alps_kd_preset(2, every_token=True), calibration=[batch])
        assert any(note.startswith("every_token is given and not used") for note in sparse.reader.notes)
        sparse.release()


def test_curvature_tells_what_it_is_of(captured_once, tmp_path):
    found = captured_once("moe")
    how = {"preset": "annealed", "show_progress": False, "compile": False, **TRAINED}
    report = sf.sparsify(found.model, data(), options={"probe_every": 1}, **how).report
    for of_one in report["experts"].values():  # the quench ends with the last step
        assert sum(of_one["tokens"]) == 4 * 4 * LENGTH * 2 and of_one["by_magnitude"] == [] and len(of_one) == 2
    assert report["experts"].keys() == stacks(found.model).keys()
    assert not any("expert" in note for note in report["notes"])
    few = sf.sparsify(found.reset().model, data(), options={"expert_tokens": 10_000}, **how)
    assert all(of_one["by_magnitude"] == [0, 1, 2, 3] for of_one in few.report["experts"].values())
    told = "experts 0, 1, 2, 3 saw fewer than 10000 tokens while curvature was estimated: scored by magnitude"
    assert any(told in note for note in few.report["notes"])
    for weight in stacks(found.model).values():
        assert check_pattern(weight, TWO_FOUR)


def test_tokens_of_a_run_that_was_stopped_are_not_lost(captured_once, tmp_path):
    found = captured_once("moe")
    how = {"preset": "annealed", "show_progress": False, "compile": False, **TRAINED}
    whole = sf.sparsify(found.model, data(), **how).report["experts"]

    def stop(step, row):
        if step == 2:
            raise InterruptedError

    saved = {"state_path": tmp_path / "state", "save_seconds": 0.0}
    with pytest.raises(InterruptedError):
        sf.sparsify(found.reset().model, data(), **how, **saved, on_step=stop)
    assert sf.sparsify(found.reset().model, data(), **how, **saved).report["experts"] == whole


def test_experts_that_nobody_counts_are_told():
    class Slices(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(2, 8, 8))

        def forward(self, x):
            return torch.sin(x @ self.w[0]) + x @ self.w[1]

    report = sf.sparsify(
        Slices(), [torch.randn(4, 8)] * 2, preset="annealed", steps=4, show_progress=False, compile=False
    ).report
    assert "experts" not in report
    assert any("its experts get all tokens, which nobody counts" in note for note in report["notes"])
