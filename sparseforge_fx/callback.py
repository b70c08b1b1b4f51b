"""The same engine under the Hugging Face Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sparseforge_fx.checkpoint import load_state, misfit, save_state
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.sparse_model import SparseModel

STATE = "sparseforge.pt"  # beside the Trainer's own files in checkpoint-N


class SparseForgeCallback(TrainerCallback):
    """Steps the masks of a :class:`SparseModel` that a Trainer trains, and lets it resume from its checkpoints.

    ``Trainer(model=sparse, callbacks=[SparseForgeCallback()])`` with ``sparse = sf.prepare(...)``, then
    ``sf.finalize(sparse)``. The TrainingArguments need ``max_steps`` equal to the ``steps`` of the annealing's config,
    else the masks would stop half-way, and ``remove_unused_columns=False`` for a datasets.Dataset. Temperature, lambda
    and the rest go to the Trainer's log.

    Raises SparseForgeError at the start if the number of steps differs, or if a checkpoint has no state of the masks.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        sparse = _unwrap(model)
        if state.max_steps != sparse.method.steps:
            raise SparseForgeError(
                f"the Trainer runs {state.max_steps} steps but the masks are scheduled over {sparse.method.steps}: "
                f"make the config with steps={state.max_steps}"
            )
        if state.global_step:  # the Trainer has read weights and masks by now
            path = _folder(args, state) / STATE
            if not path.is_file():
                raise SparseForgeError(f"{path} is missing: the checkpoint was written without SparseForgeCallback")
            saved = load_state(path)
            if wrong := misfit(saved, {**saved, **_state(sparse), "method": saved.get("method")}, path.name):
                raise SparseForgeError(f"{path} is damaged ({wrong}): resume from another checkpoint")
            if saved["step"] != state.global_step:
                raise SparseForgeError(f"{path} is of step {saved['step']}, the checkpoint of {state.global_step}")
            sparse.method.load_state(saved["method"])
            sparse.steps_done, sparse.handed_over = saved["step"], saved["handed_over"]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        _unwrap(model).step()

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            save_state(_folder(args, state) / STATE, _state(_unwrap(model)))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if logs is not None and model is not None:
            logs.update(_unwrap(model).method.metrics())


def _state(sparse: SparseModel) -> dict[str, Any]:
    return {"step": sparse.steps_done, "handed_over": sparse.handed_over, "method": sparse.method.state()}


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _unwrap(model: Any) -> SparseModel:
    while not isinstance(model, SparseModel):
        inner = getattr(model, "module", None)
        if inner is None:
            raise SparseForgeError(
                f"SparseForgeCallback needs the model that sf.prepare returned, got {type(model).__name__}"
            )
        model = inner
    return model
