"""The five curvature estimators against exact Hessians, per-token loops and hooks on the source model."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.functional import hessian
from transformers.modeling_outputs import SequenceClassifierOutput
from two_processes import run_two

from sparseforge_fx.methods.curvature import ESTIMATORS, PROBES, Curvature, hutchinson_diagonal
from sparseforge_fx.methods.soft_mask import SparseForgeConfig
from sparseforge_fx.training.curvature_probe import generator_of
from sparseforge_fx.training.distillation import Distillation


def drawing(index):
    """What a run of seed 0 draws its vector of that index with, in its first step."""
    return generator_of(torch.device("cpu"), 0, 0, index)


# -- Hutchinson ------------------------------------------------------------------------------------------------------
def small_network():
    """Cross-entropy of tanh(x A^T) B^T in float64, as a function of {A, B} and of all entries in one vector."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 3, (9,), generator=generator)
    weights = {
        "a": torch.randn(4, 3, generator=generator, dtype=torch.float64).requires_grad_(),
        "b": torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_(),
    }

    def loss(a, b):
        return F.cross_entropy(torch.tanh(x @ a.t()) @ b.t(), target)

    return weights, loss


def test_hutchinson_is_unbiased_for_the_exact_diagonal():
    weights, loss = small_network()
    flat = torch.cat([w.detach().flatten() for w in weights.values()])
    exact = hessian(lambda v: loss(v[:12].reshape(4, 3), v[12:].reshape(3, 4)), flat)
    samples = 600
    found = hutchinson_diagonal(
        lambda: loss(*weights.values()), weights, samples=samples, generator=torch.Generator().manual_seed(1)
    )
    estimate = torch.cat([found["a"].flatten(), found["b"].flatten()]).double()
    # Rademacher: var(v_i (H v)_i) = sum over j != i of H_ij^2
    error = ((exact.square().sum(1) - exact.diagonal().square()) / samples).sqrt()
    assert ((estimate - exact.diagonal()).abs() < 4 * error + 1e-6).all()
    assert error.max() < 0.1 * exact.diagonal().abs().max()  # tight enough to tell it from anything else


def test_hutchinson_is_exact_for_a_diagonal_hessian():
    """sum c w^4 / 12 has the Hessian diag(c w^2): one sample says it all."""
    weights = {
        "u": torch.tensor([[1.0, -2.0], [3.0, 0.5]], requires_grad=True),
        "v": torch.tensor([2.0], requires_grad=True),
    }
    c = torch.tensor([[1.0, 2.0], [-1.0, 4.0]])
    found = hutchinson_diagonal(
        lambda: (c * weights["u"] ** 4).sum() / 12 + 3 * weights["v"].square().sum() / 2, weights
    )
    torch.testing.assert_close(found["u"], torch.tensor([[1.0, 8.0], [-9.0, 1.0]]))
    torch.testing.assert_close(found["v"], torch.tensor([3.0]))
    assert weights["u"].grad is None


def test_hutchinson_of_a_linear_loss_and_of_a_weight_without_part_in_it():
    weights = {"used": torch.ones(2, 2, requires_grad=True), "idle": torch.ones(3, requires_grad=True)}
    linear = hutchinson_diagonal(lambda: weights["used"].sum(), weights)
    square = hutchinson_diagonal(lambda: weights["used"].square().sum(), weights, samples=3)
    assert not linear["used"].any()
    torch.testing.assert_close(square["used"], torch.full((2, 2), 2.0))
    assert set(linear) == set(square) == {"used"}  # nothing is known of the other


def test_hutchinson_draws_from_its_generator():
    weights, loss = small_network()
    draw = lambda seed: hutchinson_diagonal(  # noqa: E731
        lambda: loss(*weights.values()), weights, generator=torch.Generator().manual_seed(seed)
    )["a"]
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


