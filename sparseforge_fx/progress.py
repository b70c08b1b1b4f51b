"""How far a long piece of work is, on standard error: a bar on a terminal, a line a minute in a log or a notebook."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: between two lines where there is no terminal; what is over before that says nothing there
SECONDS = 60.0
_shown: ContextVar[bool] = ContextVar("shown", default=True)


@contextmanager
def shown(show: bool) -> Iterator[None]:
    """Whether what is counted inside is told of; inside of what is silent everything is."""
    token = _shown.set(show and _shown.get())
    try:
        yield
    finally:
        _shown.reset(token)


@contextmanager
def counted(what: str, total: int | None, done: int = 0) -> Iterator[Callable[..., None]]:
    """Gives a function to call after each of ``total`` parts, with texts to tell beside the count; ``by=`` how many
    parts at once.

    done: parts that an earlier run has done.
    """
    console = Console(stderr=True)
    if not _shown.get():
        yield lambda *told, by=1: None
    elif console.is_terminal:
        told = TextColumn("{task.fields[told]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), told, TimeRemainingColumn())
        # parts may take a minute each: what is left is judged by many of them
        with Progress(*columns, console=console, speed_estimate_period=1800) as bar:
            task = bar.add_task(what, total=total, completed=done, told="")
            yield lambda *told, by=1: bar.update(task, advance=by, told=_joined(told))
    else:
        yield _Lines(what, total, done)


class _Lines:
    """Where nothing can be drawn over."""

    def __init__(self, what: str, total: int | None, done: int):
        self.what, self.total, self.done, self.first = what, total, done, done
        self.began = self.said = time.monotonic()

    def __call__(self, *told: str, by: int = 1) -> None:
        self.done += by
        now = time.monotonic()
        if now - self.said < SECONDS:
            return
        self.said = now
        count = f"{self.what}: {self.done:,}"
        if self.total is not None:
            seconds = (now - self.began) / (self.done - self.first) * (self.total - self.done)
            count += f" of {self.total:,}"
            told = (*told, f"{timedelta(seconds=round(seconds))} left")
        print(_joined((count, *told)), file=sys.stderr, flush=True)


def _joined(told: Sequence[str]) -> str:
    return ", ".join(filter(None, told))
