"""``--device disk``: the commands on a model whose weights stay on disk."""

import json

import pytest
from tiny_checkpoint import write_checkpoint, write_text
from typer.testing import CliRunner

from sparseforge_fx import cli


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
    ],
)
def test_what_has_no_use_there_is_refused(home, options, told):
    options = ("--method", "wanda", *options) if "--method" not in options else options
    done = run("sparsify", home / "dense", "--data", home / "text.txt", "-o", home / "no", "--device", "disk", *options)
    assert done.exit_code == 2
    assert told in done.output
    assert not (home / "no").exists()