# -- the running average ---------------------------------------------------------------------------------------------
def test_running_average_by_hand():
    curvature = Curvature(beta=0.9)
    first, second = torch.tensor([1.0, 0.0, 4.0]), torch.tensor([11.0, 10.0, 0.0])
    curvature.fold("w", first)
    torch.testing.assert_close(curvature.values["w"], torch.tensor([1.0, 0.0, 4.0]))  # taken whole
    curvature.fold("w", second)
    torch.testing.assert_close(curvature.values["w"], torch.tensor([2.0, 1.0, 3.6]))
    assert first.tolist() == [1, 0, 4] and second.tolist() == [11, 10, 0]


def test_parts_of_a_step_are_summed():
    """Micro-batches weigh as one batch, in the first step and later."""
    whole, parts = Curvature(beta=0.9), Curvature(beta=0.9)
    for step in range(3):
        estimate = torch.arange(4.0) + step
        whole.fold("w", estimate)
        parts.add("w", estimate / 4)
        parts.add("w", estimate * 3 / 4)
        parts.close({"w": estimate})
    torch.testing.assert_close(parts.values["w"], whole.values["w"])


@pytest.mark.parametrize(
    ("estimator", "finish"), [("squared_gradient", torch.square), ("hutchinson", torch.abs)], ids=["square", "abs"]
)
def test_what_has_a_sign_loses_it(estimator, finish):
    curvature = Curvature(0.9, estimator)
    weight, signed = torch.ones(3, dtype=torch.bfloat16), torch.tensor([-2.0, 0.5, 3.0])
    curvature.add_signed({"w": signed}, {"w": weight, "idle": weight}, scale=0.5)
    curvature.add_signed({"w": -signed}, {"w": weight, "idle": weight}, scale=0.5)  # a second vector of the same probe
    assert set(curvature.values) == {"w"} and curvature.values["w"].dtype == torch.bfloat16
    torch.testing.assert_close(curvature.values["w"].float(), finish(signed))


def test_running_average_keeps_no_hold_of_the_estimate():
    curvature = Curvature(0.5)
    estimate = torch.ones(2)
    curvature.fold("w", estimate)
    estimate.zero_()
    assert curvature.values["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("given", "kept"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
    ids=str,
)
def test_running_average_keeps_the_range_of_squares(given, kept):
    curvature = Curvature(0.5)
    curvature.fold("w", torch.full((2,), 6e-8, dtype=given))
    assert curvature.values["w"].dtype == kept
    assert curvature.values["w"].min() > 0


def test_an_average_from_zero_gives_no_estimate_more_than_a_later_one():
    curvature = Curvature(0.9, start="zero")
    curvature.fold("w", torch.tensor([10.0]))
    torch.testing.assert_close(curvature.values["w"], torch.tensor([1.0]))
    curvature.add("w", torch.tensor([5.0]))
    curvature.add("w", torch.tensor([5.0]))  # of one step
    curvature.close({"w": torch.ones(1)})
    torch.testing.assert_close(curvature.values["w"], torch.tensor([1.9]))


# -- through the graph -----------------------------------------------------------------------------------------------
def curvature_of(tiny_model, estimator, batch, **options):
    """h after one heating step of a SparseModel (masks of one, first estimate taken whole)."""
    sparse = tiny_model.sparse(SparseForgeConfig(steps=10, curvature=estimator), **options)
    sparse.train()
    sparse(**batch).loss.backward()
    sparse.step()
    return sparse, sparse.method.curvature.values


