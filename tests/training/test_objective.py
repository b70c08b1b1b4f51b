"""The answer in an output, what labels are to it, and the loss against transformers' own."""

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

import sparseforge_fx as sf
from sparseforge_fx.data.reading import Reading
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.training.distillation import Distillation
from sparseforge_fx.training.objective import Answer, Objective


def objective(config=None, **changes):
    notes = []
    made = Objective(Distillation(**changes), config=config, note=notes.append)
    return made, notes


def reading(labels=None, real=None):
    return Reading((), {}, {}, labels, {} if real is None else {"attention_mask": real}, "attention_mask")


# -- the answer --------------------------------------------------------------------------------------------------------
def test_the_answer_is_the_tensor_that_matters():
    made, notes = objective()
    a, b, scalar = torch.zeros(1, 3), torch.ones(1, 3), torch.tensor(2.0)
    assert made.answer(CausalLMOutput(loss=scalar, logits=a)).value is a
    assert made.answer(BaseModelOutput(last_hidden_state=a, hidden_states=(b,))).value is a
    assert made.answer(a).value is a
    assert made.answer({"loss": scalar, "logits": a}) == Answer(a, "logits", True)
    assert made.answer((scalar, a)).value is a  # never a loss
    assert made.answer({"my_loss": torch.ones(3), "values": a}).value is a
    assert notes == []
    assert made.answer((None, a, b)).value is a
    assert made.answer({"hidden": a, "other": b}).value is a
    assert len(notes) == 2 and "other" in notes[1]


def test_a_loss_alone_cannot_be_distilled():
    made, _ = objective()
    for output in (torch.tensor(1.0), {"loss": torch.tensor(1.0)}, (torch.tensor(1.0),), {"ids": torch.ones(3).long()}):
        with pytest.raises(SparseForgeError, match="nothing that can be distilled"):
            made.answer(output)


def test_scores_of_pixels_are_in_their_channels():
    made, _ = objective(t.SegformerConfig(num_labels=5))
    assert made.answer(CausalLMOutput(logits=torch.zeros(2, 5, 4, 4))).value.shape == (2, 4, 4, 5)


# -- labels ------------------------------------------------------------------------------------------------------------
HEAD = Answer(torch.zeros(4, 3), "logits", True)
ONE = Answer(torch.zeros(4, 1), "logits", False)


@pytest.mark.parametrize(
    "found, labels, problem, kind",
    [
        (HEAD, torch.arange(4) % 3, None, "classes"),
        (HEAD, torch.arange(4)[:, None] % 3, None, "classes"),
        (HEAD, torch.arange(4).int() % 3, None, "classes"),
        (HEAD, torch.rand(4, 3), None, "several"),
        (HEAD, torch.rand(4, 3), "regression", "values"),
        (ONE, torch.rand(4), None, "values"),
        (ONE, torch.rand(4, 1), None, "values"),
        (HEAD._replace(name="tensor", scores=False), torch.arange(4) % 3, None, "classes"),
        (HEAD, torch.rand(4), None, None),
        (HEAD, torch.zeros(2, 2).long(), None, None),
        (HEAD, [{"boxes": 1}], None, None),
        (HEAD._replace(name="tensor", scores=False), torch.rand(4, 3), None, None),
        (HEAD._replace(name="last_hidden_state", scores=False), torch.arange(4), None, None),
    ],
)
def test_what_labels_are(found, labels, problem, kind):
    made, notes = objective(t.BertConfig(problem_type=problem))
    targets = made.targets(found, labels)
    assert (targets.kind if targets else None) == kind
    assert len(notes) == (kind is None) and all("labels" in n and "not used" in n for n in notes)


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, -1, 2])])
def test_a_class_without_a_score_is_refused(labels):
    with pytest.raises(SparseForgeError, match="scores 3 classes"):
        objective()[0].targets(HEAD, labels)
    assert objective()[0].targets(HEAD, labels.clamp(0, 2) * 0 - 100).kind == "classes"  # -100 is no class


