"""The training loop: one file, one function to read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from sparseforge_fx.data.batches import count_tokens
from sparseforge_fx.errors import SparseForgeError, one_line
from sparseforge_fx.methods import schedule
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.models.low_rank import Branch
from sparseforge_fx.training import processes
from sparseforge_fx.training.checkpoint import load_state, misfit, save_state
from sparseforge_fx.training.sparse_model import SparseModel


class Batches(Protocol):
    """Data as the loop wants it: the batch of any step, the same every time."""

    def batch(self, step: int) -> Any: ...


class MasterWeights:
    """float32 copies of half-precision parameters for the optimizer: an update of 1e-5 vanishes in a bfloat16
    weight."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        self.masters = [nn.Parameter(p.detach().float()) if p.dtype.itemsize < 4 else p for p in self.parameters]

    @torch.no_grad()
    def take_gradients(self) -> None:
        for p, master in zip(self.parameters, self.masters, strict=True):
            if master is not p:
                master.grad = None if p.grad is None else p.grad.float()

    @torch.no_grad()
    def write_back(self) -> None:
        for p, master in zip(self.parameters, self.masters, strict=True):
            if master is not p:
                p.copy_(master)

    def serve(self, weights: Iterable[MaskedWeight], branches: Iterable[Branch] = ()) -> None:
        """Let a method see and write the masters instead of the rounded weights."""
        master_of = {id(p): m for p, m in zip(self.parameters, self.masters, strict=True)}
        for w in weights:
            w.weight = master_of.get(id(w.weight), w.weight)
        for b in branches:
            b.s = master_of.get(id(b.s), b.s)