def hooked(model, batch):
    """The source model's inputs and output gradients at every module with a 2-D weight, by its name, token by token."""
    inputs, grads, handles = {}, {}, []
    for name, module in model.named_modules():
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2 and not isinstance(module, torch.nn.Embedding):

            def keep(module, args, out, name=name):
                inputs[f"{name}.weight"] = args[0].detach().flatten(0, -2)
                out.register_hook(lambda g: grads.__setitem__(f"{name}.weight", g.detach().flatten(0, -2)))

            handles.append(module.register_forward_hook(keep))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    for handle in handles:
        handle.remove()
    weights = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return inputs, grads, weights


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gauss_newton_equals_a_loop_over_tokens(tiny, name):
    found = tiny(name)
    batch = found.batch()
    inputs, grads, _ = hooked(found.model, batch)
    _, values = curvature_of(found, "gauss_newton", batch)
    assert set(values) == set(found.weights)
    for fqn, value in values.items():
        expected = torch.zeros(grads[fqn].shape[1], inputs[fqn].shape[1])
        for g, x in zip(grads[fqn], inputs[fqn], strict=True):  # one token
            for i, g_i in enumerate(g.tolist()):
                expected[i] += g_i**2 * x**2
        if name == "gpt2":  # Conv1D stores [in, out]
            expected = expected.t()
        assert value.shape == found.weights[fqn].shape
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4 * expected.max().item())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_activation_is_the_mean_square_of_the_inputs(tiny, name):
    found = tiny(name)
    batch = found.batch()
    inputs, _, _ = hooked(found.model, batch)
    _, values = curvature_of(found, "activation", batch)
    assert set(values) == set(found.weights)
    for fqn, value in values.items():
        mean = sum(x**2 for x in inputs[fqn]) / len(inputs[fqn])
        tokens = batch["input_ids"].numel()
        torch.testing.assert_close(value / tokens, mean, rtol=1e-4, atol=1e-6)  # the probe gives the sum over tokens


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_squared_gradient_is_the_batch_gradient_squared(tiny, name):
    found = tiny(name)
    batch = found.batch()
    _, _, weight_grads = hooked(found.model, batch)
    _, values = curvature_of(found, "squared_gradient", batch)
    assert set(values) == set(found.weights)
    for fqn, value in values.items():
        expected = weight_grads[fqn] ** 2
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4 * expected.max().item())


def both_losses(model, batch):
    """Cross-entropy and KL from the model itself, over real positions: at the dense weights KL has a Hessian only."""
    logits = model(**batch).logits.float()
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
    log_p = logits[mask].log_softmax(-1)
    divergence = F.kl_div(log_p, log_p.detach(), log_target=True, reduction="batchmean")
    scored = mask[:, 1:] & mask[:, :-1]
    return F.cross_entropy(logits[:, :-1][scored], batch["input_ids"][:, 1:][scored]) + divergence


def test_hutchinson_through_the_graph_is_hutchinson_of_the_model(tiny):
    """Same signs, the model's own loss and its divergence; the absolute value of every product."""
    found = tiny("llama")
    batch = found.batch()
    _, values = curvature_of(found, "hutchinson", batch)
    weights = dict(found.weights)
    expected = hutchinson_diagonal(lambda: both_losses(found.model, batch), weights, generator=drawing(0))
    assert set(values) == set(weights)
    assert any((e < 0).any() for e in expected.values())
    for fqn, value in values.items():
        wanted = expected[fqn].abs()
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-4 * wanted.max().item())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_hutchinson_sees_what_a_branch_adds(tiny, name):
    """W * e + S X in the dense model."""
    found = tiny(name)
    batch = found.batch()
    sparse = found.sparse(SparseForgeConfig(steps=10, curvature="hutchinson"), slorb_block=16).train()
    with torch.no_grad():
        for branch in sparse.branches:
            branch.s.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    added = {b.weight.fqn: b.s.detach().repeat_interleave(16, 1) for b in sparse.branches}  # before masks move
    first = {n: p.detach().clone() for n, p in found.weights.items()}
    sparse(**batch).loss.backward()
    sparse.step()
    with torch.no_grad():
        teacher = found.model(**batch).logits.float().log_softmax(-1)
        for fqn, value in added.items():
            found.weights[fqn].add_(value.t() if name == "gpt2" else value)

    def loss():
        log_p = found.model(**batch).logits.float().log_softmax(-1)
        divergence = F.kl_div(log_p.flatten(0, 1), teacher.flatten(0, 1), log_target=True, reduction="batchmean")
        return F.nll_loss(log_p[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten()) + divergence

    expected = hutchinson_diagonal(loss, dict(found.weights), generator=drawing(0))
    with torch.no_grad():
        for fqn, value in first.items():
            found.weights[fqn].copy_(value)
    for fqn, value in sparse.method.curvature.values.items():
        wanted = expected[fqn].abs()
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-3 * wanted.max().item(), msg=fqn)


