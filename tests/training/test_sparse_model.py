"""The soft-masked model: its loss, its teacher, its curvature, its place among nn.Modules."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import own_loop
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.curvature import hutchinson_diagonal
from sparseforge_fx.methods.soft_mask import SparseForgeConfig
from sparseforge_fx.pattern import check_pattern, hard_mask
from sparseforge_fx.training.curvature_probe import generator_of
from sparseforge_fx.training.distillation import Distillation, feature_loss

TWO_FOUR = sf.SparseForgeConfig(steps=1).pattern


class Classifier(nn.Module):
    """Logits in an output object, as Hugging Face's heads have them."""

    def __init__(self, classes=3):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(8, 16), nn.Tanh()), nn.Linear(16, classes)

    def forward(self, x):
        return SequenceClassifierOutput(logits=self.head(self.body(x)))


def test_before_the_first_step_it_is_the_model(captured_once):
    found = captured_once("llama")
    sparse = sf.prepare(found.model, found.example, sf.annealed_preset(10))
    batch = found.batch(seed=5, rows=3, length=7)
    expected = found.model(**batch, labels=batch["input_ids"])
    for mode in (True, False):
        output = sparse.train(mode)(**batch)
        assert type(output) is type(expected)
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)  # the teacher still agrees
    sparse.train()(**batch).loss.backward()
    grads = {n: p.grad.clone() for n, p in found.model.named_parameters() if p.requires_grad}
    vectors = {n for n, p in found.model.named_parameters() if p.dim() < 2}
    assert set(grads) == {*found.weights, *vectors}
    found.model.zero_grad()
    expected.loss.backward()
    for n, p in found.model.named_parameters():
        assert (p.grad is not None) == (n in grads)
        if n in grads:
            torch.testing.assert_close(grads[n], p.grad, rtol=1e-3, atol=1e-5)
    sf.finalize(sparse)
    assert all(p.requires_grad and p.grad is None for p in found.model.parameters())


def test_a_mapping_as_the_only_argument(captured_once):
    found = captured_once("llama")
    sparse = sf.prepare(found.model, found.example, sf.annealed_preset(10))
    batch = found.batch()
    assert torch.equal(sparse(batch).logits, sparse(**batch).logits)


# -- labels and masks ------------------------------------------------------------------------------------------------
def test_labels_are_the_next_tokens_where_none_are_given(captured_once):
    found = captured_once("llama")
    sparse = sf.prepare(found.model, found.example, sf.annealed_preset(10), objective=Distillation(kl=0.0))
    batch = found.batch()
    ids = batch["input_ids"]
    with torch.no_grad():
        logits = found.model(**batch).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    for extra in ({}, {"labels": ids}):
        torch.testing.assert_close(sparse.train()(**batch, **extra).loss, expected, rtol=1e-5, atol=1e-6)
    positional = sparse(ids)
    torch.testing.assert_close(positional.loss, expected, rtol=1e-5, atol=1e-6)
    partly = ids.clone()
    partly[:, :5] = -100  # a prompt
    expected = F.cross_entropy(logits[:, 4:-1].flatten(0, 1), ids[:, 5:].flatten())
    torch.testing.assert_close(sparse(**batch, labels=partly).loss, expected, rtol=1e-5, atol=1e-6)


