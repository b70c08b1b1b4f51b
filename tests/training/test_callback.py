"""The Hugging Face Trainer on the same engine: a plain loop's numbers, evaluation, checkpoints, resuming."""

import functools
import shutil

import pytest
import torch
from captures import capture_alike
from tiny_checkpoint import tiny_llama
from tiny_models import Tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments
from two_processes import run_two

import sparseforge_fx as sf
from sparseforge_fx.pattern import check_pattern
from sparseforge_fx.training.callback import STATE, SparseForgeCallback
from sparseforge_fx.training.distillation import Distillation

STEPS = 4


@functools.cache
def captured(layers, number):
    """A model of weights of its own, captured with padding."""
    model = tiny_llama(num_hidden_layers=layers).eval()
    example = {"input_ids": torch.randint(0, 250, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    first = {name: value.clone() for name, value in model.state_dict().items()}
    return Tiny(model, example, capture_alike(model, example), first)


def prepared(number=0, steps=STEPS, layers=1):
    """The model as new, under masks. ``number``: 1 for a second one beside the first."""
    tiny = captured(layers, number).reset()
    return tiny.model, tiny.sparse(sf.annealed_preset(steps), Distillation(task=1.0, kl=1.0))


def padded_rows(count=16, length=12):
    """Rows of which the last up to three tokens are padding, and their labels."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        ids = torch.randint(0, 250, (length,), generator=generator)
        mask = (torch.arange(length) < length - i % 4).long()
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)})
    return rows


def arguments(folder, **changes):
    options = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
    }
    quiet = {
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
    }
    return TrainingArguments(str(folder), **options | quiet | changes)


def trainer(sparse, folder, **changes):
    rows = padded_rows()
    return Trainer(
        sparse,
        arguments(folder, **changes),
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=[SparseForgeCallback()],
    )


def test_trainer_ends_exactly_two_four_and_logs_the_masks(tmp_path):
    model, sparse = prepared()
    run = trainer(sparse, tmp_path, eval_strategy="steps", eval_steps=2)
    run.train()
    assert sparse.steps_done == STEPS and sparse.method.fixed
    logs = run.state.log_history
    assert [row["loss"] for row in logs if "loss" in row]
    assert len([row for row in logs if "eval_loss" in row]) == 2
    assert sf.finalize(run.model) is model
    for site in sparse.sites:
        if site.reason is None:
            assert check_pattern(model.get_parameter(site.fqn), sparse.method.pattern, site.reduction_dim)


def test_trainer_with_accumulation_is_the_plain_loop(tmp_path):
    """Two micro-batches of two: the gradient is their mean, the masks move once per optimizer step."""
    model, sparse = prepared()
    run = trainer(sparse, tmp_path, lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0, seed=3)
    order = list(run.get_train_dataloader())
    run.train()
    by_hand, other = prepared(1)
    other.train()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(STEPS):
        for batch in order[2 * step : 2 * step + 2]:
            (other(**batch).loss / 2).backward()
        optimizer.step()
        other.step()
        optimizer.zero_grad()
    for (name, one), two in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7, msg=name)
    for one, two in zip(sparse.method.weights, other.method.weights, strict=True):
        assert torch.equal(one.mask, two.mask)


def test_resuming_from_a_trainer_checkpoint_gives_the_same_model(tmp_path):
    whole, sparse = prepared()
    trainer(sparse, tmp_path / "a", save_strategy="steps", save_steps=2).train()
    assert (tmp_path / "a" / "checkpoint-2" / STATE).is_dir()
    resumed, again = prepared(1)
    trainer(again, tmp_path / "a").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert again.steps_done == STEPS
    for (name, one), two in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_checkpoint_without_masks_is_refused(tmp_path):
    _, sparse = prepared()
    trainer(sparse, tmp_path, save_strategy="steps", save_steps=2).train()
    shutil.rmtree(tmp_path / "checkpoint-2" / STATE)
    _, again = prepared(1)
    with pytest.raises(sf.SparseForgeError, match="without SparseForgeCallback"):
        trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_other_lengths_and_other_models_are_refused(tmp_path):
    _, sparse = prepared(steps=STEPS + 1)
    with pytest.raises(sf.SparseForgeError, match=f"make the config with steps={STEPS}"):
        trainer(sparse, tmp_path).train()
    with pytest.raises(sf.SparseForgeError, match="needs the model that sf"):
        Trainer(
            tiny_llama(), arguments(tmp_path), train_dataset=padded_rows(), callbacks=[SparseForgeCallback()]
        ).train()


def test_padding_teaches_nothing():
    """The loss of a padded batch is that of its real tokens: what stands in the padding does not matter."""
    _, sparse = prepared()
    sparse.train()
    with torch.no_grad():
        for p in sparse.parameters():
            p.mul_(0.9)  # away from the teacher
    mask = torch.tensor([[1] * 12, [1] * 7 + [0] * 5])
    ids = torch.randint(0, 250, (2, 12))
    other = torch.where(mask == 1, ids, 7)
    one = sparse(input_ids=ids, attention_mask=mask).loss
    two = sparse(input_ids=other, attention_mask=mask).loss
    torch.testing.assert_close(one, two)
    assert sparse.last_loss.kl > 0


def test_state_dict_names_a_tied_tensor_once():
    _, sparse = prepared()
    state = sparse.state_dict()
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    _, other = prepared(1)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(sparse.parameters(), other.parameters(), strict=True))


# -- the Trainer's arguments -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("argument", "value"),
    [("label_smoothing_factor", 0.1), ("auto_find_batch_size", True), ("load_best_model_at_end", True)],
)
def test_arguments_that_leave_a_part_out_are_refused_at_the_start(tmp_path, argument, value):
    _, sparse = prepared()
    options = {argument: value}
    if argument == "load_best_model_at_end":
        options |= {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    with pytest.raises(sf.SparseForgeError, match=f"leave {argument} at its default"):
        trainer(sparse, tmp_path, **options)


def test_the_trainers_own_loss_shifts_the_labels(tmp_path):
    """Without the callback nothing refuses label smoothing; it is that of the next token then."""
    _, sparse = prepared()
    batch = {"input_ids": torch.randint(0, 250, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    run = Trainer(sparse, arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=padded_rows())
    loss = run.compute_loss(sparse, batch | {"labels": batch["input_ids"]})
    logits = sparse(**batch).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["input_ids"][:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("adds_ours", [False, True], ids=["alone", "beside ours"])
def test_a_loss_of_ones_own_must_hold_the_distillation(tmp_path, adds_ours):
    def own(outputs, labels, num_items_in_batch=None):
        return outputs.logits.float().square().mean() + (outputs.loss if adds_ours else 0)

    _, sparse = prepared()
    before = [p.detach().clone() for p in sparse.parameters()]
    run = Trainer(
        sparse, arguments(tmp_path), train_dataset=padded_rows(), callbacks=[SparseForgeCallback()], compute_loss_func=own
    )  # fmt: skip
    if adds_ours:
        run.train()
        assert sparse.method.fixed
        return
    with pytest.raises(sf.SparseForgeError, match="not the model's, so nothing is distilled"):
        run.train()
    assert all(torch.equal(a, b) for a, b in zip(before, sparse.parameters(), strict=True))


def test_columns_that_the_source_knows_stay_and_others_go(tmp_path):
    _, sparse = prepared()
    rows = [row | {"text": "not for the model"} for row in padded_rows()]
    run = Trainer(
        sparse, arguments(tmp_path, remove_unused_columns=True), train_dataset=rows, callbacks=[SparseForgeCallback()]
    )
    assert set(next(iter(run.get_train_dataloader()))) == {"input_ids", "attention_mask", "labels"}
    run.train()
    assert sparse.method.fixed


class Counting(TorchDispatchMode):
    """Counts the MLPs that are run."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function is torch.ops.aten.silu.default
        return function(*args, **(kwargs or {}))


def test_activation_checkpointing_changes_no_gradient(tmp_path):
    """Blocks run again in the backward pass, and the model learns and is judged as without."""
    gradients, calls = [], []
    for checkpointing in (False, True):
        _, sparse = prepared(layers=2)
        if checkpointing:
            sparse.activation_checkpointing_enable()
        sparse.train()
        row = {k: v[None] for k, v in padded_rows(1)[0].items()}
        with Counting() as counting:
            sparse(**row).loss.backward()
        calls.append(counting.calls)
        gradients.append([p.grad for p in sparse.parameters()] + list(sparse.method.curvature.values.values()))
    assert calls == [2 + 2, 2 + 2 + 2]  # student, teacher; the student's again
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    mlp = sf.prepare(
        torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)), torch.randn(2, 8), sf.annealed_preset(4)
    )
    with pytest.raises(sf.SparseForgeError, match="no repeated blocks"):
        mlp.activation_checkpointing_enable()