def test_several_vectors_of_a_probe_are_averaged_as_absolute_values(tiny):
    found = tiny("llama")
    batch = found.batch()
    sparse = found.sparse(SparseForgeConfig(steps=10, curvature="hutchinson", curvature_vectors=2)).train()
    sparse(**batch).loss.backward()
    sparse.step()
    draws = [
        hutchinson_diagonal(lambda: both_losses(found.model, batch), found.weights, generator=drawing(index))
        for index in range(2)
    ]
    for fqn, value in sparse.method.curvature.values.items():
        wanted = (draws[0][fqn].abs() + draws[1][fqn].abs()) / 2
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-4 * wanted.max().item())


# -- the true Fisher -------------------------------------------------------------------------------------------------
class ThreeLinears(torch.nn.Module):
    """Classes of a vector, by a network whose Fisher information can be summed over all labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(4, 8), torch.nn.Linear(8, 8)
        self.c = torch.nn.Linear(8, 3)  # the head, which stays dense

    def forward(self, x):
        return SequenceClassifierOutput(logits=3 * self.c(torch.tanh(self.b(torch.tanh(self.a(x))))))


def exact_fisher(x):
    """Mean over the rows of sum_y p(y) (d log p(y) / d w)^2, for both weights."""
    model = ThreeLinears()
    total = {"a.weight": torch.zeros(8, 4), "b.weight": torch.zeros(8, 8)}
    for row in x:
        log_p = model(row[None]).logits.log_softmax(-1)[0]
        for y in range(3):
            grads = torch.autograd.grad(log_p[y], [model.a.weight, model.b.weight], retain_graph=True)
            for name, grad in zip(total, grads, strict=True):
                total[name] += log_p[y].exp().detach() * grad.square() / len(x)
    return total


def fishers(draws, labels, objective=None):
    """The model, its inputs, and the mean of so many estimates."""
    from sparseforge_fx.training.prepare import prepare

    model, x = ThreeLinears(), torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    sparse = prepare(model, {"x": x}, SparseForgeConfig(steps=10, curvature="fisher"), objective=objective).train()
    values, total = sparse.method.curvature.values, {}
    for step in range(draws):
        sparse(x=x, labels=labels).loss.backward()
        sparse.probe.complete(step, None)
        sparse.probe.forget()
        total = {name: total.get(name, 0) + value / draws for name, value in values.items()}
        values.clear()
    return model, x, total, sparse


def test_the_fisher_is_that_of_labels_drawn_from_the_model():
    """By enumeration, whatever the labels of the data and the loss of the run are."""
    _, x, found, _ = fishers(1500, torch.zeros(6, dtype=torch.long), Distillation(task=3.0, kl=0.0))
    for name, expected in exact_fisher(x).items():
        torch.testing.assert_close(found[name], expected, rtol=0.15, atol=0.03 * expected.max().item())
    other = fishers(3, torch.ones(6, dtype=torch.long))[2]
    assert all(torch.equal(other[n], v) for n, v in fishers(3, torch.zeros(6, dtype=torch.long))[2].items())


def test_drawn_labels_leave_the_training_gradient_alone():
    labels = torch.tensor([0, 1, 2, 2, 0, 1])
    model, x, _, _ = fishers(1, labels, Distillation(kl=0.0))
    with_probe = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    F.cross_entropy(model(x).logits, labels).backward()
    assert {"a.weight", "b.weight"} <= set(with_probe)
    for name, found in with_probe.items():
        torch.testing.assert_close(found, model.get_parameter(name).grad)


@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if e != "fisher"])  # whose draws differ by micro-batch
def test_micro_batches_are_one_batch(tiny, estimator):
    """Two of two rows estimate what one of four does; with a rescaling by the number of tokens in none of them."""
    found = tiny("llama")
    config = SparseForgeConfig(steps=10, curvature=estimator)
    batch = found.batch(rows=4)
    values = []
    for parts in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        found.reset()
        sparse = found.sparse(config).train()
        for _ in range(2):
            for part in parts:
                (sparse(**{k: v[part] for k, v in batch.items()}).loss / len(parts)).backward()
            sparse.step()
            for p in sparse.parameters():
                p.grad = None
        values.append(sparse.method.curvature.values)
    for fqn, one in values[0].items():
        torch.testing.assert_close(values[1][fqn], one, rtol=1e-3, atol=1e-4 * one.max().item(), msg=fqn)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_is_alive_and_leaves_nothing_behind(tiny, estimator):
    found = tiny("llama")
    sparse, values = curvature_of(found, estimator, found.batch())
    assert all((v >= 0).all() and v.sum() > 0 for v in values.values())
    assert {id(p) for p in sparse.parameters()} == {id(p) for p in found.model.parameters()}  # no probe, no teacher
    probes = [p for n, p in sparse.probe.module.named_parameters() if "probe" in n] if sparse.probe.module else []
    assert len(probes) == (len(values) if estimator in PROBES else 0)
    assert all(p.grad is None for p in probes)
    assert all(p.grad is None for p in sparse.teacher.module.parameters())
    assert not any("probe" in n for n, _ in sparse.named_parameters())


def test_squares_of_small_half_precision_gradients_survive():
    """1e-4 squared is below float16's smallest number."""
    from torch import nn

    from sparseforge_fx.training.prepare import prepare

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).half()
    x = torch.randn(4, 8).half()
    sparse = prepare(model, x, SparseForgeConfig(steps=4, curvature="squared_gradient"))
    sparse.train()(x)
    model[0].weight.grad = torch.full((8, 8), 1e-4, dtype=torch.float16)
    sparse.step()
    (value,) = sparse.method.curvature.values.values()
    torch.testing.assert_close(value, torch.full((8, 8), 1e-8), rtol=1e-2, atol=0)


