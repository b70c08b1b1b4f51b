"""``--device disk``: the commands on a model whose weights stay on disk."""

import json
import os
import signal
from types import SimpleNamespace

import psutil
import pytest
import torch
import transformers
from tiny_checkpoint import write_checkpoint, write_text
from two_processes import run_two
from typer.testing import CliRunner

from sparseforge_fx import cli
from sparseforge_fx.cli.on_disk import windows_at_once
from sparseforge_fx.methods.streamed import Streamed
from sparseforge_fx.models.shards import Shards
from sparseforge_fx.models.streamed_forward import StreamedForward


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("disk")
    write_checkpoint(root / "dense", num_hidden_layers=2)
    write_text(root / "text.txt", repeats=4)
    return root


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_sparsify_then_evaluate(home):
    options = ("--data", home / "text.txt", "--length", 16, "--calibration", 4, "--method", "wanda")
    done = run("sparsify", home / "dense", *options, "-o", home / "sparse", "--device", "disk")
    assert done.exit_code == 0, done.output
    assert f"evaluate {home / 'sparse'} --dense {home / 'dense'} --device disk" in done.output.replace("\n", "")
    numbers = {}
    for device in ("disk", "cpu"):
        told = ("--data", home / "text.txt", "--context", 32, "--max-windows", 4, "--device", device)
        done = run("evaluate", home / "sparse", *told, "-o", home / f"{device}.json")
        assert done.exit_code == 0, done.output
        numbers[device] = json.loads((home / f"{device}.json").read_text())
    assert all(row["exact"] for row in numbers["disk"]["linears"] if row["reason"] is None)
    assert numbers["disk"]["linears"] == numbers["cpu"]["linears"]
    found = {device: value["perplexity"]["model"]["nll_per_token"] for device, value in numbers.items()}
    assert found["disk"] == pytest.approx(found["cpu"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--log-with", "tensorboard"), "no use for --log-with"),
        (("--compile", "on"), "no use for --compile"),
        (("--method", "gmp"), "is not trained"),
        (("--activation-bytes", "much"), "--activation-bytes much is no size: write 2GB or 500MB, say"),
        (("--method", "magnitude", "--activation-bytes", "2kB"), "no activations: leave --activation-bytes 2000 out"),
        (("--device", "cpu", "--activation-bytes", "2GB"), "--activation-bytes is for --device disk and a method"),
    ],
)
def test_what_has_no_use_there_is_refused(home, options, told):
    options = ("--method", "wanda", *options) if "--method" not in options else options
    done = run("sparsify", home / "dense", "--data", home / "text.txt", "-o", home / "no", "--device", "disk", *options)
    assert done.exit_code == 2
    assert told in " ".join(done.output.split())
    assert not (home / "no").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_walk_says_what_is_kept_and_how_to_go_on(home, tmp_path, monkeypatch, number, code):
    options = ("--data", home / "text.txt", "--length", 16, "--calibration", 4, "--method", "wanda", "--device", "disk")
    write, count = Shards.write, 0

    def interrupted(self, name, value):
        nonlocal count
        count += 1
        if count == 10:  # in the second block
            os.kill(os.getpid(), number)
        write(self, name, value)

    monkeypatch.setattr(Shards, "write", interrupted)
    done = run("sparsify", home / "dense", *options, "-o", tmp_path / "out")
    told = f"interrupted; {tmp_path}/out.unfinished holds 1 finished block: go on with the same command and --resume"
    assert done.exit_code == code and done.stderr.splitlines()[-1] == told
    monkeypatch.undo()
    done = run("sparsify", home / "dense", *options, "-o", tmp_path / "out", "--resume")
    assert done.exit_code == 0 and os.listdir(tmp_path) == ["out"], done.output


TWO = """
import sys
from pathlib import Path

import torch
from typer.testing import CliRunner

from sparseforge_fx import cli
from sparseforge_fx.training.from_disk import sparsify_on_disk

folder, rank = Path(sys.argv[1]), sys.argv[2]
command = ["sparsify", f"{folder}/dense", "--data", f"{folder}/text.txt", "--length", "16", "--calibration", "4"]
command += ["--method", "wanda", "--device", "disk", "-o", f"{folder}/out"]
done = CliRunner().invoke(cli.app, command)
run = {"method": "wanda", "length": 16, "calibration": 4, "output": folder / "half", "blocks": 1}
report = sparsify_on_disk(folder / "dense", str(folder / "text.txt"), **run)
again = CliRunner().invoke(cli.app, command)
said = [[r.exit_code, r.stdout, r.stderr] for r in (done, again)]
torch.save({"said": said, "density": report["density"]}, folder / f"{rank}.pt")
"""


def test_of_two_processes_the_first_walks(tmp_path):
    write_checkpoint(tmp_path / "dense", num_hidden_layers=2)
    write_text(tmp_path / "text.txt", repeats=4)
    ranks = run_two(TWO, tmp_path)
    assert [[code for code, *_ in rank["said"]] for rank in ranks] == [[0, 2], [0, 2]]
    assert [rank["said"][0][1].count("wrote") for rank in ranks] == [1, 0]
    assert [rank["said"][1][2].count("is not empty") for rank in ranks] == [1, 0]
    assert ranks[0]["density"] == ranks[1]["density"] and len(ranks[1]["density"]) == 7
    assert (tmp_path / "out" / "report.json").is_file() and not (tmp_path / "out.unfinished").exists()


def test_activations_beyond_a_size_go_to_files(home, tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(Streamed, "keep", lambda self, *_: limits.append(self.limit))
    options = ("--data", home / "text.txt", "--length", 16, "--calibration", 4, "--method", "wanda", "--device", "disk")
    done = run("sparsify", home / "dense", *options, "-o", tmp_path / "out", "--activation-bytes", "1.5kB")
    assert done.exit_code == 0 and set(limits) == {1500}, done.output


@pytest.mark.parametrize(
    ("free", "options", "batches"),
    [(1 << 30, (), [4]), (1 << 18, (), [1] * 4), (1 << 30, ("--batch-size", 3), [3, 1])],
)
def test_evaluate_reads_the_checkpoint_as_seldom_as_memory_allows(home, monkeypatch, free, options, batches):
    called, forward = [], StreamedForward.__call__

    def counted(self, input_ids):
        called.append(len(input_ids))
        return forward(self, input_ids)

    monkeypatch.setattr(StreamedForward, "__call__", counted)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    told = ("--data", home / "text.txt", "--context", 32, "--max-windows", 4, "--device", "disk")
    done = run("evaluate", home / "dense", *told, *options)
    assert done.exit_code == 0, done.output
    assert called == batches


@pytest.mark.parametrize(
    "config", [transformers.GPT2Config(), transformers.LlamaConfig(), transformers.MixtralConfig()]
)
def test_the_longer_the_windows_the_fewer_at_once(config, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 36))
    short, long = (windows_at_once(config, torch.bfloat16, context) for context in (512, 1024))
    assert 1 < long <= short / 2 <= long + 1