def test_neftune_adds_noise_in_training_only(tmp_path):
    _, sparse = prepared()
    row = {k: v[None] for k, v in padded_rows(1)[0].items()}
    quiet = sparse.eval()(**row).logits
    seen = {}

    class Look(SparseForgeCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                with torch.no_grad():
                    model.eval()
                    seen["eval"] = torch.equal(model(**row).logits, model(**row).logits)
                    model.train()
                    seen["train"] = torch.equal(model(**row).logits, model(**row).logits)

    run = Trainer(sparse, arguments(tmp_path, neftune_noise_alpha=5.0), train_dataset=padded_rows(), callbacks=[Look()])
    run.train()
    assert seen == {"eval": True, "train": False}
    assert quiet.shape == sparse.eval()(**row).logits.shape


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True, "neftune_noise_alpha": 5.0},
        {"bf16": True, "optim": "adafactor", "train_sampling_strategy": "group_by_length"},
        {"max_steps": -1, "num_train_epochs": 1, "eval_strategy": "epoch", "prediction_loss_only": True},
    ],
    ids=lambda options: ", ".join(options),
)
def test_usual_arguments(tmp_path, options):
    model, sparse = prepared(layers=2)
    run = trainer(sparse, tmp_path, **options)
    run.train()
    assert sparse.steps_done == STEPS and sparse.method.fixed
    sf.finalize(sparse)
    assert all(
        check_pattern(model.get_parameter(s.fqn), sparse.method.pattern, s.reduction_dim)
        for s in sparse.sites
        if s.reason is None
    )


