"""The Hugging Face Trainer on the same engine: a plain loop's numbers, evaluation, checkpoints, resuming."""

import copy

import pytest
import torch
from tiny_checkpoint import tiny_llama
from transformers import Trainer, TrainingArguments

import sparseforge_fx as sf
from sparseforge_fx.callback import STATE, SparseForgeCallback
from sparseforge_fx.capture import capture
from sparseforge_fx.passes import find_linears
from sparseforge_fx.pattern import check_pattern
from sparseforge_fx.sparse_model import SparseModel

STEPS = 4


@pytest.fixture(scope="module")
def dense():
    return tiny_llama(num_hidden_layers=1)


def prepared(dense, steps=STEPS):
    """A copy of the model under masks, captured with padding."""
    model = copy.deepcopy(dense)
    example = {"input_ids": torch.randint(0, 250, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    program = capture(model, example)
    return model, SparseModel(program, find_linears(program), sf.paper_preset(steps), w_task=1.0, w_kl=1.0)


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


def test_trainer_ends_exactly_two_four_and_logs_the_masks(dense, tmp_path):
    model, sparse = prepared(dense)
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


def test_trainer_with_accumulation_is_the_plain_loop(dense, tmp_path):
    """Two micro-batches of two: the gradient is their mean, the masks move once per optimizer step."""
    model, sparse = prepared(dense)
    run = trainer(sparse, tmp_path, lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0, seed=3)
    order = list(run.get_train_dataloader())
    run.train()
    by_hand, other = prepared(dense)
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


def test_resuming_from_a_trainer_checkpoint_gives_the_same_model(dense, tmp_path):
    whole, sparse = prepared(dense)
    trainer(sparse, tmp_path / "a", save_strategy="steps", save_steps=2).train()
    assert (tmp_path / "a" / "checkpoint-2" / STATE).is_file()
    resumed, again = prepared(dense)
    trainer(again, tmp_path / "a").train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert again.steps_done == STEPS
    for (name, one), two in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_checkpoint_without_masks_is_refused(dense, tmp_path):
    _, sparse = prepared(dense)
    trainer(sparse, tmp_path, save_strategy="steps", save_steps=2).train()
    (tmp_path / "checkpoint-2" / STATE).unlink()
    _, again = prepared(dense)
    with pytest.raises(sf.SparseForgeError, match="without SparseForgeCallback"):
        trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_other_lengths_and_other_models_are_refused(dense, tmp_path):
    _, sparse = prepared(dense, steps=STEPS + 1)
    with pytest.raises(sf.SparseForgeError, match=f"make the config with steps={STEPS}"):
        trainer(sparse, tmp_path).train()
    with pytest.raises(sf.SparseForgeError, match="needs the model that sf"):
        Trainer(dense, arguments(tmp_path), train_dataset=padded_rows(), callbacks=[SparseForgeCallback()]).train()


def test_padding_teaches_nothing(dense):
    """The loss of a padded batch is that of its real tokens: what stands in the padding does not matter."""
    _, sparse = prepared(dense)
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


def test_state_dict_names_a_tied_tensor_once(dense):
    _, sparse = prepared(dense)
    state = sparse.state_dict()
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    _, other = prepared(dense)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(sparse.parameters(), other.parameters(), strict=True))
