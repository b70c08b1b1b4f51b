"""What a run under way keeps in its output folder, and whether a run may go on, begin or write there."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseforge_fx.cli.tracker import LOGS
from sparseforge_fx.errors import SparseForgeError

STATE, STATE_OF = "training-state", "training-state.json"
STARTS = (f"{STATE}-start", f"{STATE}-start.unfinished")  # of a model that stays on disk (training/shared_start.py)


class RunFolder:
    """An output folder: ``state`` is the training state, ``started`` says which run it belongs to."""

    def __init__(self, output: Path):
        self.output, self.state, self.started = output, output / STATE, output / STATE_OF

    def check(self, recipe: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Is the output folder free, or the run in it this one? Raises SparseForgeError where neither is so."""
        from sparseforge_fx.files import check_output, finish_replacement

        if resume and overwrite:
            raise SparseForgeError("--resume goes on with a run and --overwrite forgets it: give one of the two")
        finish_replacement(self.output)
        if resume and self.started.is_file():
            self._compare(recipe)
        inside = {entry.name for entry in self.output.iterdir()} if self.output.is_dir() else set()
        unfinished = bool(inside & {name + end for name in (STATE, STATE_OF) for end in ("", ".partial")})
        unfinished |= bool(inside & set(STARTS))
        if unfinished and not (resume or overwrite):
            raise SparseForgeError(
                f"{self.output} holds a run that was not finished: give --resume to go on with it or --overwrite to "
                "start anew"
            )
        if resume and not unfinished and "config.json" in inside:
            raise SparseForgeError(f"the run in {self.output} is finished: there is nothing to resume")
        unfinished |= resume and inside <= {LOGS}
        check_output(self.output, overwrite=overwrite or unfinished)
        if resume and not self.goes_on():
            print(f"nothing was saved in {self.output} yet: starting anew", file=sys.stderr)

    def _compare(self, recipe: dict[str, Any]) -> None:
        try:
            before = dict(json.loads(self.started.read_text())["recipe"])
        except (ValueError, TypeError, KeyError) as error:
            raise SparseForgeError(f"{self.started} cannot be read ({error}): start anew with --overwrite") from error
        different = [k for k in recipe if before.get(k) != recipe[k]]
        if different:
            told = "; ".join(f"{k} was {before.get(k)!r} and is now {recipe[k]!r}" for k in different)
            raise SparseForgeError(
                f"the run in {self.output} is another one ({told}): repeat its options, or start anew with --overwrite"
            )

    def begun(self, resume: bool) -> dict[str, Any]:
        """What :meth:`begin` wrote, of the run to go on with; empty where there is none."""
        return json.loads(self.started.read_text()) if resume and self.started.is_file() else {}

    def begin(self, recipe: dict[str, Any], compute_dtype: dict[str, Any]) -> None:
        """From the first step on, and not before, there is something to resume."""
        from sparseforge_fx.report import write_json

        write_json(self.started, {"recipe": recipe, "compute_dtype": compute_dtype})

    def saved(self) -> bool:
        """Is there a state to go on from?"""
        from sparseforge_fx.training.checkpoint import find_state

        return find_state(self.state) is not None

    def goes_on(self) -> bool:
        """Is there a state, or a start that was begun?"""
        return self.saved() or any((self.output / name).exists() for name in STARTS)

    def forget(self) -> None:
        for name in (STATE, *STARTS):
            shutil.rmtree(self.output / name, ignore_errors=True)
        self.started.unlink(missing_ok=True)

    def telling(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """``run``, whose interruption names the way to resume it."""

        def running(*args: Any, **options: Any) -> Any:
            try:
                return run(*args, **options)
            except KeyboardInterrupt as error:
                if self.goes_on():
                    error.add_note(f"go on with the same command and --resume, {self.output} holds the run")
                else:
                    error.add_note("nothing was saved yet: the same command begins again")
                raise

        return running
