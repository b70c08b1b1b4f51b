"""What a loss compares: the answer in a model's output, the targets that the labels are to it, and the loss of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseforge_fx.data.reading import IGNORE, Reading
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.padding import MASK
from sparseforge_fx.training.distillation import (
    Distillation,
    Loss,
    RowsLoss,
    logits_loss,
    plain_logits_loss,
    relative_error,
    rows_loss,
)

SPAN_LOGITS = ("start_logits", "end_logits")
HIDDEN = "last_hidden_state"
#: outputs of transformers' models that repeat or precede the answer
BESIDE = ("pooler_output", "hidden_states", "attentions", "encoder_last_hidden_state", "past_key_values")


class Answer(NamedTuple):
    """The tensor that a distillation compares.

    Attributes:
        value: [batch, ...]; the logits of a span are [batch, 2, positions].
        name: what the output calls it; ``tensor`` where it is the output.
        scores: the last dimension are scores of classes, which have a distribution.
    """

    value: Tensor
    name: str
    scores: bool

    @property
    def span(self) -> bool:
        return self.name == SPAN_LOGITS[0]


class Targets(NamedTuple):
    """Labels as a loss takes them. ``kind``: ``classes`` (ids in the rows of the scores, -100 is not scored),
    ``several`` (a share for each class, the shape of the scores) or ``values`` (the shape of the answer)."""

    kind: str
    value: Tensor


@dataclass
class Objective:
    """The loss of a :class:`Distillation` on what a model answers, over rows that are real.

    Scores of classes: cross-entropy with the labels, and ``divergence`` (``kl`` or ``reverse_kl``) from the teacher.
    Several classes at once (float labels of the scores' shape): binary cross-entropy; values: squared error; the
    distance of both is the squared error relative to the teacher's answer. Which of them it is follows transformers'
    rules for its heads (``config.problem_type``, float labels, one logit).

    Attributes:
        weights: what is minimised.
        config: of a transformers model, or None.
        note: takes a sentence about what is given and not used.
    """

    weights: Distillation
    config: Any
    note: Callable[[str], None]
    _compiled: RowsLoss | None = None

    def compile(self, **options: Any) -> None:
        """Run the loss of scores under torch.compile; options are its."""
        # a code object of its own: by it torch.compile counts recompiles, and after eight of them it gives up
        own = FunctionType(rows_loss.__code__.replace(), rows_loss.__globals__)
        self._compiled = torch.compile(own, **options)

    def answer(self, output: Any) -> Answer:
        """``logits``, else the start and end logits of a span, else ``last_hidden_state``, else the first tensor that
        is no loss: a scalar says nothing about the model.

        Raises SparseForgeError where there is none.
        """
        named = _named(output)
        if isinstance(named.get("logits"), Tensor):
            value = named["logits"]
            classes = getattr(self.config, "num_labels", None)
            if value.dim() == 4 and value.shape[1] == classes != value.shape[-1]:
                value = value.movedim(1, -1)  # of an image's pixels
            return Answer(value, "logits", value.dim() > 1 and value.shape[-1] > 1)
        if all(isinstance(named.get(n), Tensor) for n in SPAN_LOGITS):
            return Answer(torch.stack([named[n] for n in SPAN_LOGITS], 1), SPAN_LOGITS[0], True)
        usable = {n: v for n, v in named.items() if _says_something(n, v)}
        if not usable:
            raise SparseForgeError(
                "the model answers with nothing that can be distilled (a loss alone, or no tensor with a row for each "
                "sample): let its forward return the values, too"
            )
        chosen = HIDDEN if HIDDEN in usable else next(iter(usable))
        others = [n for n in usable if n not in (chosen, *BESIDE)]
        if others:
            self.note(f"of the model's outputs {chosen} is distilled; {', '.join(others)} have no part in the loss")
        return Answer(usable[chosen], chosen, False)

    def targets(self, found: Answer, labels: Any) -> Targets | None:
        """What ``labels`` are to an answer; None, and a note, where nothing says it.

        Raises SparseForgeError for a class that the model has no score for.
        """
        if labels is None:
            return None
        value, head = found.value, found.name == "logits"
        if isinstance(labels, Tensor):
            rows = value.shape[:-1]
            if not labels.is_floating_point() and value.dim() > 1 and value.shape[-1] > 1 and found.name != HIDDEN:
                if found.span:
                    labels = labels.clamp(0, value.shape[-1])  # beyond the text: not scored, as in transformers
                    labels = labels.masked_fill(labels == value.shape[-1], IGNORE)
                elif labels.shape == (*rows, 1):
                    labels = labels[..., 0]
                if labels.shape == rows:
                    return Targets("classes", _check_classes(labels.long(), value.shape[-1]))
            regression = getattr(self.config, "problem_type", None) == "regression" or value.shape[-1:] == (1,)
            if head and regression and labels.numel() == value.numel() and labels.shape[0] == value.shape[0]:
                return Targets("values", labels.reshape(value.shape).float())
            if head and labels.is_floating_point() and labels.shape == value.shape:
                return Targets("several", labels)
        told = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        self.note(
            f"labels ({told.removeprefix('torch.')}) are in the batches and not used: nothing says what they are to "
            f"the model's answer {found.name} {list(value.shape)}"
        )
        return None

    def loss(
        self,
        student: Answer,
        teacher: Answer | None,
        reading: Reading,
        *,
        task_alone: bool = False,
        twice: bool = False,
    ) -> Loss | None:
        """The loss of one answer; None if neither labels nor a teacher say anything about it.

        Args:
            task_alone: the task's loss with the weight 1, for evaluation.
            twice: it must be differentiated twice (the fused loss has no second derivative).
        """
        found = self.targets(student, reading.labels)
        if found is None and teacher is None:
            return None
        keep = None if student.span else reading.real_rows(student.value)
        parts = (student.value, teacher and teacher.value, found and found.value)
        value: Any
        labels: Any
        value, taught, labels = (p if p is None or keep is None else p[keep] for p in parts)
        w_task, w_kl = (1.0, 0.0) if task_alone else (self.weights.task, self.weights.kl)
        if student.scores if found is None else found.kind == "classes":
            if student.span:  # a position that is padding cannot be the answer
                value, taught = (_without_padding(t, reading.real.get(MASK)) for t in (value, taught))
            compare = plain_logits_loss if twice else partial(logits_loss, compiled=self._compiled)
            return compare(
                value,
                taught,
                value.new_full(value.shape[:-1], IGNORE, dtype=torch.long) if labels is None else labels,
                w_task=0.0 if labels is None else w_task,
                w_kl=0.0 if taught is None else w_kl,
                divergence=self.weights.divergence,
                temperature=self.weights.temperature,
            )
        distance = value.new_zeros((), dtype=torch.float32) if taught is None else relative_error(value, taught)
        task = torch.zeros_like(distance)
        if found is not None:
            error = F.binary_cross_entropy_with_logits if found.kind == "several" else F.mse_loss
            task = error(value.float(), labels.float())
        return Loss(w_task * task + w_kl * distance, task.detach(), distance.detach())


def drawn_loss(value: Tensor, scores: bool, generator: torch.Generator) -> Tensor:
    """A scalar whose gradient's second moment is the Fisher information of the answers, summed over them: of scores the
    log-likelihood of a class drawn from the model's own distribution, of others the squared error of a row relative to
    its own square."""
    if scores:
        log_p = value.flatten(0, -2).float().log_softmax(-1)
        likely = log_p.detach().exp().to(generator.device)
        drawn = torch.multinomial(likely, 1, generator=generator).to(log_p.device)
        return -log_p.gather(1, drawn).sum()
    rows = value.reshape(-1, value.shape[-1]).float()
    noise = torch.randn(rows.shape, generator=generator, device=generator.device).to(rows.device)
    scale = math.sqrt(2) / rows.detach().norm(dim=1, keepdim=True).clamp(min=1e-12)
    return (rows * noise * scale).sum()


def _named(output: Any) -> dict[str, Any]:
    """An output's tensors by name."""
    if isinstance(output, Tensor):
        return {"tensor": output}
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, tuple | list):
        names = getattr(output, "_fields", None) or [f"item {i}" for i in range(len(output))]
        return dict(zip(names, output, strict=True))
    return dict(vars(output)) if hasattr(output, "__dict__") else {}


def _says_something(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0 and not name.endswith("loss")


def _check_classes(labels: Tensor, classes: int) -> Tensor:
    scored = labels[labels != IGNORE]
    if scored.numel() and not 0 <= int(scored.min()) <= int(scored.max()) < classes:
        raise SparseForgeError(
            f"labels go from {int(scored.min())} to {int(scored.max())} but the model scores {classes} classes: "
            f"give labels from 0 to {classes - 1}, and {IGNORE} where there is none"
        )
    return labels


def _without_padding(span: Tensor | None, real: Tensor | None) -> Any:
    """[batch, 2, positions] with the least score for positions that are padding."""
    if span is None or real is None or real.shape != span[:, 0].shape:
        return span
    return span.masked_fill(~real[:, None], torch.finfo(span.dtype).min / 2)