# -- several processes -----------------------------------------------------------------------------------------------
RANKS = """
import sys, torch
from test_curvature import curvatures
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.save(curvatures(slice(2 * rank, 2 * rank + 2)), f"{sys.argv[1]}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


class Branches(torch.nn.Module):
    """A row sees one branch or the other by the sign of its first entry."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x):
        first = (x[:, :1] > 0).to(x.dtype)
        return SequenceClassifierOutput(logits=self.a(x) * first + self.b(x) * (1 - first))


def curvatures(rows: slice) -> dict[str, dict[str, torch.Tensor]]:
    """h of every estimator after two steps of a loop of one's own over some rows, whose gradients are averaged."""
    from sparseforge_fx.training.prepare import prepare

    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    x[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    found = {}
    for estimator in ESTIMATORS:
        sparse = prepare(
            Branches(), {"x": x[:2]}, SparseForgeConfig(steps=8, curvature=estimator), objective=Distillation(kl=1.0)
        ).train()
        with torch.no_grad():
            for p in sparse.parameters():
                p.mul_(0.8)  # away from the teacher
        for step in range(2):
            sparse(x=x[rows] + step / 8, labels=torch.tensor([0, 3, 1, 2])[rows])
            sparse.last_loss.total.backward()
            for p in sparse.parameters():
                if torch.distributed.is_initialized():
                    torch.distributed.all_reduce(p.grad)
                    p.grad /= torch.distributed.get_world_size()
            sparse.step()
            for p in sparse.parameters():
                p.grad = None
        found[estimator] = {
            **sparse.method.curvature.values,
            **{w.fqn + " mask": w.mask for w in sparse.method.weights},
        }
    return found


@pytest.mark.slow
def test_two_processes_estimate_what_one_does_with_both_their_batches(tmp_path):
    """In a loop of one's own. Half of the model hears nothing on either process."""
    first, second = run_two(RANKS, tmp_path)
    alone = curvatures(slice(0, 4))
    for estimator, values in alone.items():
        for name, one in values.items():
            assert torch.equal(first[estimator][name], second[estimator][name]), (estimator, name)
            if estimator == "fisher":  # each process draws for its own rows
                continue
            scale = one.mean() / first[estimator][name].mean()  # a common factor changes no mask
            torch.testing.assert_close(
                first[estimator][name] * scale,
                one,
                rtol=1e-3,
                atol=1e-5,
                msg=lambda text, where=(estimator, name): f"{where}: {text}",
            )