def test_loss_is_task_and_divergence_in_the_given_weights(captured_once):
    found = captured_once("llama")
    sparse = sf.prepare(found.model, found.example, sf.annealed_preset(10), objective=Distillation(task=0.25, kl=3.0))
    batch = found.batch()
    with torch.no_grad():
        teacher = found.model(**batch).logits
        for w in sparse.method.weights:
            w.mask.copy_(hard_mask(w.weight.abs(), TWO_FOUR, w.dim))
            w.weight.mul_(w.mask)
        student = found.model(**batch, labels=batch["input_ids"])
    kl = F.kl_div(
        student.logits.log_softmax(-1).flatten(0, 1),
        teacher.log_softmax(-1).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    assert kl > 0.1
    loss = sparse.train()(**batch).loss
    torch.testing.assert_close(loss, 0.25 * student.loss + 3 * kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sparse.last_loss.task, student.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sparse.last_loss.kl, kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sparse.eval()(**batch).loss, student.loss, rtol=1e-4, atol=1e-5)  # eval: the task alone


def test_padding_needs_a_captured_mask(captured_once):
    found = captured_once("llama")
    sparse = sf.prepare(found.model, found.example, sf.annealed_preset(10))
    batch = found.batch()
    ones = torch.ones_like(batch["input_ids"])
    sparse(**batch, attention_mask=ones)  # says nothing
    ones[0, 8:] = 0
    with pytest.raises(SparseForgeError, match="padded"):
        sparse(**batch, attention_mask=ones)


def test_padding_with_a_captured_mask(tiny):
    found = tiny("gpt2")
    batch = found.batch()
    example = dict(batch, attention_mask=torch.ones_like(batch["input_ids"]))
    sparse = sf.prepare(found.model, example, sf.annealed_preset(10))
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 8:] = 0
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    expected = found.model(**batch, attention_mask=mask, labels=labels)
    output = sparse.train()(**batch, attention_mask=mask)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        sparse(batch["input_ids"], attention_mask=mask).loss, expected.loss, rtol=1e-5, atol=1e-6
    )
    whole = found.model(**batch, labels=batch["input_ids"])
    torch.testing.assert_close(sparse(**batch).loss, whole.loss, rtol=1e-5, atol=1e-6)  # no mask: no padding
    with torch.no_grad():  # the divergence, too, is that of the text and not of the padding
        teacher = found.model(**batch, attention_mask=mask).logits
        for w in sparse.method.weights:
            w.weight.mul_(0.5)
        student = found.model(**batch, attention_mask=mask).logits
    kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    expected = (kl * mask).sum() / mask.sum()
    assert abs(kl.mean() / expected - 1) > 1e-3
    sparse(**batch, attention_mask=mask)
    torch.testing.assert_close(sparse.last_loss.kl, expected, rtol=1e-4, atol=1e-6)


# -- models that are no language models ------------------------------------------------------------------------------
def test_encoder_is_distilled_by_its_hidden_states(captured_once):
    found = captured_once("bert")
    sparse = sf.prepare(found.model, found.example, sf.annealed_preset(10), objective=Distillation(kl=2.0))
    batch = found.batch()
    with torch.no_grad():
        teacher = found.model(**batch).last_hidden_state
        for w in sparse.method.weights:
            w.mask.copy_(hard_mask(w.weight.abs(), TWO_FOUR, w.dim))
            w.weight.mul_(w.mask)
        student = found.model(**batch).last_hidden_state
    error = (student - teacher).square().sum() / teacher.square().sum()
    assert error > 1e-3
    output = sparse.train()(**batch)
    torch.testing.assert_close(sparse.last_loss.total, 2 * error, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.last_hidden_state, student, rtol=1e-4, atol=1e-5)
    sparse.last_loss.total.backward()
    assert all(w.weight.grad.abs().sum() > 0 for w in sparse.method.weights)
    sparse.eval()(**batch)
    assert sparse.last_loss is None


@pytest.mark.parametrize("form", ["tensor", "tuple with targets", "keyword"])
def test_plain_module_takes_batches_in_any_form(captured_once, form):
    found = captured_once("mlp")
    sparse = sf.prepare(found.model, found.example, sf.annealed_preset(10)).train()
    x = found.batch(rows=5)
    calls = {"tensor": ((x,), {}), "tuple with targets": ((x, torch.zeros(5)), {}), "keyword": ((), {"input": x})}
    args, kwargs = calls[form]
    torch.testing.assert_close(sparse(*args, **kwargs), found.model(x))
    assert sparse.last_loss.total < 1e-10
    with pytest.raises(SparseForgeError, match="input"):
        sparse(features=x)


