"""The training loop: one file, one function to read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, send_to_device
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparseforge_fx.data.batches import count_tokens
from sparseforge_fx.errors import SparseForgeError, one_line
from sparseforge_fx.methods import schedule
from sparseforge_fx.progress import counted, shown
from sparseforge_fx.ranges import AtLeastZero, Count, Share, check_numbers
from sparseforge_fx.training import processes
from sparseforge_fx.training.checkpoint import find_state, load_state, save_state
from sparseforge_fx.training.distillation import Loss
from sparseforge_fx.training.interruption import Interruption, Stopped
from sparseforge_fx.training.master_weights import MasterWeights
from sparseforge_fx.training.optimizer import Optimizer, adamw_8bit, check_method, check_optimizer, set_rate
from sparseforge_fx.training.replicas import check_precision, replicated
from sparseforge_fx.training.saved_run import parts, restore, state_of
from sparseforge_fx.training.sparse_model import SparseModel


class Batches(Protocol):
    """Data as the loop wants it: the batch of any step, the same every time."""

    def batch(self, step: int) -> Any: ...


@dataclass(frozen=True)
class Optimization:
    """How weights move.

    Attributes:
        lr: peak rate; linear warm-up over the share ``warmup`` of the run, cosine to ``lr_floor`` of the peak.
        betas, weight_decay: AdamW's.
        clip: largest gradient norm over all parameters; 0 for none.
        accumulate: micro-batches per step.
        optimizer: ``adamw``, or ``adamw8bit``: its moments in 8 bits, for methods without an optimizer of their own.
    """

    lr: AtLeastZero
    warmup: Share = 0.05
    lr_floor: Share = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: AtLeastZero = 0.0
    clip: AtLeastZero = 1.0
    accumulate: Count = 1
    optimizer: Optimizer = "adamw"

    def __post_init__(self) -> None:
        check_numbers(get_type_hints(type(self), include_extras=True), vars(self))
        if not all(0 <= beta < 1 for beta in self.betas):
            raise SparseForgeError(f"betas are {self.betas!r}: give two numbers from 0 to below 1")
        check_optimizer(self.optimizer)


def train(
    sparse: SparseModel,
    data: Batches,
    parameters: Iterable[nn.Parameter],
    optimization: Optimization,
    *,
    state_path: Path | None = None,
    run: Mapping[str, Any] | None = None,
    save_seconds: float = 600.0,
    accelerator: Accelerator | None = None,
    compile: bool | str = "auto",
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Run the method's steps with its optimizer and return the curves, one dict per step.

    Args:
        parameters: what trains; half-precision ones, and those that are rounded, get float32 masters.
        state_path: the state is saved in this folder every ``save_seconds``, after SIGTERM or Ctrl-C, and at once where
            a layer-wise solution is the start, and read from there if there is one: a killed run continues to the same
            bits on a CPU, or on another number of processes.
        run: further plain values (weights, data, seed) that a saved state must agree in, beside the arguments here.
        compile: True, False, or "auto": where the run is long enough to win back what compiling costs.

    Raises SparseForgeError at the first loss or gradient that is not finite; the last saved state is then untouched.
    Raises it, with nothing changed, for a saved state that is damaged or another run's. Raises Stopped, a
    KeyboardInterrupt, where a signal has ended the run.
    """
    loop = _Loop(sparse, data, parameters, optimization, accelerator or processes.accelerator())
    main, steps = loop.accelerator.is_main_process, sparse.method.steps
    told = {**sparse.distillation.describe(), **asdict(optimization)}
    several = loop.accelerator.num_processes > 1
    told |= {"betas": list(optimization.betas)}
    told["micro_batches"] = told.pop("accumulate") * loop.accelerator.num_processes
    told |= {} if loop.accelerator.mixed_precision == "no" else {"precision": loop.accelerator.mixed_precision}
    told |= run or {}

    def save(step: int) -> None:
        if state_path is not None:
            save_state(state_path, step, state_of(sparse, loop.master, loop.optimizer, step, loop.curves, told))

    start = 0
    if state_path is not None and find_state(state_path) is not None:
        mine = (sparse, loop.master, loop.optimizer)
        start, loop.curves = restore(*mine, load_state(state_path, parts(*mine)), told)
    elif sparse.method.config.start != "dense":
        save(0)  # a layer-wise start takes long
    sparse.train()
    saved = time.monotonic()
    if several and sparse.shards is None:  # a start that was computed on unlike machines may differ in its last bits
        broadcast([[w.mask for w in sparse.method.weights], list(sparse.method.held().values())])
    loop.master.write_masked(sparse.settle())
    if compile is True:
        sparse.compile()
    stops = Interruption(active=state_path is not None, patient=several)
    with shown(main), counted("steps", steps, start) as advance, stops:
        for step in range(start, steps):
            row = loop.step(step)
            rate = f"{loop.tokens / row['seconds']:,.0f} tokens/s"
            masks = row.get("mask_distance_from_binary", 0.0)
            advance(f"loss {row['loss']:.3f}", f"masks {masks:.2f} from 0 and 1" if masks else "", rate)
            if on_step is not None:
                on_step(step, row)
            if compile == "auto" and step == start + 1 and sparse.not_compiled() is None:
                (seconds,) = processes.largest(loop.accelerator.device, row["seconds"])  # all decide alike
                if worth_compiling(seconds, steps - step - 1):
                    sparse.compile()
            old = time.monotonic() - saved > save_seconds
            late, signal = processes.largest(loop.accelerator.device, old, stops.number)
            if late or signal:
                save(step + 1)
                saved = time.monotonic()
            if signal:
                raise Stopped(int(signal))
    return loop.curves