# -- the loss ----------------------------------------------------------------------------------------------------------
def bert(cls, **changes):
    torch.manual_seed(0)
    config = t.BertConfig(
        vocab_size=97, hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2, **changes,
    )  # fmt: skip
    return getattr(t, cls)(config).eval()


Y = torch.arange(4)


@pytest.mark.parametrize(
    "cls, changes, labels",
    [
        ("BertForSequenceClassification", {"num_labels": 4}, {"labels": Y}),
        ("BertForSequenceClassification", {"num_labels": 4}, {"labels": Y[:, None]}),
        ("BertForSequenceClassification", {"num_labels": 4}, {"labels": torch.rand(4, 4)}),
        ("BertForSequenceClassification", {"num_labels": 1}, {"labels": torch.rand(4)}),
        ("BertForTokenClassification", {"num_labels": 4}, {"labels": torch.arange(48).view(4, 12) % 4}),
        ("BertForMaskedLM", {}, {"labels": torch.arange(48).view(4, 12)}),
        ("BertForMultipleChoice", {}, {"labels": Y % 3}),
        ("BertForQuestionAnswering", {}, {"start_positions": Y, "end_positions": Y + 8}),
    ],
)
def test_the_task_is_the_models_own_loss(cls, changes, labels):
    model = bert(cls, **changes)
    shape = (4, 3, 12) if cls == "BertForMultipleChoice" else (4, 12)
    batch = {"input_ids": torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(0))}
    batch |= {"attention_mask": torch.ones_like(batch["input_ids"]), **labels}
    sparse = sf.prepare(model, batch, sf.annealed_preset(4), objective=Distillation(kl=0.0)).train()
    torch.testing.assert_close(sparse(**batch).loss, model(**batch).loss, rtol=1e-5, atol=1e-6)
    assert sparse.reader.notes == []


def test_a_span_does_not_begin_in_padding():
    made, _ = objective(task=0.0)
    real = torch.ones(2, 5, dtype=torch.bool)
    real[:, 3:] = False
    student, teacher = (Answer(torch.randn(2, 2, 5), "start_logits", True) for _ in range(2))
    loss = made.loss(student, teacher, reading(real=real))
    p, q = (a.value[..., :3].log_softmax(-1).flatten(0, 1) for a in (student, teacher))
    torch.testing.assert_close(loss.kl, F.kl_div(p, q, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("scores", [True, False])
def test_padding_has_no_part_in_the_distance(scores):
    made, _ = objective()
    real = torch.tensor([[True, True, False], [True, False, False]])
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    name = "logits" if scores else "last_hidden_state"
    losses = []
    for fill in (0.0, 100.0):
        answers = [Answer(v.masked_fill(~real[..., None], f), name, scores) for v, f in ((student, fill), (teacher, 0))]
        losses.append(made.loss(*answers, reading(real=real)).total)
    assert losses[0] == losses[1] and losses[0] > 0


def test_without_labels_or_teacher_there_is_no_loss():
    made, _ = objective()
    assert made.loss(HEAD, None, reading()) is None
    assert made.loss(HEAD, None, reading(labels=Y % 3)).task > 0
    alone = made.loss(HEAD, HEAD, reading(labels=Y % 3), task_alone=True)
    assert alone.total == alone.task and alone.kl == 0


# -- compiled ----------------------------------------------------------------------------------------------------------
def test_other_numbers_of_rows_compile_once_more_and_other_runs_for_themselves():
    for _ in range(2):
        counter = CompileCounterWithBackend("aot_eager")
        made, _ = objective()
        made.compile(backend=counter)
        for rows in (6, 4, 5, 6):
            student, teacher = (Answer(torch.randn(1, rows, 11), "logits", True) for _ in range(2))
            labels = torch.randint(0, 11, (1, rows))
            compiled = made.loss(student, teacher, reading(labels))
            plain = objective()[0].loss(student, teacher, reading(labels))
            torch.testing.assert_close(compiled.total, plain.total)
        assert 1 <= counter.frame_count <= 2  # one where torch remembers that rows vary
