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
