"""The same engine under the Hugging Face Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.misfit import misfit
from sparseforge_fx.training.checkpoint import find_state, load_state, save_state
from sparseforge_fx.training.sparse_model import SparseModel

STATE = "sparseforge"  # beside the Trainer's own files in checkpoint-N


class SparseForgeCallback(TrainerCallback):
    """Steps the masks of a :class:`SparseModel` that a Trainer trains, and lets it resume from its checkpoints.

    ``Trainer(model=sparse, callbacks=[SparseForgeCallback()])`` with ``sparse = sf.prepare(...)``, then
    ``sf.finalize(sparse)``. The TrainingArguments need ``max_steps`` equal to the ``steps`` of the annealing's config,
    else the masks would stop half-way. Temperature, lambda and the rest go to the Trainer's log. ``torch_compile``
    compiles the model's graph, ``bf16`` runs it under autocast; gradient checkpointing and NEFTune work where the graph
    shows the blocks and the embeddings.

    Raises SparseForgeError at the start if the number of steps differs, if a checkpoint has no state of the masks, or
    for an argument that would leave out a part of the method; and before the first update if the loss that is trained
    on is not the model's, which holds the distillation.
    """

    def __init__(self) -> None:
        self._own_loss_used = False
        self._hook: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        _unwrap(model)
        _check_arguments(args)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        sparse = _unwrap(model)
        _check_arguments(args)
        if sparse.method.config.own_optimizer and not sparse.optimized:
            raise SparseForgeError(
                f"part of {type(sparse.method).__name__} is in its optimizer: "
                "pass Trainer(optimizers=(sparse.optimizer(lr=...), None))"
            )
        if state.max_steps != sparse.method.steps:
            raise SparseForgeError(
                f"the Trainer runs {state.max_steps} steps but the masks are scheduled over {sparse.method.steps}: "
                f"make the config with steps={state.max_steps}"
            )
        if state.global_step:  # the Trainer has read weights and masks by now
            path = _folder(args, state) / STATE
            if find_state(path) is None:
                raise SparseForgeError(f"{path} is missing: the checkpoint was written without SparseForgeCallback")
            saved = load_state(path)
            if wrong := misfit(saved, {**saved, **_state(sparse), "method": saved.get("method")}, path.name):
                raise SparseForgeError(f"{path} is damaged ({wrong}): resume from another checkpoint")
            if saved["step"] != state.global_step:
                raise SparseForgeError(f"{path} is of step {saved['step']}, the checkpoint of {state.global_step}")
            sparse.method.load_state(saved["method"])
            sparse.steps_done, sparse.handed_over = saved["step"], saved["handed_over"]
        if args.torch_compile:
            sparse.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self._hook = sparse.register_forward_hook(self._watch)

    def _watch(self, sparse: SparseModel, args: Any, output: Any) -> None:
        if sparse.training and sparse.last_loss is not None and sparse.last_loss.total.requires_grad:
            sparse.last_loss.total.register_hook(self._used)

    def _used(self, gradient: Any) -> None:
        self._own_loss_used = True

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        sparse = _unwrap(model)
        distils = sparse.distillation.kl or sparse.distillation.features is not None
        if distils and not self._own_loss_used:
            raise SparseForgeError(
                "the Trainer's loss is not the model's, so nothing is distilled from the dense model: add outputs.loss "
                "to it (compute_loss_func, compute_loss), or prepare the model with objective=Distillation(kl=0)"
            )
        self._own_loss_used = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hook is not None:
            self._hook.remove()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        _unwrap(model).step()

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            sparse = _unwrap(model)
            save_state(_folder(args, state) / STATE, sparse.steps_done, _state(sparse), alone=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if logs is not None and model is not None:
            logs.update(_unwrap(model).method.metrics())


def _state(sparse: SparseModel) -> dict[str, Any]:
    return {"step": sparse.steps_done, "handed_over": sparse.handed_over, "method": sparse.method.state()}


def _check_arguments(args: Any) -> None:
    """Raise a SparseForgeError for what would silently leave out a part of the method."""
    refused = {
        "label_smoothing_factor": "it takes the labels from the model, whose loss holds the distillation",
        "fp16": "a step whose scaled gradients overflow would still move the masks; take bf16",
        "deepspeed": "its engine keeps weights and gradients where masks and curvature do not see them",
        "fsdp": "it cuts the weights up, and with them the groups that the masks are chosen in",
        "auto_find_batch_size": "a run that starts again has masks that have moved; set the batch size",
        "use_liger_kernel": "it replaces modules, and the graph is captured already; apply it before sf.prepare",
        "load_best_model_at_end": "a checkpoint before the last has masks that are not final",
    }
    for name, reason in refused.items():
        if getattr(args, name, None):
            raise SparseForgeError(f"leave {name} at its default: {reason}")


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _unwrap(model: Any) -> SparseModel:
    while not isinstance(model, SparseModel):
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if inner is None:
            raise SparseForgeError(
                f"SparseForgeCallback needs the model that sf.prepare returned, got {type(model).__name__}"
            )
        model = inner
    return model