# -- several processes -----------------------------------------------------------------------------------------------
RANKS = """
import sys, torch
from test_callback import under_the_trainer
torch.set_num_threads(1)
torch.save(under_the_trainer(sys.argv[1], 1), f"{sys.argv[1]}/{sys.argv[2]}.pt")
torch.distributed.destroy_process_group()
"""


def under_the_trainer(folder, rows):
    """Masks and curvature after the first half of a run of ``rows`` rows per process, without an update of weights."""
    torch.manual_seed(0)
    _, sparse = prepared(steps=8)
    options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1, "learning_rate": 0.0}
    options["max_steps"] = 8
    seen = {}

    class Look(SparseForgeCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                seen.update({w.fqn + " mask": w.mask.clone() for w in sparse.method.weights})
                seen.update({name: h.clone() for name, h in sparse.method.curvature.values.items()})

    whole = [
        {"input_ids": row["input_ids"], "attention_mask": torch.ones_like(row["input_ids"])} for row in padded_rows()
    ]
    Trainer(sparse, arguments(folder, **options), train_dataset=whole, callbacks=[Look()]).train()
    return seen


@pytest.mark.slow
def test_masks_follow_the_curvature_of_all_processes(tmp_path):
    """DistributedDataParallel hands rank 0's masks round; they have to be those of all data."""
    first, second = run_two(RANKS, tmp_path)
    assert first and all(torch.equal(first[name], second[name]) for name in first)
    alone = under_the_trainer(tmp_path / "alone", 2)
    for name, one in alone.items():
        scale = one.mean() / first[name].mean()  # of losses that are means over fewer rows
        torch.testing.assert_close(first[name] * scale, one, rtol=0.02, atol=0.01 * one.max().item(), msg=name)
