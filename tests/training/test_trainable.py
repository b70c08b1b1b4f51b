"""prepare and sparsify train the same parameters, and give every flag back."""

import pytest
import torch

import sparseforge_fx as sf
from sparseforge_fx.training.distillation import Distillation


def moved(found, first):
    return {n for n, p in found.model.named_parameters() if not torch.equal(p, first[n])}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_prepare_and_sparsify_train_the_same(captured_once, kind):
    found = captured_once(kind)
    batches = [found.batch(seed) for seed in range(2)]
    first = {n: p.detach().clone() for n, p in found.model.named_parameters()}
    sf.sparsify(found.model, batches, method="gmp", steps=2, lr=1e-2, show_progress=False, compile=False)
    by_sparsify = moved(found, first)
    found.reset()
    sparse = sf.prepare(found.model, found.example, sf.configure("gmp", 2)).train()
    trained = {n for n, p in found.model.named_parameters() if p.requires_grad}
    optimizer = sparse.optimizer(lr=1e-2)
    for batch in batches:
        sparse(**batch).loss.backward() if kind == "llama" else sparse(**batch) and sparse.last_loss.total.backward()
        optimizer.step()
        sparse.step()
        optimizer.zero_grad()
    sf.finalize(sparse)
    assert moved(found, first) == by_sparsify <= trained
    assert trained == {*found.weights, *(n for n, p in found.model.named_parameters() if p.dim() < 2)}
    assert all(p.requires_grad and p.grad is None for p in found.model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])  # a head of its own, and one that is tied
@pytest.mark.parametrize("method", ["gmp", "ast", "sparseforge"])
def test_all_that_nobody_froze_trains(captured_once, kind, method):
    found = captured_once(kind)
    first = {n: p.detach().clone() for n, p in found.model.named_parameters()}
    frozen = found.model.get_input_embeddings().weight.requires_grad_(kind == "gpt2")
    batches = [found.batch(seed) for seed in range(2)]
    how = {"steps": 2, "lr": 1e-2, "show_progress": False, "compile": False, "trainable": "all"}
    result = sf.sparsify(found.model, batches, method=method, **how)
    still = {n for n, p in found.model.named_parameters() if not p.requires_grad}
    assert moved(found, first) == set(first) - still
    assert len(still) == (kind == "llama") and frozen.requires_grad == (kind == "gpt2")
    assert result.report["config"]["trainable"] == "all"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_teacher_keeps_its_embeddings(captured_once, kind):
    found = captured_once(kind)
    sparse = sf.prepare(found.model, found.example, sf.configure("gmp", 2, trainable="all")).train()
    sparse(**found.batch())
    assert sparse.last_loss.kl.item() == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        found.model.get_input_embeddings().weight.mul_(3)
    sparse(**found.batch())
    assert sparse.last_loss.kl.item() > 1e-3


def test_masks_that_are_learned_over_frozen_weights_train_nothing_else(captured_once):
    with pytest.raises(sf.SparseForgeError, match="trainable 'all' is for methods that train weights"):
        sf.configure("maskllm", 2, trainable="all")


def test_what_its_owner_froze_stays_frozen(captured_once):
    found = captured_once("llama")
    norm = found.model.model.norm.weight.requires_grad_(False)
    sparse = sf.prepare(found.model, found.example, sf.configure("gmp", 2))
    assert not norm.requires_grad and found.model.model.layers[0].input_layernorm.weight.requires_grad
    sparse.release()
    assert not norm.requires_grad and found.model.model.embed_tokens.weight.requires_grad


def test_a_model_that_is_frozen_whole_trains(captured_once):
    found = captured_once("llama")
    found.model.requires_grad_(False)
    sparse = sf.prepare(found.model, found.example, sf.configure("gmp", 2), objective=Distillation(kl=0.0))
    assert found.model.model.norm.weight.requires_grad
    sf.finalize(sparse)
    assert not any(p.requires_grad for p in found.model.parameters())


def test_gradients_of_another_loss_do_not_join_the_first_step(captured_once):
    found = captured_once("llama")
    found.model(**found.batch()).logits.sum().backward()
    sf.prepare(found.model, found.example, sf.configure("gmp", 2))
    assert all(p.grad is None for p in found.model.parameters())
