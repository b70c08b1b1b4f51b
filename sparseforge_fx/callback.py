"""The same engine under the Hugging Face Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.prepare import SparseModel


class SparseForgeCallback(TrainerCallback):
    """Steps the masks of a :class:`SparseModel` that a Trainer trains.

    ``Trainer(model=sf.prepare(...), callbacks=[SparseForgeCallback()])``, then ``sf.finalize(trainer.model)``. The config's
    ``steps`` must be the Trainer's ``max_steps``, else the masks would stop half-way; a SparseForgeError says so at the start.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        sparse = _unwrap(model)
        if state.max_steps != sparse.config.steps:
            raise SparseForgeError(
                f"the Trainer runs {state.max_steps} steps but the masks are scheduled over {sparse.config.steps}: make the config with steps={state.max_steps}"
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        _unwrap(model).step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if logs is not None and model is not None:
            logs.update(_unwrap(model).method.metrics())


def _unwrap(model: Any) -> SparseModel:
    while not isinstance(model, SparseModel):
        inner = getattr(model, "module", None)
        if inner is None:
            raise SparseForgeError(f"SparseForgeCallback needs the model that sf.prepare returned, got {type(model).__name__}")
        model = inner
    return model
