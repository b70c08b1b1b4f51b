"""SIGTERM and Ctrl-C end a run after the step that is under way, when its state can be saved, or at once, where it is
saved already."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

GRACE = 5.0  # seconds to say why a run has ended, where its launcher wants it to end at once


class Stopped(KeyboardInterrupt):
    """A run was asked to end, and its state is saved. ``exit_code`` is what a shell makes of the signal."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Interruption:
    """While it is entered, the first of the two signals is kept in ``number`` (0: none has come).

    Args:
        active: False: signals do what they always do.
        patient: nor does a second one end the process: launchers pass on what the terminal has sent, too, and kill what
            takes too long. Otherwise the second does what it always does. After an error they take GRACE seconds to end
            the process: a launcher sends one as soon as another process has ended, and why is to be told.
        at_once: the first signal raises Stopped where the process is.
    """

    def __init__(self, active: bool, patient: bool, at_once: bool = False):
        self.number = 0
        self._at_once = at_once
        self._patient = patient
        self._main = threading.current_thread() is threading.main_thread()
        self._active = active and self._main
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if self._active:
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._main and self._patient and error is not None:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, _later)
        else:
            self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.number = not self.number, self.number or number
        if not self._patient:
            self._restore()
        if first and self._at_once:
            raise Stopped(number)


def _later(number: int, frame: FrameType | None) -> None:
    """Let the signal do what it does without us, but not at once."""
    signal.signal(number, signal.SIG_DFL)
    end = threading.Timer(GRACE, os.kill, (os.getpid(), number))
    end.daemon = True
    end.start()