class _Loop:
    """What one step needs of the run."""

    def __init__(
        self,
        sparse: SparseModel,
        data: Batches,
        parameters: Iterable[nn.Parameter],
        optimization: Optimization,
        accelerator: Accelerator,
    ):
        self.sparse, self.data, self.how, self.accelerator = sparse, data, optimization, accelerator
        self.master = MasterWeights(parameters, sparse.on_grid)
        self.master.serve(sparse.method.weights, sparse.branches)
        check_precision(accelerator)
        self.learner: nn.Module = _Learner(sparse, nullcontext if sparse.shards is None else accelerator.autocast)
        if sparse.shards is None:
            self.learner = replicated(self.learner, self.master.parameters, accelerator)
        self.optimizer = self._optimizer()
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))  # a method's own parameters may have a rate of their own
        self.curves: list[dict[str, float]] = []
        self.tokens = 0  # of the last step

    def _optimizer(self) -> torch.optim.Optimizer:
        how, sparse = self.how, self.sparse
        options: dict[str, Any] = {"lr": how.lr, "betas": how.betas, "weight_decay": how.weight_decay}
        check_method(how.optimizer, sparse.method.config, type(sparse.method).__name__)
        if how.optimizer == "adamw":
            return sparse.optimizer(self.master.masters, **options)
        return adamw_8bit(self.master.masters, **options)

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step and the masks' step after it; returns the row of the curves, which it also keeps."""
        began, sparse, master, how = time.monotonic(), self.sparse, self.master, self.how
        factor = schedule.learning_rate((step + 1) / (sparse.method.steps + 1), how.warmup, how.lr_floor)
        for group in self.optimizer.param_groups:
            set_rate(group, group["initial_lr"] * factor)
        loss = self._backward(step)
        master.take_gradients()
        clip = how.clip if how.clip and sparse.method.config.by_gradient else float("inf")
        norm = torch.nn.utils.get_total_norm([m.grad for m in master.masters if m.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm):
            raise SparseForgeError(
                f"the gradient is not finite at step {step}: lower the learning rate ({how.lr:g}) or check the data"
            )
        if norm > clip:
            torch.nn.utils.clip_grads_with_norm_(master.masters, clip, norm)
        self.optimizer.step()
        sparse.step()  # before the masters are written back: a method may move weights, too
        master.write_back()
        master.drop_gradients()
        row = {
            "step": step + 1,
            "tokens": (self.curves[-1]["tokens"] if self.curves else 0) + self.tokens,
            **loss,
            "lr": how.lr * factor,
            "grad_norm": float(norm),
            "seconds": time.monotonic() - began,
            **sparse.method.metrics(),
        }
        self.curves.append(row)
        return row

    def _backward(self, step: int) -> dict[str, float]:
        """The losses of the step, means over its micro-batches on all processes; so are the gradients in the
        parameters."""
        sparse, accelerator, count = self.sparse, self.accelerator, self.how.accumulate
        by_gradient = sparse.method.config.by_gradient
        several = accelerator.num_processes > 1
        sums, tokens = [0.0] * len(Loss._fields), 0
        for micro in range(count):
            index = (step * count + micro) * accelerator.num_processes + accelerator.process_index
            device = accelerator.device if several else self.master.parameters[0].device
            batch = send_to_device(self.data.batch(index), device)
            summed = micro == count - 1 or sparse.shards is not None  # parts have no memory for what is not summed
            with nullcontext() if summed else accelerator.no_sync(self.learner), torch.set_grad_enabled(by_gradient):
                loss = self.learner(batch)
                if by_gradient:
                    (loss.total / count).backward()
            sparse.method.observe(loss.total.detach(), partial(self._again, batch))
            sums = [known + part.item() for known, part in zip(sums, loss, strict=True)]
            tokens += count_tokens(batch)
        told = torch.tensor([*(total / count for total in sums), tokens], dtype=torch.float64)
        if several:
            told = accelerator.reduce(told.to(accelerator.device)).cpu()  # type: ignore[union-attr]
            told[:-1] /= accelerator.num_processes
            for p in sparse.method.parameters():  # whose gradients do not come out of the backward pass
                if p.grad is not None:
                    p.grad = accelerator.reduce(p.grad, reduction="mean")  # type: ignore[assignment]
        *losses, self.tokens = [*told[:-1].tolist(), int(told[-1])]
        if not math.isfinite(losses[0]):  # of all processes: each of them ends, and none waits for another
            raise SparseForgeError(
                f"the loss is {losses[0]} at step {step}: lower the learning rate ({self.how.lr:g}) or check the data"
            )
        return dict(zip(("loss", *Loss._fields[1:]), losses, strict=True))

    def _again(self, batch: Any) -> Tensor:
        return self.learner(batch).total


class _Learner(nn.Module):
    """From a batch to its loss, ``under`` which context: of processes that share a model accelerate prepares none."""

    def __init__(self, sparse: SparseModel, under: Callable[[], AbstractContextManager]):
        super().__init__()
        self.sparse, self.under = sparse, under

    def forward(self, batch: Any) -> Loss:
        with self.under():
            return _loss(self.sparse, batch)


#: seen on two CPU cores in bf16: compiling saves a fifth of a step, and costs about this many seconds with one block
#: compiled once
COMPILE_SAVES, COMPILE_SECONDS = 1 / 5, 30.0


def worth_compiling(step_seconds: float, steps_left: int) -> bool:
    """Will compiling save more time over the rest of the run than it takes?"""
    return step_seconds * steps_left * COMPILE_SAVES > 2 * COMPILE_SECONDS


def _loss(sparse: SparseModel, batch: Any) -> Loss:
    try:
        sparse(*(batch if isinstance(batch, tuple | list) else (batch,)))
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, IndexError, RuntimeError) as error:  # a size or a token that the model does not take
        if processes.other_ended(error):
            raise
        fixed = "".join(f"; {note}" for note in sparse.dense.notes)
        raise SparseForgeError(
            f"the model cannot take the batch of step {sparse.steps_done}: {one_line(error)}{fixed}"
        ) from error
    loss = sparse.last_loss
    if loss is None:
        raise SparseForgeError("there is nothing to learn from: no labels, no logits and kl = 0")
    return loss
