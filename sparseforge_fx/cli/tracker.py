"""``accelerate``'s trackers for a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparseforge_fx.errors import SparseForgeError

LOGS = "logs"


class Tracker:
    """``accelerate``'s trackers, if one is asked for; their files go to ``logs`` in the output folder."""

    def __init__(self, name: str | None, output: Path, run: dict[str, Any]):
        self.folder = output / LOGS
        self.accelerator: Any = None
        if name is None:
            return
        from accelerate.tracking import get_available_trackers

        from sparseforge_fx.training.processes import accelerator

        available = [str(getattr(t, "value", t)) for t in get_available_trackers()]
        if name not in available:
            raise SparseForgeError(
                f"the tracker {name} is not installed; installed are: {', '.join(available) or 'none'}"
            )
        self.accelerator = accelerator(log_with=name, project_dir=str(self.folder))
        self._run = {k: v if isinstance(v, int | float | str) else str(v) for k, v in run.items()}
        self._open = False

    def log(self, row: dict[str, float], step: int) -> None:
        if self.accelerator is not None:
            if not self._open:
                self.accelerator.init_trackers("sparsify", config=self._run)
                self._open = True
            self.accelerator.log(row, step=step)

    def end(self) -> None:
        if self.accelerator is not None and self._open:
            self.accelerator.end_training()
