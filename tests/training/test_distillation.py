"""The chunked loss against the plain formulas, its memory, and the labels that feed it."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.taps import Taps
from sparseforge_fx.training.distillation import (
    FEATURES,
    Distillation,
    feature_loss,
    logits_loss,
    plain_logits_loss,
    relative_error,
    rows_loss,
)

ROWS, VOCAB = (3, 5), 11
# rounding of the gradient to its dtype; the arithmetic is float32 throughout
TOLERANCE = {torch.float32: 2e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def example(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = (2 * torch.randn(*ROWS, VOCAB, generator=generator)).to(dtype)
    teacher = (2 * torch.randn(*ROWS, VOCAB, generator=generator)).to(dtype)
    labels = torch.randint(0, VOCAB, ROWS, generator=generator)
    labels[0, 1] = labels[2, 4] = labels[1, 0] = -100
    return student, teacher, labels


def plain(student, teacher, labels, w_task, w_kl):
    """Loss, parts and gradient by PyTorch's own functions, in float64."""
    logits = student.double().flatten(0, -2).requires_grad_()
    task = F.cross_entropy(logits, labels.flatten(), ignore_index=-100)
    log_q = teacher.double().flatten(0, -2).log_softmax(-1)
    kl = F.kl_div(logits.log_softmax(-1), log_q, log_target=True, reduction="batchmean")
    total = w_task * task + w_kl * kl
    total.backward()
    return total.detach(), task.detach(), kl.detach(), logits.grad.reshape(student.shape)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows_at_once", [1, 2, 7, 15, 1000])
@pytest.mark.parametrize(("w_task", "w_kl"), [(1.0, 1.0), (0.3, 2.0), (0.0, 1.0), (1.0, 0.0)])
def test_loss_and_gradient_equal_the_plain_formula(dtype, rows_at_once, w_task, w_kl):
    student, teacher, labels = example(dtype)
    student.requires_grad_()
    loss = logits_loss(student, teacher, labels, w_task=w_task, w_kl=w_kl, chunk_bytes=rows_at_once * VOCAB * 4)
    loss.total.backward()
    total, task, kl, grad = plain(student.detach(), teacher, labels, w_task, w_kl)
    torch.testing.assert_close(loss.total.detach().double(), total, rtol=1e-6, atol=0)
    assert student.grad.dtype == dtype
    torch.testing.assert_close(student.grad.double(), grad, rtol=TOLERANCE[dtype], atol=2e-7)
    if w_task:
        torch.testing.assert_close(loss.task.double(), task, rtol=1e-6, atol=0)
    if w_kl:
        torch.testing.assert_close(loss.kl.double(), kl, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("weights", "how"),
    [
        ({}, {}),
        ({"w_kl": 0.0}, {}),
        ({"w_task": 0.0}, {"temperature": 2.0}),
        ({"w_task": 0.5}, {"divergence": "reverse_kl", "temperature": 1.5}),
    ],
)
def test_compiled_it_is_the_same_loss_over_all_rows_at_once(dtype, weights, how, backend):
    student, teacher, labels = example(dtype)
    found = {}
    for name, compiled in (("eager", None), ("compiled", torch.compile(rows_loss, backend=backend))):
        scores = student.clone().requires_grad_()
        loss = logits_loss(scores, teacher, labels, **weights, **how, chunk_bytes=VOCAB * 4, compiled=compiled)
        loss.total.backward()
        found[name] = [*(part.detach() for part in loss), scores.grad]
    for eager, compiled in zip(*found.values(), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=max(2e-6, TOLERANCE[dtype]), atol=2e-7)


def test_a_share_of_the_loss_scales_the_gradient():
    """As micro-batches do."""
    grads = []
    for share in (1.0, 0.25):
        student, teacher, labels = example()
        student.requires_grad_()
        (share * logits_loss(student, teacher, labels).total).backward()
        grads.append(student.grad)
    torch.testing.assert_close(grads[1], 0.25 * grads[0])