def train(
    sparse: SparseModel,
    data: Batches,
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    warmup: float = 0.05,
    lr_floor: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.0,
    clip: float = 1.0,
    accumulate: int = 1,
    state_path: Path | None = None,
    run: Mapping[str, Any] | None = None,
    save_seconds: float = 600.0,
    accelerator: Accelerator | None = None,
    compile: bool | str = "auto",
    show_progress: bool = True,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Run the method's steps with AdamW and return the curves, one dict per step.

    Args:
        parameters: what trains; half-precision ones get float32 masters.
        lr: peak rate; linear warm-up over the share ``warmup`` of the run, cosine to ``lr_floor`` of the peak.
        clip: largest gradient norm over all parameters; 0 for none.
        accumulate: micro-batches per step.
        state_path: the state is saved there every ``save_seconds``, and at once where a layer-wise solution is the
            start, and read from there if it exists: a killed run continues to the same bits on a CPU.
        run: further plain values (weights, data, seed) that a saved state must agree in, beside the arguments here.
        compile: True, False, or "auto": where the run is long enough to win back what compiling costs.

    Raises SparseForgeError at the first loss or gradient that is not finite; the last saved state is then untouched.
    Raises it, with nothing changed, for a saved state that is damaged or another run's.
    """
    accelerator = accelerator or processes.accelerator()
    master = MasterWeights(parameters)
    master.serve(sparse.method.weights, sparse.branches)
    optimizer = sparse.optimizer(master.masters, lr=lr, betas=betas, weight_decay=weight_decay)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])  # a method's own parameters may have a rate of their own
    by_gradient = sparse.method.config.by_gradient
    curves: list[dict[str, float]] = []
    start, steps = 0, sparse.method.steps
    run = {
        **(run or {}), **sparse.losses, "lr": lr, "warmup": warmup, "lr_floor": lr_floor, "betas": list(betas),
        "weight_decay": weight_decay, "clip": clip, "accumulate": accumulate, "processes": accelerator.num_processes,
    }  # fmt: skip
    if state_path is not None and state_path.exists():
        start, curves = _restore(sparse, master, optimizer, load_state(state_path), run)
    elif state_path is not None and sparse.method.config.start != "dense" and accelerator.is_main_process:
        save_state(state_path, _state(sparse, master, optimizer, 0, curves, run))  # a layer-wise start takes long
    sparse.train()
    saved = time.monotonic()
    if compile is True:
        sparse.compile()
    with _progress(show_progress and accelerator.is_main_process) as bar:
        task = bar.add_task("sparsify", total=steps, completed=start, rate="", loss="")
        for step in range(start, steps):
            began = time.monotonic()
            factor = schedule.learning_rate((step + 1) / (steps + 1), warmup, lr_floor)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            parts, tokens = [], 0
            for micro in range(accumulate):
                index = (step * accumulate + micro) * accelerator.num_processes + accelerator.process_index
                batch = send_to_device(
                    data.batch(index),
                    accelerator.device if accelerator.num_processes > 1 else _device(master.parameters),
                )
                with torch.set_grad_enabled(by_gradient):
                    loss = _loss(sparse, batch)
                if not torch.isfinite(loss.total):
                    raise SparseForgeError(
                        f"the loss is {loss.total.item()} at step {step}: "
                        f"lower the learning rate ({lr:g}) or check the data"
                    )
                if by_gradient:
                    (loss.total / accumulate).backward()
                sparse.method.observe(loss.total.detach(), partial(_total, sparse, batch))
                parts.append(loss)
                tokens += count_tokens(batch)
            if accelerator.num_processes > 1:
                counted = accelerator.reduce(torch.tensor(tokens, device=accelerator.device))
                tokens = int(counted.item())  # type: ignore[union-attr]
                for p in master.parameters:
                    if p.grad is not None:
                        p.grad = accelerator.reduce(p.grad, reduction="mean")  # type: ignore[assignment]
            master.take_gradients()
            norm = torch.nn.utils.clip_grad_norm_(master.masters, clip if clip and by_gradient else float("inf"))
            if not torch.isfinite(norm):
                raise SparseForgeError(
                    f"the gradient is not finite at step {step}: lower the learning rate ({lr:g}) or check the data"
                )
            optimizer.step()
            sparse.step()  # before the masters are written back: a method may move weights, too
            master.write_back()
            optimizer.zero_grad()
            for p in master.parameters:
                p.grad = None
            seconds = time.monotonic() - began
            row = {
                "step": step + 1,
                "tokens": (curves[-1]["tokens"] if curves else 0) + tokens,
                "loss": sum(p.total.item() for p in parts) / accumulate,
                "task": sum(p.task.item() for p in parts) / accumulate,
                "kl": sum(p.kl.item() for p in parts) / accumulate,
                "lr": lr * factor,
                "grad_norm": float(norm),
                "seconds": seconds,
                **sparse.method.metrics(),
            }
            curves.append(row)
            bar.update(task, advance=1, rate=f"{tokens / seconds:,.0f} tokens/s", loss=f"loss {row['loss']:.3f}")
            if on_step is not None:
                on_step(step, row)
            if (
                compile == "auto"
                and sparse.features is None
                and step == start + 1
                and worth_compiling(seconds, steps - step - 1)
            ):
                sparse.compile()
            if state_path is not None and accelerator.is_main_process and time.monotonic() - saved > save_seconds:
                save_state(state_path, _state(sparse, master, optimizer, step + 1, curves, run))
                saved = time.monotonic()
    return curves


#: seen on two CPU cores in bf16: compiling saves a sixth of a step, and costs about this many seconds with one block
#: compiled once
COMPILE_SAVES, COMPILE_SECONDS = 1 / 6, 60.0


def worth_compiling(step_seconds: float, steps_left: int) -> bool:
    """Will compiling save more time over the rest of the run than it takes?"""
    return step_seconds * steps_left * COMPILE_SAVES > 2 * COMPILE_SECONDS


def _total(sparse: SparseModel, batch: Any) -> Tensor:
    return _loss(sparse, batch).total


def _loss(sparse: SparseModel, batch: Any):
    try:
        sparse(*(batch if isinstance(batch, tuple | list) else (batch,)))
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, IndexError, RuntimeError) as error:  # a size or a token that the model does not take
        fixed = "".join(f"; {note}" for note in sparse.dense.notes)
        raise SparseForgeError(
            f"the model cannot take the batch of step {sparse.steps_done}: {one_line(error)}{fixed}"
        ) from error
    loss = sparse.last_loss
    if loss is None:
        raise SparseForgeError("there is nothing to learn from: no labels, no logits and w_kl = 0")
    return loss


def _models(sparse: SparseModel, master: MasterWeights) -> list[nn.Parameter]:
    """The masters of the model's parameters; the method's own are in its state."""
    own = {id(p) for p in sparse.method.parameters()}
    return [m for m, p in zip(master.masters, master.parameters, strict=True) if id(p) not in own]


def _state(
    sparse: SparseModel,
    master: MasterWeights,
    optimizer: torch.optim.Optimizer,
    step: int,
    curves: list,
    run: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "run": dict(run),
        "step": step,
        "masters": [m.detach() for m in _models(sparse, master)],
        "masks": {w.fqn: w.mask for w in sparse.method.weights},
        "optimizer": optimizer.state_dict(),
        "method": sparse.method.state(),
        "handed_over": sparse.handed_over,
        "curves": curves,
    }


@torch.no_grad()
def _restore(
    sparse: SparseModel,
    master: MasterWeights,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    run: Mapping[str, Any],
) -> tuple[int, list]:
    """Everything is looked at before anything is written: the first step with a wrong shape may be a crash."""
    mine = _state(sparse, master, optimizer, 0, [], run)
    _refuse(misfit(dict.fromkeys(state), dict.fromkeys(("format", "version", *mine)), "the state"))
    _check_run(state["run"], mine["run"])
    saved, masks = state["masters"], state["masks"]
    if isinstance(saved, list) and isinstance(masks, dict):
        shapes = [getattr(m, "shape", None) for m in saved]
        if shapes != [m.shape for m in mine["masters"]] or set(masks) != set(mine["masks"]):
            raise SparseForgeError(
                "the saved training state belongs to another model or another set of sites, or is damaged; "
                "delete it to start anew"
            )
    for name in ("masters", "masks", "step", "handed_over"):
        _refuse(misfit(state[name], mine[name], name))
    sparse.method.check_state(state["method"])
    _refuse(_wrong_progress(state, sparse.method.steps) or _wrong_optimizer(state["optimizer"], optimizer))
    sparse.method.load_state(state["method"])
    for master_weight, value in zip(_models(sparse, master), saved, strict=True):
        master_weight.copy_(value)
    master.write_back()
    for w in sparse.method.weights:
        w.mask.copy_(masks[w.fqn])
    optimizer.load_state_dict(state["optimizer"])
    sparse.steps_done, sparse.handed_over = state["step"], state["handed_over"]
    return state["step"], list(state["curves"])


def _refuse(wrong: str | None) -> None:
    if wrong is not None:
        raise SparseForgeError(f"the saved training state is damaged ({wrong}); delete it to start anew")


def _check_run(saved: Any, mine: dict[str, Any]) -> None:
    """Raise SparseForgeError, naming what differs, unless the state was saved by a run like this one."""
    if not isinstance(saved, dict):
        _refuse("run is no dictionary")
    named = [f"{k} {v} instead of {saved.get(k)}" for k, v in mine.items() if k not in HASHES and v != saved.get(k)]
    named += [f"other {k}" for k in HASHES if mine.get(k) != saved.get(k)]
    if named:
        raise SparseForgeError(
            f"the saved training state belongs to another run, this one has {', '.join(named)}; "
            "repeat that run's options, or delete the state to start anew"
        )


#: entries of ``run`` that say nothing to a reader but whether they are the same
HASHES = ("weights", "data")


def _wrong_progress(state: dict[str, Any], steps: int) -> str | None:
    """What is wrong with a state's step and curves."""
    step, curves = state["step"], state["curves"]
    if not 0 <= step <= steps:
        return f"step is {step} of {steps}"
    if not isinstance(curves, list) or len(curves) != step:
        return f"curves is no list of {step} steps"
    plain = all(isinstance(row, dict) and all(type(v) in (int, float) for v in row.values()) for row in curves)
    return None if plain else "curves holds something else than numbers"


def _wrong_optimizer(saved: Any, optimizer: torch.optim.Optimizer) -> str | None:
    """What is wrong with an optimizer's state: each tensor must have its parameter's shape, or be a count."""
    mine = optimizer.state_dict()
    groups = [group | {"lr": 0.0} for group in mine["param_groups"]]
    try:
        if [group | {"lr": group["lr"] * 0.0} for group in saved["param_groups"]] != groups or set(saved) != set(mine):
            return "optimizer has other groups"
    except (TypeError, KeyError):
        return "optimizer has no groups"
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    names = {"step", "exp_avg", "exp_avg_sq"} if "betas" in optimizer.defaults else set()
    if not isinstance(saved["state"], dict) or not set(saved["state"]) <= set(parameters):
        return "optimizer is of other parameters"
    for index, entries in saved["state"].items():
        if not isinstance(entries, dict) or set(entries) != names:
            return f"optimizer[{index}] holds other moments"
        for name, value in entries.items():
            wanted = torch.zeros(()) if name == "step" else parameters[index]
            if wrong := misfit(value, wanted, f"optimizer[{index}][{name}]"):
                return wrong
    return None


def _progress(show: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    more = (TextColumn("{task.fields[loss]}"), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    console = Console(stderr=True)  # a bar is no result: a pipe gets none
    return Progress(*columns, *more, console=console, disable=not (show and console.is_terminal), transient=False)


def _device(parameters: list[nn.Parameter]) -> torch.device:
    return parameters[0].device
