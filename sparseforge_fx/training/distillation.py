"""Distillation from the dense teacher, with logits of a vocabulary never in memory three times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseforge_fx.data.reading import IGNORE
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.padding import real_rows
from sparseforge_fx.graph.taps import Taps
from sparseforge_fx.ranges import AtLeastZero, Positive, check_numbers

#: losses on intermediate values, and whether they look at attention: SquareHead (arXiv 2310.06927: squared error of the
#: hidden states over the teacher's energy), TinyBERT (arXiv 1909.10351: squared errors of hidden states and attention
#: scores), MobileBERT (arXiv 2004.02984: squared error of hidden states, KL of attention)
FEATURES = {"squarehead": False, "tinybert": True, "mobilebert": True}
DIVERGENCES = ("kl", "reverse_kl")


@dataclass(frozen=True)
class Distillation:
    """What a run minimises: task * (loss on the labels) + kl * (distance from the dense model's answer), and a
    distance of intermediate values where ``features`` names one.

    Attributes:
        task, kl: the weights of both. Where the answer is no distribution, the distance is the relative squared error.
        divergence: ``kl``: KL(teacher || student); ``reverse_kl``: KL(student || teacher) (MiniLLM, arXiv 2306.08543).
        temperature: T by which both models' scores are divided before they are compared; the divergence counts T^2
            times, so that its gradient keeps its size (arXiv 1503.02531, section 2).
        features, feature_weight: ``squarehead``, ``tinybert`` or ``mobilebert`` (:data:`FEATURES`), and its weight;
            the values are found in the graph.
    """

    task: AtLeastZero = 1.0
    kl: AtLeastZero = 1.0
    divergence: Literal["kl", "reverse_kl"] = "kl"
    temperature: Positive = 1.0
    features: Literal["squarehead", "tinybert", "mobilebert"] | None = None
    feature_weight: AtLeastZero = 1.0

    def __post_init__(self) -> None:
        check_numbers(get_type_hints(type(self), include_extras=True), vars(self))
        if self.divergence not in DIVERGENCES:
            raise SparseForgeError(f"unknown divergence {self.divergence!r}; choose one of {', '.join(DIVERGENCES)}")
        if self.features not in (None, *FEATURES):
            raise SparseForgeError(f"unknown features {self.features!r}; choose one of {', '.join(FEATURES)}")

    @property
    def idle(self) -> dict[str, str]:
        """What is not at its default and has no part in the loss, because of the rest: name -> why."""
        usual = type(self)()
        why = {} if self.kl else dict.fromkeys(("divergence", "temperature"), "kl is 0")
        why |= {} if self.features else {"feature_weight": "features names none"}
        return {name: reason for name, reason in why.items() if getattr(self, name) != getattr(usual, name)}

    def describe(self) -> dict[str, Any]:
        """As plain values, for the report and for saved states."""
        return asdict(self)


def check_objective(objective: Any) -> None:
    """Raise a SparseForgeError unless it is a :class:`Distillation`."""
    if not isinstance(objective, Distillation):
        raise SparseForgeError(f"objective is {objective!r}: give a Distillation")


class Loss(NamedTuple):
    """``total`` carries the gradient; ``task`` and ``kl`` are detached parts for the curves (nats per scored token)."""

    total: Tensor
    task: Tensor
    kl: Tensor


class RowsOfLoss(NamedTuple):
    """Of some rows: the gradient of the loss in the student's logits (their shape and dtype), the sums of cross-entropy
    and divergence."""

    grad: Tensor
    task: Tensor
    divergence: Tensor


def rows_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    w_task: Tensor | None,
    w_divergence: Tensor | None,
    reverse: bool,
    temperature: float,
) -> RowsOfLoss:
    """The loss of logits [rows, vocab] and labels [rows]: of each scored row the cross-entropy counts ``w_task`` times,
    of each row the divergence at temperature T ``w_divergence`` times T."""
    log_p = F.log_softmax(student.float(), -1)
    p = log_p.exp()
    task = divergence = torch.zeros((), dtype=torch.float32, device=student.device)
    delta: Tensor | None = None
    if w_divergence is not None and teacher is not None:
        soft_log_p, soft_p = log_p, p
        log_q = teacher.float()
        if temperature != 1:
            soft_log_p = F.log_softmax(student.float() / temperature, -1)
            soft_p, log_q = soft_log_p.exp(), log_q / temperature
        log_q = F.log_softmax(log_q, -1)
        if reverse:
            gap = soft_log_p - log_q
            mean = (soft_p * gap).sum(-1, keepdim=True)
            divergence = mean.sum()
            delta = soft_p * (gap - mean)
        else:
            q = log_q.exp()
            divergence = (q * (log_q - soft_log_p)).sum(-1).sum()
            delta = soft_p - q
        delta = delta * w_divergence
    if w_task is not None:
        valid = labels != IGNORE
        index = labels.clamp(min=0)[:, None]
        task = -(log_p.gather(1, index)[:, 0] * valid).sum()
        weight = (valid * w_task)[:, None].float()
        delta = p * weight if delta is None else torch.addcmul(delta, p, weight)
        if torch.compiler.is_compiling():  # a scatter would keep the float32 gradient of all rows
            here = torch.arange(delta.shape[1], device=delta.device) == index
            delta = delta - torch.where(here, weight, 0.0)
        else:
            delta.scatter_add_(1, index, -weight)
    grad = torch.zeros_like(student) if delta is None else delta.to(student.dtype)
    return RowsOfLoss(grad, task, divergence)


#: :func:`rows_loss`, or what a compiler made of it
RowsLoss = Callable[..., RowsOfLoss]


class _ChunkedLoss(torch.autograd.Function):
    """w_task * CE + w_kl * KL over rows, its gradient made chunk by chunk in the forward (as fused linear losses
    do)."""

    @staticmethod
    def forward(ctx, student, teacher, labels, w_task, w_kl, chunk, reverse, temperature, of_rows):
        rows = student.shape[0]
        scored = (labels != IGNORE).sum().clamp(min=1)
        w_row = w_task / scored if w_task else None
        w_divergence = torch.full((), temperature * w_kl / max(1, rows), device=student.device) if w_kl else None
        task = kl = torch.zeros((), dtype=torch.float32, device=student.device)
        grad = None if 0 < rows <= chunk else torch.empty_like(student)
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            taught = None if teacher is None else teacher[part]
            found = of_rows(student[part], taught, labels[part], w_row, w_divergence, reverse, temperature)
            task, kl = task + found.task, kl + found.divergence
            if grad is None:
                grad = found.grad
            else:
                grad[part] = found.grad
        ctx.save_for_backward(grad)
        task, kl = task / scored, temperature**2 * kl / rows
        ctx.mark_non_differentiable(task, kl)
        return w_task * task + w_kl * kl, task, kl

    @staticmethod
    def backward(ctx, grad_total, *_):
        (grad,) = ctx.saved_tensors
        if grad_total.device.type != "cpu" or grad_total != 1:  # elsewhere it would wait for the device
            grad = grad * grad_total.to(grad.dtype)
        return grad, None, None, None, None, None, None, None, None


def logits_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    w_task: float = 1.0,
    w_kl: float = 1.0,
    divergence: str = "kl",
    temperature: float = 1.0,
    chunk_bytes: int | None = None,
    compiled: RowsLoss | None = None,
) -> Loss:
    """w_task * cross-entropy(student, labels) + w_kl * T^2 * divergence from the teacher at temperature T.

    Args:
        student, teacher: logits [..., vocab] of the same shape; teacher may be None if ``w_kl`` is 0.
        labels: [...] class ids; -100 is not scored by the cross-entropy (mean over scored rows). The KL is the mean
            over all rows.
        divergence: ``kl``: KL(teacher || student); ``reverse_kl``: KL(student || teacher) (MiniLLM, arXiv 2306.08543,
            at each token).
        chunk_bytes: float32 bytes of logits that are worked on at a time. Default: 1 MiB on a CPU, where the dozen
            temporaries of a chunk then stay in its cache, and 128 MiB elsewhere.
        compiled: :func:`rows_loss` under torch.compile: it has no temporaries and takes all rows at once.

    One extra tensor of the logits' size and dtype is kept for the backward: their gradient. Source: arXiv 2605.06402
    (1.0/1.0 in the authors' release).
    """
    vocab = student.shape[-1]
    chunk_bytes = chunk_bytes or (1 << 20 if student.device.type == "cpu" else 1 << 27)
    rows = student.numel() // vocab
    chunk = max(1, chunk_bytes // (4 * vocab)) if compiled is None else max(1, rows)
    flat_teacher = None if teacher is None else teacher.reshape(-1, vocab)
    reverse = divergence == "reverse_kl"
    flat = student.reshape(-1, vocab)
    how = (w_task, w_kl, chunk, reverse, temperature, compiled or rows_loss)
    return Loss(*_ChunkedLoss.apply(flat, flat_teacher, labels.reshape(-1), *how))


def plain_logits_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    w_task: float = 1.0,
    w_kl: float = 1.0,
    divergence: str = "kl",
    temperature: float = 1.0,
) -> Loss:
    """:func:`logits_loss` by autograd, in float32 and whole: for second derivatives."""
    scores = student.reshape(-1, student.shape[-1]).float()
    log_p = scores.log_softmax(-1)
    scored = (labels != IGNORE).sum().clamp(min=1)
    task = F.nll_loss(log_p, labels.reshape(-1), ignore_index=IGNORE, reduction="sum") / scored
    kl = torch.zeros_like(task)
    if teacher is not None and w_kl:
        soft_log_p = log_p if temperature == 1 else (scores / temperature).log_softmax(-1)
        log_q = (teacher.reshape(-1, teacher.shape[-1]).float() / temperature).log_softmax(-1)
        pair = (log_q, soft_log_p) if divergence == "reverse_kl" else (soft_log_p, log_q)
        kl = temperature**2 * F.kl_div(*pair, log_target=True, reduction="batchmean")
    return Loss(w_task * task + w_kl * kl, task.detach(), kl.detach())


def feature_loss(kind: str, student: Taps, teacher: Taps, real: Mapping[str, Tensor] | None = None) -> Tensor:
    """Distance of intermediate values, summed over the layers (AST's table 5; sources in :data:`FEATURES`).

    ``real``: name of a mask -> bool [batch, positions], False where there is padding, which does not count.
    """
    masks = real or {}
    total = torch.zeros((), device=student.hidden[0].device)
    known = student.hidden_rows or [None] * len(student.hidden)
    for s, t, rows in zip(student.hidden, teacher.hidden, known, strict=True):
        s, t = (_known(value.float(), None if rows is None else rows.of(masks)) for value in (s, t))
        error = (s - t).square().mean()
        total = total + (error / (t.square().mean() + 2**-7) if kind == "squarehead" else error)
    known = student.attention_rows or [None] * len(student.attention)
    for s, t, rows in zip(student.attention, teacher.attention, known, strict=True):
        mask = None if rows is None else masks.get(rows.mask)
        counts = torch.ones(t.shape[0], 1, t.shape[2], 1, dtype=torch.bool, device=t.device)
        if mask is not None and mask.shape == (t.shape[0], t.shape[2]):
            counts = mask[:, None, :, None]
        seen = torch.isfinite(t) & counts
        if kind == "tinybert":
            total = total + torch.where(seen, s - t, 0.0).square().sum() / seen.expand_as(s).sum().clamp(min=1)
        else:
            p, log_q = t.softmax(-1), s.log_softmax(-1)
            each = torch.where(seen, p * (t.log_softmax(-1) - log_q), 0.0).sum(-1)
            total = total + each.sum() / counts[..., 0].expand_as(each).sum().clamp(min=1)
    return total


def _known(value: Tensor, mask: Tensor | None) -> Tensor:
    rows = real_rows(value, mask)
    return value if rows is None else rows


def relative_error(student: Any, teacher: Any) -> Tensor:
    """||student - teacher||^2 / ||teacher||^2, the loss for outputs that are not logits (SquareHead's
    normalisation)."""
    return (student.float() - teacher.float()).square().mean() / teacher.float().square().mean().clamp(min=1e-12)