def test_without_a_teacher_it_is_the_cross_entropy():
    student, _, labels = example()
    student.requires_grad_()
    loss = logits_loss(student, None, labels, w_kl=0.0)
    reference = student.detach().clone().requires_grad_()
    expected = F.cross_entropy(reference.flatten(0, -2), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(torch.autograd.grad(loss.total, student), torch.autograd.grad(expected, reference))
    assert loss.kl == 0


def test_without_a_scored_label_only_the_teacher_counts():
    student, teacher, labels = example()
    student.requires_grad_()
    loss = logits_loss(student, teacher, torch.full_like(labels, -100))
    loss.total.backward()
    total, _, _, grad = plain(student.detach(), teacher, labels, 0.0, 1.0)
    assert loss.task == 0
    torch.testing.assert_close(loss.total.detach().double(), total, rtol=1e-6, atol=0)
    torch.testing.assert_close(student.grad.double(), grad, rtol=1e-6, atol=1e-7)


def test_gradient_is_scaled_by_what_comes_from_above():
    student, teacher, labels = example()
    grads = []
    for factor in (1.0, 0.25):
        logits = student.clone().requires_grad_()
        (logits_loss(logits, teacher, labels).total * factor).backward()
        grads.append(logits.grad)
    torch.testing.assert_close(grads[1], 0.25 * grads[0], rtol=0, atol=0)


def test_parts_are_for_the_curves_only():
    student, teacher, labels = example()
    loss = logits_loss(student.requires_grad_(), teacher.requires_grad_(), labels)
    assert loss.total.requires_grad and not loss.task.requires_grad and not loss.kl.requires_grad
    loss.total.backward()
    assert teacher.grad is None


def test_equal_distributions_have_no_divergence_and_no_gradient():
    student, _, labels = example()
    student.requires_grad_()
    loss = logits_loss(
        student, (student + 3).detach(), labels, w_task=0.0
    )  # logits know their distribution up to a constant
    loss.total.backward()
    assert abs(loss.total.item()) < 1e-6
    assert student.grad.abs().max() < 1e-7


def test_extreme_logits_stay_finite():
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    loss = logits_loss(student, -student.detach() / 1e4, torch.tensor([0, 0]))
    loss.total.backward()
    assert loss.task.item() == pytest.approx(1e4)  # right, then wrong by 2e4
    assert torch.isfinite(student.grad).all()


class Largest(TorchDispatchMode):
    """The size of the largest float32 tensor that any operator makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                self.numel = max(self.numel, value.numel())
        return out


def test_no_float32_copy_of_the_logits_is_ever_made():
    rows, vocab, at_once = 64, 50, 4
    student = torch.randn(rows, vocab).bfloat16().requires_grad_()
    teacher = torch.randn(rows, vocab).bfloat16()
    labels = torch.randint(0, vocab, (rows,))
    saved = []
    with Largest() as plain_way:
        F.cross_entropy(student.float(), labels).backward()
    assert plain_way.numel == rows * vocab  # the counter sees what it must
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        logits_loss(student, teacher, labels, chunk_bytes=at_once * vocab * 4).total.backward()
    assert 0 < largest.numel <= at_once * vocab
    assert [(t.shape, t.dtype) for t in saved] == [(student.shape, torch.bfloat16)]


def test_relative_error_by_hand():
    teacher = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    student = torch.tensor([[3.0, 1.0], [1.0, 0.0]])
    assert relative_error(student, teacher).item() == pytest.approx(2 / 9)
    assert relative_error(teacher, teacher) == 0
    assert relative_error(10 * student, 10 * teacher).item() == pytest.approx(2 / 9)
    assert torch.isfinite(relative_error(student, torch.zeros_like(teacher)))
    half = relative_error(student.bfloat16() * 300, teacher.bfloat16() * 300)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(2 / 9)


@pytest.mark.parametrize("rows_at_once", [1, 7, 100])
def test_reverse_divergence(rows_at_once):
    torch.manual_seed(0)
    student, teacher = torch.randn(5, VOCAB, requires_grad=True), torch.randn(5, VOCAB)
    labels = torch.full((5,), -100)
    loss = logits_loss(
        student, teacher, labels, w_task=0.0, divergence="reverse_kl", chunk_bytes=rows_at_once * VOCAB * 4
    )
    loss.total.backward()
    got, student.grad = student.grad, None
    p = student.log_softmax(-1)
    expected = (p.exp() * (p - teacher.log_softmax(-1))).sum(-1).mean()
    expected.backward()
    torch.testing.assert_close(loss.kl, expected.detach())
    torch.testing.assert_close(got, student.grad, rtol=1e-4, atol=1e-6)


def taps(hidden, attention=()):
    made = Taps()
    made.hidden, made.attention = list(hidden), list(attention)
    return made


def test_feature_losses_by_hand():
    """Two layers: SquareHead is scale-free, the others are plain squared errors plus a distance of the attention."""
    teacher = taps([torch.full((1, 2, 2), 2.0), torch.full((1, 2, 2), 4.0)])
    student = taps([torch.full((1, 2, 2), 3.0), torch.full((1, 2, 2), 4.0)])
    assert feature_loss("squarehead", student, teacher).item() == pytest.approx(1 / (4 + 2**-7))
    causal = float("-inf")
    teacher.attention = [torch.tensor([[[[1.0, causal], [0.0, 0.0]]]])]
    student.attention = [torch.tensor([[[[3.0, causal], [0.0, 3.0]]]])]
    assert feature_loss("tinybert", student, teacher).item() == pytest.approx(1 + (4 + 0 + 9) / 3)
    q = torch.tensor([0.0, 3.0]).log_softmax(-1)
    divergence = float((0.5 * (torch.tensor(0.5).log() - q)).sum())
    assert feature_loss("mobilebert", student, teacher).item() == pytest.approx(1 + divergence / 2)


@pytest.mark.parametrize("kind", FEATURES)
def test_feature_losses_vanish_where_student_and_teacher_agree(kind):
    torch.manual_seed(0)
    scores = torch.randn(1, 2, 3, 3).masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), float("-inf"))
    one = taps([torch.randn(1, 3, 4)], [scores])
    student = taps([one.hidden[0].clone().requires_grad_()], [scores.clone().requires_grad_()])
    loss = feature_loss(kind, student, one)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert torch.isfinite(student.hidden[0].grad).all()
    assert kind == "squarehead" or torch.isfinite(student.attention[0].grad).all()


@pytest.mark.parametrize(("divergence", "features"), [("KL", None), ("kl", "squarehed")])
def test_losses_that_do_not_exist(divergence, features):
    with pytest.raises(SparseForgeError, match="choose one of"):
        Distillation(divergence=divergence, features=features)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl"])
@pytest.mark.parametrize("rows_at_once", [1, 100])
def test_temperature(divergence, temperature, rows_at_once):
    """T^2 times the divergence of both distributions at T, by PyTorch's own functions; the task stays at 1."""
    student, teacher, labels = example()
    student.requires_grad_()
    options = {"divergence": divergence, "temperature": temperature, "w_task": 0.5, "w_kl": 2.0}
    loss = logits_loss(student, teacher, labels, **options, chunk_bytes=rows_at_once * VOCAB * 4)
    logits = student.detach().double().flatten(0, -2).requires_grad_()
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (logits, teacher.double().flatten(0, -2)))
    pair = (log_q, log_p) if divergence == "reverse_kl" else (log_p, log_q)
    kl = temperature**2 * F.kl_div(*pair, log_target=True, reduction="batchmean")
    total = 0.5 * F.cross_entropy(logits, labels.flatten(), ignore_index=-100) + 2.0 * kl
    torch.testing.assert_close(loss.kl.double(), kl, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(loss.total.double(), total, rtol=1e-5, atol=1e-7)
    (got,), (wanted,) = torch.autograd.grad(loss.total, student), torch.autograd.grad(total, logits)
    torch.testing.assert_close(got.double().flatten(0, -2), wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl"])
def test_the_loss_that_differentiates_twice_is_the_chunked_one(divergence, temperature):
    """Same value, parts and gradient; and a Hessian, where the chunked one has none."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 7, dtype=torch.float32, requires_grad=True), torch.randn(2, 7)
    labels = torch.tensor([3, -100])

    def loss(rows, function=plain_logits_loss):
        return function(rows, teacher, labels, w_task=0.7, w_kl=0.4, divergence=divergence, temperature=temperature)

    once, twice = loss(student, logits_loss), loss(student)
    exact = torch.autograd.functional.hessian(lambda rows: loss(rows).total, student.detach())
    for one, two in zip(once, twice, strict=True):
        torch.testing.assert_close(one, two)
    (first,), (second,) = (torch.autograd.grad(found.total, student) for found in (once, twice))
    torch.testing.assert_close(first, second)
    p = student.detach()[0].softmax(-1)
    if divergence == "kl" and temperature == 1:  # both parts have the Hessian of the log-partition
        torch.testing.assert_close(exact[0, :, 0, :], (0.7 + 0.4 / 2) * (p.diag() - p[:, None] * p))
    assert exact.abs().max() > 0.01