def test_classifier_scores_its_labels():
    model = Classifier()
    x, y = torch.randn(6, 8), torch.tensor([0, 1, 2, 2, -100, 0])
    sparse = sf.prepare(model, {"x": x}, sf.annealed_preset(10)).train()
    output = sparse(x=x, labels=y)
    expected = F.cross_entropy(model(x).logits, y)
    torch.testing.assert_close(output.loss, expected)
    assert sparse(x=x).loss < 1e-6  # no labels: the teacher alone, which still agrees
    assert sparse(x=x, labels=y.float()).loss < 1e-6  # no classes
    without = sf.prepare(model, {"x": x}, sf.annealed_preset(10), objective=Distillation(kl=0.0)).train()
    without(x=x)
    assert without.last_loss is None
    without(x=x, labels=y.float())
    assert without.last_loss is None  # better no loss than one without gradient


def test_one_logit_is_a_regression():
    """The divergence of a distribution over one class is zero whatever the logit is."""
    model = Classifier(classes=1)
    x = torch.randn(6, 8)
    sparse = sf.prepare(model, {"x": x}, sf.annealed_preset(10), exclude=["head*"]).train()
    teacher = model(x).logits.detach()
    with torch.no_grad():
        model.body[0].weight.mul_(0.5)
    labels = torch.randn(6, 1)
    output = sparse(x=x, labels=labels)
    expected = (model(x).logits - teacher).square().sum() / teacher.square().sum() + F.mse_loss(model(x).logits, labels)
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert model.body[0].weight.grad.abs().sum() > 0


def test_hutchinson_without_labels_sees_the_divergence():
    """At the dense weights KL has no gradient, but a Hessian: the Fisher matrix."""
    model = Classifier().double()
    x = torch.randn(16, 8).double()
    sparse = sf.prepare(model, {"x": x}, SparseForgeConfig(steps=4, curvature="hutchinson")).train()
    sparse(x=x).loss.backward()
    sparse.step()
    weight = model.body[0].weight
    teacher = model(x).logits.detach().log_softmax(-1)

    def divergence():
        return F.kl_div(model(x).logits.log_softmax(-1), teacher, log_target=True, reduction="batchmean")

    drawing = generator_of(torch.device("cpu"), 0, 0, 0)  # seed, step, vector
    expected = hutchinson_diagonal(divergence, {"w": weight}, generator=drawing)["w"].abs()
    assert expected.max() > 1e-3
    torch.testing.assert_close(sparse.method.curvature.values["body.0.weight"].float(), expected, rtol=1e-3, atol=1e-6)


class TwoHeads(nn.Module):
    """The loss looks at the first output only."""

    def __init__(self):
        super().__init__()
        self.seen, self.unseen = (nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.LayerNorm(8)) for _ in range(2))

    def forward(self, x):
        return self.seen(x), self.unseen(x)


@pytest.mark.parametrize("curvature", ["gauss_newton", "hutchinson", "squared_gradient"])
def test_a_branch_without_gradient_is_pruned_by_magnitude(curvature):
    model = TwoHeads()
    x = torch.randn(6, 8)
    expected = hard_mask(model.unseen[0].weight.abs(), TWO_FOUR)
    sparse = sf.prepare(model, x, SparseForgeConfig(steps=8, curvature=curvature, gate="pattern")).train()
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.01)
    for step in range(8):
        sparse(x + step)
        sparse.last_loss.total.backward()
        optimizer.step()
        sparse.step()
        optimizer.zero_grad()
    sf.finalize(sparse)
    assert torch.equal(model.unseen[0].weight != 0, expected)


# -- the teacher -----------------------------------------------------------------------------------------------------
def test_teacher_stays_the_dense_model(captured_once):
    found = captured_once("llama")
    frozen = found.model.model.layers[0].mlp.up_proj.weight
    frozen.requires_grad_(False)  # a site all the same, as it is named: OBS rewrites it
    batch = found.batch()
    with torch.no_grad():
        dense = found.model(**batch).logits
    config = sf.alps_kd_preset(8, start="sparsegpt", softness_start=0.6, quench_end=0.5)
    calibration = [found.batch(seed) for seed in range(2)]
    sparse = sf.prepare(found.model, found.example, config, include=["*layers*"], calibration=calibration)
    for step in range(8):
        own_loop(sparse, [found.batch(step)])
        torch.testing.assert_close(sparse.teacher(sparse.reader.read((), batch)).logits, dense, rtol=0, atol=0)
    assert not torch.equal(frozen, found.first["model.layers.0.mlp.up_proj.weight"])
    parameters = {p.data_ptr() for p in sparse.parameters() if p.requires_grad or p is frozen}
    assert not parameters & {p.data_ptr() for p in sparse.teacher.module.parameters()}


