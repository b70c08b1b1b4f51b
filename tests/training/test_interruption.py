"""What signals do while a run is under way, and after an error of one of several processes."""

import os
import signal
import time

import pytest

from sparseforge_fx.training import interruption
from sparseforge_fx.training.interruption import Interruption, Stopped


def in_a_process_of_its_own(do) -> tuple[bytes, int]:
    """What it wrote, and how it ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            do(lambda text: os.write(writing, text))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    return said, os.waitpid(child, 0)[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("active", [True, False])
def test_after_an_error_there_is_time_to_say_why(monkeypatch, active, number):
    monkeypatch.setattr(interruption, "GRACE", 0.5)

    def run(say):
        try:
            with Interruption(active=active, patient=True):
                raise RuntimeError
        except RuntimeError:
            os.kill(os.getpid(), number)
            say(b"why")
        time.sleep(20)
        say(b"never")

    said, status = in_a_process_of_its_own(run)
    assert said == b"why" and os.WIFSIGNALED(status) and os.WTERMSIG(status) == number


@pytest.mark.parametrize("patient", [True, False])
def test_without_an_error_signals_do_what_they_did(patient):
    before = signal.getsignal(signal.SIGTERM)
    with Interruption(active=True, patient=patient) as stops:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stops.number == signal.SIGTERM
        if patient:
            os.kill(os.getpid(), signal.SIGINT)  # launchers pass on both
    assert stops.number == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before


def test_one_process_alone_ends_at_once_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), Interruption(active=True, patient=False):
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("patient", [True, False])
def test_where_all_is_saved_the_first_signal_ends_the_run_at_once(number, code, patient):
    with pytest.raises(Stopped) as stopped, Interruption(active=True, patient=patient, at_once=True):
        try:
            os.kill(os.getpid(), number)
            time.sleep(20)
        finally:
            if patient:
                os.kill(os.getpid(), signal.SIGINT)  # launchers pass on both: what is put right is not broken off
    assert stopped.value.exit_code == code
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which takes its time after an error
    signal.signal(signal.SIGINT, signal.default_int_handler)
