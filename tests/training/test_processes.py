"""Two processes under torchrun: one dies, or all are asked to end, and the run goes on on one and on two."""

import json
import multiprocessing
import os
import random
import signal
import socket
import time

import pytest
import torch
from launched import finish, kill_one, start, wait_for, wait_for_step
from safetensors.torch import load_file
from tiny_checkpoint import write_checkpoint, write_text
from typer.testing import CliRunner

from sparseforge_fx import cli
from sparseforge_fx.cli.run_folder import STATE
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.training import processes

STEPS = 30
SHORT = ["--length", "16", "--batch-size", "2", "--tokens", str(2 * 16 * 2 * STEPS), "--compile", "off", "--save-seconds", "0"]
SHORT += ["--preset", "annealed"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    write_checkpoint(root / "dense", num_hidden_layers=1)
    write_text(root / "train.txt")
    return root


@pytest.fixture(autouse=True)
def cache(home, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(home / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def command(home, out):
    return ["sparsify", str(home / "dense"), "--data", str(home / "train.txt"), "-o", str(out), *SHORT]


@pytest.fixture(scope="module")
def unbroken(home):
    """The run without an accident, on one process, which makes two micro-batches a step of it."""
    result = CliRunner().invoke(cli.app, [*command(home, home / "unbroken"), "--accumulate", "2"])
    assert result.exit_code == 0, result.output
    return home / "unbroken"


def same(one, two, tolerance):
    """Weights, and which of them are zero."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    for name, value in first.items():
        moved = value.count_nonzero() != second[name].count_nonzero() or ((value != 0) != (second[name] != 0)).float().mean() > 1e-2
        assert not moved, name
        kept = (value != 0) & (second[name] != 0)
        torch.testing.assert_close(value[kept], second[name][kept], rtol=0, atol=tolerance)
    curves = [json.loads((folder / "report.json").read_text())["curves"] for folder in (one, two)]
    for row, expected in zip(*curves, strict=True):
        assert row["tokens"] == expected["tokens"] and row["loss"] == pytest.approx(expected["loss"], rel=1e-2, abs=1e-5)
    assert len(curves[0]) == STEPS and curves[0][-1]["tokens"] == 2 * 16 * 2 * STEPS


def resume_on_one(home, out):
    result = CliRunner().invoke(cli.app, [*command(home, out), "--resume"])
    assert result.exit_code == 0, result.output
    notes = json.loads((out / "report.json").read_text())["notes"]
    assert any("goes on on 1 processes, with 2 micro-batches" in note for note in notes), notes


def killed(run, out, step, rank):
    """One process of a run gets SIGKILL after a step: the other ends at once, and says why."""
    wait_for_step(run, out / STATE, step)
    kill_one(run, rank)
    began = time.monotonic()
    code, _, errors = finish(run)
    assert code != 0 and time.monotonic() - began < 60
    assert errors.count("error: another process of this run has ended") == 1, errors
    assert "[rank" not in errors  # no traceback of ours


@pytest.mark.slow
def test_a_run_is_terminated_and_killed_on_two_processes_and_ends_on_one(home, unbroken, tmp_path):
    out = tmp_path / "out"
    seldom = [a if a != "0" else "600" for a in command(home, out)]
    run = start(seldom, home)
    wait_for(run, (out / "training-state.json").exists)
    run.send_signal(signal.SIGTERM)
    code, _, errors = finish(run)
    assert code != 0 and errors.count("interrupted;") == errors.count("go on with the same command and --resume") == 1, errors
    assert len(list((out / STATE).glob("step-*"))) == 1
    killed(start([*command(home, out), "--resume"], home), out, step=8, rank=1)
    assert len(list((out / STATE).glob("step-*"))) == 2
    resume_on_one(home, out)
    same(out, unbroken, 1e-3)


SHARED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.slow
@pytest.mark.parametrize("way", [{}, SHARED], ids=["replicas", "shared"])
def test_twenty_kills_at_random_steps(home, unbroken, tmp_path, way):
    choose = random.Random(len(way))
    code, _, errors = finish(start(command(home, tmp_path / "two"), home, **way))
    assert code == 0, errors
    for kill in range(10):  # of each way
        out = tmp_path / str(kill)
        killed(start(command(home, out), home, **way), out, choose.randrange(1, STEPS - 2), choose.randrange(2))
        if kill % 2:
            resume_on_one(home, out)
            same(out, unbroken, 1e-3)
        else:
            code, _, errors = finish(start([*command(home, out), "--resume"], home, **way))
            assert code == 0, errors
            same(out, tmp_path / "two", 0.0)  # the same bits


def lost_while_the_other_waits(rank, port, said):
    """The first process works alone, and is gone."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group = processes.Processes()
    try:
        with processes.together():
            torch.distributed.barrier()  # both are connected before one is gone
            group.first_does(lambda: os.kill(os.getpid(), signal.SIGKILL))
    except SparseForgeError as error:
        said.put(str(error))


def test_the_first_process_is_gone_while_the_others_wait_for_its_work():
    spawn = multiprocessing.get_context("spawn")
    said = spawn.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [spawn.Process(target=lost_while_the_other_waits, args=(rank, port, said)) for rank in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join(60)
    assert [one.exitcode for one in both] == [-signal.SIGKILL, 0]
    assert said.get().startswith("another process of this run has ended")
