"""What is told of long work: a bar on a terminal, a line a minute elsewhere, nothing where nobody wants it."""

import re
import subprocess
import sys

import pytest
import torch
from plan_tables import table_of_shares

import sparseforge_fx as sf
from sparseforge_fx import progress
from sparseforge_fx.progress import counted, shown


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def clock(monkeypatch):
    """Lists the times that come; the last stays."""
    times = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: times.pop(0) if len(times) > 1 else times[0])
    return times


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def count(total, done=0, told=(), by=1, parts=3):
    with counted("parts", total, done) as advance:
        for _ in range(parts):
            advance(*told, by=by)


def test_a_terminal_sees_a_bar(terminal, capfd):
    count(10, 4, ["loss 3", "", "fast"])
    out, err = capfd.readouterr()
    assert "7/10" in plain(err) and "loss 3, fast" in plain(err) and not out


def test_a_log_gets_a_line_a_minute_and_no_escapes(clock, capfd):
    clock[:] = [0.0, 59.0, 61.0, 100.0]
    count(12, 2, ["loss 3", ""])
    assert capfd.readouterr() == ("", "parts: 4 of 12, loss 3, 0:04:04 left\n")  # two in 61 seconds, eight to come


def test_what_nobody_can_count_has_no_end(clock, terminal, capfd, monkeypatch):
    count(None, by=1000)
    assert "3000/?" in plain(capfd.readouterr().err)
    monkeypatch.setenv("FORCE_COLOR", "")
    clock[:] = [0.0, 60.0]
    count(None, by=1000, parts=1)
    assert capfd.readouterr().err == "parts: 1,000\n"


def test_what_is_short_says_nothing_in_a_log(capfd):
    count(3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("switches", [[False], [True, False], [False, True]])
def test_silent_inside_of_silence(terminal, capfd, switches):
    def nested(rest):
        if not rest:
            return count(3)
        with shown(rest[0]):
            return nested(rest[1:])

    nested(switches)
    assert capfd.readouterr() == ("", "")
    count(3)
    assert "3/3" in plain(capfd.readouterr().err)


def test_an_error_ends_the_bar(terminal, capfd):
    with pytest.raises(ZeroDivisionError), counted("parts", 3) as advance:
        advance()
        raise ZeroDivisionError
    assert capfd.readouterr().err.endswith("\x1b[?25h")  # the cursor is there again
    count(3)  # and the next one can be drawn
    assert "3/3" in plain(capfd.readouterr().err)


@pytest.fixture
def work(captured_once):
    found = captured_once("llama")
    data = [found.batch(seed) for seed in range(3)]
    return found, data


RUNS = {
    "start and steps": (
        {"steps": 3, "calibration": 4, "compile": False},
        ["layer by layer", "blocks learn", "steps 3/3 loss tokens/s"],
    ),
    "one shot": ({"method": "sparsegpt", "calibration": 4}, ["layer by layer"]),
    "rounded": (
        {"method": "wanda", "calibration": 4, "values": "int8"},
        ["layer by layer", "rounding layer by layer"],
    ),
    "nothing to wait for": ({"method": "magnitude"}, []),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_long_part_of_a_run_is_told(work, terminal, capfd, name):
    found, data = work
    options, parts = RUNS[name]
    data = None if options.get("method") == "magnitude" else data
    sf.sparsify(found.model, data, **options)
    err = plain(capfd.readouterr().err)
    assert all(word in err for part in parts for word in part.split(" ")) and bool(err) == bool(parts), err
    assert err.count("layer by layer") >= sum("layer by layer" in part for part in parts)


def test_a_run_can_be_silent(work, terminal, capfd):
    found, data = work
    sf.sparsify(found.model, data, steps=3, calibration=4, compile=False, show_progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_plan_and_a_score_are_told(work, terminal, capfd):
    found, data = work
    table = table_of_shares(found.program, {"2:4": 0.6})
    sf.plan(found.model, data, formats=["2:4"], table=table, speedup=1.1, calibration=4)
    err = plain(capfd.readouterr().err)
    assert "curvature" in err and "losses of formats" in err
    tokens = torch.arange(3, 60)
    sf.perplexity(found.model, tokens, context=12)
    assert not capfd.readouterr().err
    sf.perplexity(found.model, tokens, context=12, progress=True)
    assert "perplexity" in plain(capfd.readouterr().err)


def test_the_clock_of_a_log_is_real():
    code = "from sparseforge_fx import progress\nprogress.SECONDS = 0.0\n"
    code += "with progress.counted('parts', 2) as advance:\n    advance(); advance('done')\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "" and [line.split(",")[0] for line in done.stderr.splitlines()] == [
        "parts: 1 of 2", "parts: 2 of 2"]  # fmt: skip