def test_teacher_shares_what_never_changes(captured_once):
    found = captured_once("llama")
    embedding = found.model.model.embed_tokens.weight.requires_grad_(False)
    sparse = sf.prepare(found.model, found.example, sf.annealed_preset(10))
    pointers = {n: p.data_ptr() for n, p in sparse.teacher.module.named_parameters()}
    assert pointers["model.embed_tokens.weight"] == embedding.data_ptr()
    assert all(not p.requires_grad for p in sparse.teacher.module.parameters())


def test_without_a_divergence_there_is_no_teacher(captured_once):
    found = captured_once("llama")
    sparse = sf.prepare(found.model, found.example, sf.annealed_preset(10), objective=Distillation(kl=0.0))
    assert sparse.teacher is None


# -- memory ----------------------------------------------------------------------------------------------------------
def stored_bytes(sparse):
    """Bytes of every tensor that the object can reach, each storage once."""
    method = sparse.method
    tensors = [*sparse.parameters(), *sparse.buffers(), *sparse.program.state.values(), *sparse.dense.state.values()]
    for module in filter(None, (sparse.teacher.module, sparse.probe.module)):
        tensors += [
            *module.parameters(),
            *module.buffers(),
            *(p.grad for p in module.parameters() if p.grad is not None),
        ]
    tensors += [*method.soft.values(), *method.curvature.values.values(), *method.compensation.values()]
    tensors += [t for w in method.weights for t in (w.weight, w.mask)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("curvature", ["gauss_newton", "activation", "squared_gradient", "hutchinson"])
def test_heating_adds_one_mask_and_one_curvature_per_weight(dtype, curvature):
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64), nn.LayerNorm(64)).to(dtype)
    x = torch.randn(8, 64).to(dtype)
    before = sum(p.untyped_storage().nbytes() for p in model.parameters())
    weights = 2 * 64 * 256 * dtype.itemsize
    sparse = sf.prepare(
        model, x, SparseForgeConfig(steps=20, curvature=curvature, heat_end=0.9, quench_end=0.95)
    ).train()
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1e-3)
    for _ in range(5):
        sparse(x)
        sparse.last_loss.total.backward()
        optimizer.step()
        sparse.step()
        optimizer.zero_grad()
    teacher = before
    few = 2048  # the probes' zeros, [in] curvatures
    assert weights <= stored_bytes(sparse) - before - teacher <= 2 * weights + few


# -- modes, dtypes, devices ------------------------------------------------------------------------------------------
def test_modes(captured_once):
    found = captured_once("llama")
    found.model.train()
    sparse = sf.prepare(found.model, found.example, sf.annealed_preset(10))
    assert found.model.training and all(m.training for m in found.model.modules())
    assert sparse.train().training and not sparse.eval().training
    batch = found.batch()
    sparse.eval()(**batch)
    assert not sparse.method.curvature.values
    sparse.train()
    with torch.no_grad():
        sparse(**batch)
    assert sparse.last_loss.kl == 0  # no gradient, no teacher
    sparse(**batch).loss.backward()
    assert sparse.method.curvature.values


