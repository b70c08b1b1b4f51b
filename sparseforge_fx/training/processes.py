"""Several processes, as torchrun or ``accelerate launch`` start them: one writes, the others wait for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list


def accelerator(**options: Any) -> Accelerator:
    """accelerate's view of the processes; without a GPU it has to be told that they are several."""
    return Accelerator(cpu=_on_cpus(), **options)


def _on_cpus() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available()


class Processes:
    """``first``: is this the one that writes?"""

    def __init__(self) -> None:
        self._state = PartialState(cpu=_on_cpus())
        self.first = self._state.is_main_process

    def first_does(self, work: Callable[[], None]) -> None:
        """Let the first process work while the others wait. What goes wrong is raised there, and ends the others with
        exit code 2 and no word: it is said once."""
        failure: Exception | None = None
        if self.first:
            try:
                work()
            except Exception as error:
                failure = error
        if self._state.num_processes > 1:
            failed = broadcast_object_list([failure is not None])[0]
            if failed and not self.first:
                raise SystemExit(2)
        if failure is not None:
            raise failure
