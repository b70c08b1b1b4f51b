"""The command line: what it writes, what it prints, and one sentence with exit code 2 for bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import write_checkpoint, write_text
from typer.testing import CliRunner

from sparseforge_fx import cli, models
from sparseforge_fx.cli.sparsify import STATE, STATE_OF, parse_tokens
from sparseforge_fx.errors import SparseForgeError

SHORT = [
    "--length",
    "16",
    "--batch-size",
    "2",
    "--tokens",
    "96",
    "--calibration",
    "4",
    "--compile",
    "off",
]  # three steps


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model and texts, and a cache folder of their own."""
    root = tmp_path_factory.mktemp("cli")
    write_checkpoint(root / "dense", num_hidden_layers=1)
    write_text(root / "train.txt")
    write_text(root / "test.txt", repeats=6)
    return root


@pytest.fixture(autouse=True)
def cache(home, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(home / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def ok(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def sparse(home):
    """A finished run, which several tests read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HOME", str(home / "cache"))
        ok("sparsify", home / "dense", "--data", home / "train.txt", "-o", home / "sparse", *SHORT)
    return home / "sparse"


# -- the good ways ---------------------------------------------------------------------------------------------------
def test_help_does_not_wait_for_torch():
    code = "import sys\nfrom sparseforge_fx import cli\nprint('torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_sparsify_writes_a_plain_checkpoint_a_report_and_curves(sparse):
    names = set(os.listdir(sparse))
    assert {"config.json", "model.safetensors", "tokenizer.json", "report.json", "curves.png"} <= names
    assert STATE not in names and STATE_OF not in names
    assert not [n for n in os.listdir(sparse.parent) if n.startswith(".")]  # nothing half-written beside it
    report = json.loads((sparse / "report.json").read_text())
    assert report["method"] == "sparseforge" and report["tokens"] == 96 and len(report["curves"]) == 3
    assert report["command"]["tokens"] == "96" and report["seed"] == 0
    assert len(report["sites"]) == 7 and all(s["reason"] for s in report["skipped"])
    model, _ = models.load_model(sparse)
    for site in report["sites"]:
        groups = model.get_parameter(site["name"]).reshape(-1, 4)
        assert int((groups != 0).sum(1).max()) <= 2
    assert "sparsity" not in (sparse / "config.json").read_text()


def test_magnitude_needs_no_data(home, tmp_path):
    assert "magnitude" in ok("sparsify", home / "dense", "--output", tmp_path / "out")
    assert not (tmp_path / "out" / "curves.png").exists()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["method"] == "magnitude"


def test_options_reach_the_run(home, tmp_path):
    options = [
        "--preset",
        "paper",
        "--curvature",
        "activation",
        "--set",
        "structure=0.25",
        "--set",
        "score=ratio",
        "--exclude",
        "*.mlp.*",
    ]
    options += ["--pattern", "1:4", "--seed", "3", "--dtype", "bfloat16", "--lr", "1e-4"]
    ok("sparsify", home / "dense", "--data", home / "train.txt", "-o", tmp_path / "out", *SHORT, *options)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    config = report["config"]
    assert (config["curvature"], config["structure"], config["score"]) == ("activation", 0.25, "ratio")
    assert report["preset"] == "paper" and report["pattern"] == "1:4" and report["seed"] == 3 and report["lr"] == 1e-4
    assert len(report["sites"]) == 4 and {"excluded by name"} < {s["reason"] for s in report["skipped"]}
    assert models.load_model(tmp_path / "out")[0].dtype == torch.bfloat16


def test_overwrite_replaces_the_folder(home, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    ok("sparsify", home / "dense", "-o", out, "--overwrite")
    assert not (out / "old").exists() and (out / "config.json").exists()


def test_lower_measures_and_decides_again_from_its_table(home, tmp_path, monkeypatch):
    from sparseforge_fx.deploy import cost

    def measure(shape, tokens, *_):
        ratio = 2.0 if shape.out_features > shape.in_features else 0.5
        return {"rows": {t: cost.Timing(shape, "rows", t, 10 * ratio, (1.0, 1.0), 10.0, (1.0, 1.0)) for t in tokens}}

    monkeypatch.setattr(cost, "measure", measure)
    ok("sparsify", home / "dense", "--method", "magnitude", "-o", tmp_path / "sparse")
    first = ok("lower", tmp_path / "sparse", "--batch", "1", "--device", "cpu", "-o", tmp_path / "table.json")
    assert "2 packed" in first and "gate: slower than dense at 1 tokens (0.50x)" in " ".join(first.split())
    monkeypatch.setattr(cost, "measure", None)
    again = ok("lower", tmp_path / "sparse", "--batch", "1", "--device", "cpu", "--table", tmp_path / "table.json")
    assert again == first.replace(f"wrote {tmp_path / 'table.json'}\n", "")
    bad = run("lower", tmp_path / "sparse", "--batch", "0", "-o", tmp_path / "none.json")
    assert bad.exit_code == 2 and "token counts" in bad.stderr and not (tmp_path / "none.json").exists()
    bad = run("lower", home / "dense", "--batch", "1", "--device", "cpu", "-o", tmp_path / "none.json")
    assert bad.exit_code == 2 and "nothing to lower" in bad.stderr and not (tmp_path / "none.json").exists()


def test_inspect_needs_no_weights_and_sums_up_the_layers(home, tmp_path):
    config = json.loads((home / "dense" / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = ok("inspect", tmp_path, "--include", "*_proj", "--exclude", "*.o_proj")
    assert "18 eligible linears" in text and "model.layers.*.mlp.up_proj.weight" in text and "layers.2" not in text
    assert "excluded by name" in text and "embed_tokens" in text


def test_inspect_counts_bytes(home):
    found = json.loads(ok("inspect", home / "dense", "--json"))
    sites, everything = found["site_parameters"], found["parameters"]
    assert sites == sum(s["out"] * s["in"] for s in found["sites"]) and found["bytes_dense_bf16"] == 2 * everything
    assert found["bytes_sparse_bf16"] == 2 * (everything - sites) + 2 * sites * 9 / 16
    loaded = json.loads(ok("inspect", home / "dense", "--json", "--weights"))
    assert loaded["sites"] == found["sites"] and loaded["skipped"] == found["skipped"]


def test_evaluate_puts_dense_beside_sparse(home, sparse, tmp_path):
    options = ["--data", home / "test.txt", "--context", "32", "--max-windows", "5"]
    text = ok("evaluate", sparse, "--dense", home / "dense", *options, "--json", tmp_path / "numbers.json")
    assert "7 of 7 eligible linears are exactly 2:4" in text and "155" in text  # 5 * 31 tokens scored
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["perplexity"]["model"]["tokens_scored"] == numbers["perplexity"]["dense"]["tokens_scored"] == 155
    rows = {r["name"]: r for r in numbers["linears"]}
    assert sum(r["exact"] for r in rows.values()) == 7
    assert all(r["zeros"] == pytest.approx(0.5) for r in rows.values() if r["exact"])
    head = [r for r in rows.values() if not r["exact"]]
    assert len(head) == 1 and head[0]["reason"]


def test_evaluate_of_a_dense_model_says_so(home):
    text = ok("evaluate", home / "dense", "--data", home / "test.txt", "--context", "32", "--max-windows", "1")
    assert "0 of 7 eligible linears are exactly 2:4" in text and "0.0%" in text


def test_report_prints_the_summary(sparse):
    for where in (sparse, sparse / "report.json"):
        text = ok("report", where)
        assert "sparseforge tuned" in text and "7 linears" in text and "96 in 3 steps" in text


@pytest.mark.parametrize(
    ("text", "count"), [("1", 1), ("500k", 500_000), ("20M", 20_000_000), ("1.5B", 1_500_000_000), (" 2m ", 2_000_000)]
)
def test_token_counts(text, count):
    assert parse_tokens(text) == count


@pytest.mark.parametrize("text", ["", "0", "20X", "M", "-5", "1e6", "1.5.2k", "٣x"])
def test_bad_token_counts(text):
    with pytest.raises(SparseForgeError, match="not a number of tokens"):
        parse_tokens(text)


# -- bad input: one sentence, exit code 2, nothing written -----------------------------------------------------------
def refused(home, out, *arguments, says):
    before = sorted(os.listdir(out)) if out.exists() else None
    siblings = sorted(os.listdir(out.parent))
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    assert result.stdout == ""
    assert (sorted(os.listdir(out)) if out.exists() else None) == before
    assert sorted(os.listdir(out.parent)) == siblings


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("no/such/model", [], "there is no model folder or file no/such/model"),
        ("{home}/empty", [], "no config.json"),
        ("{home}/dense", ["--data", "{home}/none.txt"], "there is no file or folder"),
        ("{home}/dense", ["--data", "{home}/empty.txt"], "holds no text"),
        ("{home}/dense", ["--data", "{home}/short.txt", "--length", "64"], "fewer than one sequence"),
        ("{home}/dense", ["--data", "{home}/train.txt", "--method", "magic"], "unknown method 'magic'"),
        ("{home}/dense", ["--data", "{home}/train.txt", "--preset", "best"], "unknown preset 'best'"),
        ("{home}/dense", ["--method", "sparsegpt"], "needs data"),
        ("{home}/dense", ["--pattern", "4:2"], "is not N:M"),
        ("{home}/dense", ["--data", "{home}/train.txt", "--tokens", "20X"], "is not a number of tokens"),
        ("{home}/dense", ["--data", "{home}/train.txt", "--tokens", "10"], "less than one step of 32 tokens"),
        ("{home}/dense", ["--include", "*.nothing"], "nothing to prune"),
        ("{home}/nan", ["--data", "{home}/train.txt"], "holds NaN or infinite values"),
        ("{home}/dense", ["--data", "{home}/train.txt", "--set", "heat=1"], "write NAME=VALUE"),
        ("{home}/dense", ["--data", "{home}/train.txt", "--set", "score=best"], "the value must be one of"),
        (
            "{home}/dense",
            ["--data", "{home}/train.txt", "--method", "sparsegpt", "--set", "bits=four"],
            "must be of type int",
        ),
        ("{home}/dense", ["--data", "{home}/train.txt", "--method", "sparsegpt", "--set", "bits=1"], "from 2 up to 8"),
        ("{home}/dense", ["--data", "{home}/train.txt", "--method", "ast", "--preset", "tuned"], "unknown preset"),
        ("{home}/dense", ["--data", "{home}/train.txt", "--method", "maskllm", "--pattern", "50%"], "take N:M"),
        ("{home}/dense", ["--pattern", "100%"], "is not N:M"),
        ("{home}/dense", ["--data", "{home}/train.txt", "--curvature", "guess"], "unknown curvature"),
        ("{home}/dense", ["--dtype", "int8"], "unknown dtype"),
        ("{home}/dense", ["--device", "tpu9"], "cannot be used here"),
        ("{home}/dense", ["--data", "{home}/train.txt", "--log-with", "nothing"], "is not installed"),
        ("{home}/dense", ["--resume", "--overwrite"], "give one of the two"),
    ],
)
def test_bad_input_of_sparsify(home, tmp_path, model, options, says):
    (home / "empty").mkdir(exist_ok=True)
    (home / "empty.txt").write_text("")
    (home / "short.txt").write_text("too short")
    if "nan" in model and not (home / "nan").exists():
        write_checkpoint(home / "nan", num_hidden_layers=1)
        state = load_file(home / "nan" / "model.safetensors")
        state["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
        save_file(state, home / "nan" / "model.safetensors", metadata={"format": "pt"})
    short = [
        x for x in SHORT if not ({"--length", "--tokens"} & {*options} and x in ("--length", "16", "--tokens", "96"))
    ]
    short += ["--length", "16"] if "--tokens" in options else []
    filled = [o.format(home=home) for o in options]
    out = tmp_path / "out"
    refused(home, out, "sparsify", model.format(home=home), "--output", out, *short, *filled, says=says)


def test_an_output_folder_with_something_in_it(home, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    refused(home, out, "sparsify", home / "dense", "-o", out, says="is not empty")
    refused(home, out, "sparsify", home / "dense", "-o", out / "precious", says="is a file")
    assert (out / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect", "{home}/none/x/y"], "there is no model folder"),
        (["inspect", "{home}/dense", "--pattern", "many"], "is not N:M"),
        (["evaluate", "{home}/dense", "--data", "{home}/none.txt"], "there is no file or folder"),
        (
            ["evaluate", "{home}/dense", "--data", "{home}/test.txt", "--context", "4096"],
            "exceeds the model's 128 positions",
        ),
        (["report", "{home}/dense"], "there is no report.json"),
        (["report", "{home}/dense/config.json"], "is not a report"),
        (["report", "{home}/train.txt"], "is not json"),
    ],
)
def test_bad_input_of_the_other_commands(home, arguments, says):
    refused(home, home / "dense", *(a.format(home=home) for a in arguments), says=says)


# -- killed and resumed ----------------------------------------------------------------------------------------------
KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from huggingface_hub import constants
constants.HF_HOME = sys.argv.pop(1)
steps = int(sys.argv.pop(1))
import sparseforge_fx.train as train
real = train.save_state
def save(path, state):
    real(path, state)
    if state["step"] == steps:
        os.kill(os.getpid(), signal.SIGKILL)
train.save_state = save
from sparseforge_fx import cli
cli.main()
"""


@pytest.fixture(scope="module")
def stopped(home):
    """The folder of a run that got SIGKILL right after its state of step 2 was saved."""
    out = home / "stopped"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(home / "cache"), "2", *command(home, out)], capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return out


def command(home, out):
    return [
        "sparsify",
        str(home / "dense"),
        "--data",
        str(home / "train.txt"),
        "-o",
        str(out),
        *SHORT,
        "--save-seconds",
        "0",
    ]


def test_a_killed_run_resumes_to_the_same_weights(home, stopped, sparse, tmp_path):
    out = shutil.copytree(stopped, tmp_path / "out")
    arguments = command(home, out)
    assert sorted(os.listdir(out)) == [STATE_OF, STATE]
    refused(home, out, *arguments, says="was not finished: give --resume")
    refused(home, out, *arguments, "--resume", "--lr", "1e-3", says="lr was 0.0005 and is now 0.001")
    elsewhere = ["other" if a == str(home / "dense") else a for a in arguments]
    refused(home, out, *elsewhere, "--resume", says="model was")
    ok(*arguments, "--resume")
    assert STATE not in os.listdir(out) and (out / "config.json").exists()
    report = json.loads((out / "report.json").read_text())
    assert [row["step"] for row in report["curves"]] == [1, 2, 3]
    unbroken, resumed = load_file(sparse / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(unbroken[k], resumed[k]) for k in unbroken)
    refused(home, out, *arguments, "--resume", says="is finished")


def test_a_training_state_of_another_model(home, stopped, tmp_path):
    """The options are the same, the folder behind the model's name is not."""
    out = shutil.copytree(stopped, tmp_path / "out")
    moved = write_checkpoint(tmp_path / "model", num_hidden_layers=1, hidden_size=16)
    arguments = [str(moved) if a == str(home / "dense") else a for a in command(home, out)]
    started = json.loads((out / STATE_OF).read_text()) | {"model": str(moved)}
    (out / STATE_OF).write_text(json.dumps(started))
    refused(home, out, *arguments, "--resume", says="belongs to another model")


def test_a_broken_training_state(home, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["sparsify", home / "dense", "--data", home / "train.txt", "-o", out, *SHORT]
    (out / STATE_OF).write_text("{")
    refused(home, out, *arguments, "--resume", says="cannot be read")


def test_interrupting_is_no_traceback(monkeypatch, home, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load_model", interrupt)
    result = run("sparsify", home / "dense", "-o", tmp_path / "out")
    assert result.exit_code == 130 and result.stderr.strip() == "interrupted"