def test_dropout_does_not_leak_into_training(tiny):
    """Graphs are traced in eval mode, so that a step is a function of the batch; the model keeps its own mode."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 8), nn.LayerNorm(8)).train()
    x = torch.randn(3, 8)
    sparse = sf.prepare(model, x, sf.annealed_preset(10)).train()
    assert torch.equal(sparse(x), sparse(x))
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_to_another_dtype_keeps_masks_shared(dtype):
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.LayerNorm(16))
    x = torch.randn(8, 16)
    sparse = sf.prepare(model, x, SparseForgeConfig(steps=12, mask_rate=0.5)).to(dtype).train()
    x = x.to(dtype)
    assert all(p.dtype == dtype for p in model.parameters())
    optimizer = torch.optim.SGD(sparse.parameters(), lr=1e-3)
    for _ in range(12):
        out = sparse(x)
        assert out.dtype == dtype
        sparse.last_loss.total.backward()
        if sparse.steps_done < 10:
            assert all(v.dtype == dtype for v in sparse.method.curvature.values.values())
        optimizer.step()
        sparse.step()
        optimizer.zero_grad()
        buffers, probed = dict(sparse.graph.named_buffers()), dict(sparse.probe.module.named_buffers())
        for w in sparse.method.weights:
            assert w.mask.dtype == dtype
            assert w.mask is buffers[f"{w.fqn}_mask"] is probed[f"{w.fqn}_mask"]
    assert sf.finalize(sparse) is model
    for layer in (model[0], model[2]):
        assert check_pattern(layer.weight, TWO_FOUR) and layer.weight.dtype == dtype
        assert torch.count_nonzero(layer.weight) == 128


def test_probes_weigh_nothing_after_a_change_of_dtype():
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.LayerNorm(64))
    sparse = sf.prepare(model, torch.randn(2, 64), sf.annealed_preset(10)).to(torch.bfloat16)
    probes = [p for n, p in sparse.probe.module.named_parameters() if "probe" in n]
    assert [p.untyped_storage().nbytes() for p in probes] == [2]


def test_to_the_meta_device_and_names(captured_once):
    """A state_dict holds the model's own parameters, one mask per weight, and no teacher."""
    found = captured_once("gpt2")
    sparse = sf.prepare(found.model, found.example, sf.annealed_preset(10))
    masks = {k for k in sparse.state_dict() if k.endswith("_mask")}
    assert masks == {f"graph.{fqn}_mask" for fqn in found.weights}
    assert len([p for p in sparse.parameters()]) == len(list(found.model.parameters()))


# -- intermediate values ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("features", ["squarehead", "tinybert", "mobilebert"])
def test_features_are_distilled_beside_the_logits(tiny, features):
    found = tiny("llama")
    plain, batch = found.sparse(sf.annealed_preset(10)), found.batch()
    sparse = found.sparse(sf.annealed_preset(10), Distillation(features=features, feature_weight=0.5))
    equal = sparse.train()(**batch).loss
    torch.testing.assert_close(equal, plain.train()(**batch).loss)  # the student is the teacher still
    for model in (plain, sparse):
        for w in model.method.weights:
            w.mask.copy_(hard_mask(w.weight.abs(), TWO_FOUR, w.dim))
    apart, without = sparse(**batch).loss, plain(**batch).loss
    distance = feature_loss(features, sparse.seen, sparse.teacher.seen)
    torch.testing.assert_close(apart, without + 0.5 * distance)
    assert distance > 0.01
    apart.backward()
    assert all(torch.isfinite(w.weight.grad).all() and w.weight.grad.any() for w in sparse.method.weights)
    assert len(sparse.seen.hidden) == len(sparse.teacher.seen.hidden) == 2  # of one pass


def test_features_alone_need_a_teacher_too(tiny):
    found = tiny("llama")
    sparse = found.sparse(sf.annealed_preset(10), Distillation(task=0.0, kl=0.0, features="squarehead"))
    sparse.train()(**found.batch()).loss.backward()
    with pytest.raises(SparseForgeError, match="compile=False"):
        sparse.compile()


def test_features_are_not_looked_at_in_eval_mode(tiny):
    found = tiny("llama")
    sparse = found.sparse(sf.annealed_preset(10), Distillation(features="tinybert")).eval()
    loss = sparse(**found.batch()).loss
    torch.testing.assert_close(loss, found.sparse(sf.annealed_preset(10)).eval()(**found.batch()).loss)
