"""Several processes, as torchrun or ``accelerate launch`` start them: one writes, the others wait for it; what one of
them knows all know; none waits for one that has ended."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.curvature import processes


def accelerator(**options: Any) -> Accelerator:
    """accelerate's view of the processes; without a GPU it has to be told that they are several."""
    return Accelerator(cpu=_on_cpus(), **options)


def unheard(accelerator: Accelerator) -> list[str]:
    """A sentence for what an accelerator was told and a run does not ask it."""
    told = {}
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        told[f"gradient_accumulation_steps={steps}"] = "accumulate= says how many micro-batches a step has"
    if (backend := accelerator.state.dynamo_plugin.backend.value) != "NO" and accelerator.num_processes == 1:
        told[f"the dynamo backend {backend.lower()}"] = "compile= says whether the run is compiled"
    return [f"{name} of the accelerator is given and not used: {why}" for name, why in told.items()]


def _on_cpus() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()


def largest(device: torch.device, *values: float) -> list[float]:
    """Of each value the largest that any process gives, in the same order."""
    if processes() == 1:
        return list(values)
    found = torch.tensor(values, dtype=torch.float32, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


#: what gloo and NCCL say where another process is gone
_GONE = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out", re.IGNORECASE)


def other_ended(error: BaseException) -> bool:
    """Does an error say that another process of the group is gone?"""
    if processes() == 1 or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistNetworkError) or bool(_GONE.search(str(error)))


@contextmanager
def together() -> Iterator[None]:
    """Raises SparseForgeError where another process has ended, instead of what the library of collectives says."""
    try:
        yield
    except RuntimeError as error:
        if not other_ended(error):
            raise
        raise SparseForgeError(
            "another process of this run has ended, so this one does, too: see what that one said, and go on from the "
            "last saved state"
        ) from error


def first_to_say() -> bool:
    """Is this the first process of the group that has something to say at its end? One message is enough."""
    if processes() == 1:
        return True
    try:
        return dist.distributed_c10d._get_default_store().add("sparseforge-said", 1) == 1
    except RuntimeError:  # the process that kept the store is the one that is gone
        return dist.get_rank() == 1


class Processes:
    """``first``: is this the one that writes? ``several``: are there others? ``count``: how many are there?"""

    def __init__(self) -> None:
        self._state = PartialState(cpu=_on_cpus())
        self.first = self._state.is_main_process
        self.count = self._state.num_processes
        self.several = self.count > 1

    def first_does(self, work: Callable[[], None]) -> None:
        """Let the first process work while the others wait, as long as it takes (a collective would lose patience).
        What goes wrong is raised there, and ends the others with exit code 2 and no word: it is said once."""
        if not self.several:
            work()
            return
        store, name = dist.distributed_c10d._get_default_store(), f"sparseforge-first-{next(_TURNS)}"
        if self.first:
            outcome = "failed"
            try:
                work()
                outcome = "done"
            finally:
                store.set(name, outcome)
            return
        while not store.check([name]):
            time.sleep(WAIT)
        if store.get(name) != b"done":
            raise SystemExit(2)


_TURNS = itertools.count()  # the same in all processes
WAIT = 0.1  # seconds between two looks
