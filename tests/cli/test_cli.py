"""The command line: what it writes, what it prints, and one sentence with exit code 2 for bad input."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings

import fresh
import preloaded
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import tiny_llama, write_checkpoint, write_gguf, write_text
from typer.testing import CliRunner

from sparseforge_fx import cli
from sparseforge_fx.cli import opened
from sparseforge_fx.cli.app import quiet
from sparseforge_fx.cli.evaluate import _read_tasks, _read_windows
from sparseforge_fx.cli.run_folder import STATE, STATE_OF
from sparseforge_fx.deploy.checkpoints.save import save_packed
from sparseforge_fx.errors import SparseForgeError, SparseForgeWarning
from sparseforge_fx.models import dense as models
from sparseforge_fx.training import train
from sparseforge_fx.training.recipe import parse_tokens

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


EVERY_VERB = """
import sys
from sparseforge_fx import cli
home = sys.argv[1]
for line in (
    "inspect {home}/dense",
    "sparsify {home}/dense --method magnitude -o {home}/quiet",
    "sparsify {home}/dense --data {home}/train.txt -o {home}/trained --length 16 --batch-size 2 --tokens 32 --calibration 4",
    "evaluate {home}/quiet --dense {home}/dense --data {home}/test.txt --context 32 --max-windows 2",
    "lower {home}/quiet --tokens 1 --device cpu",
    "generate {home}/quiet -p The --max-new-tokens 2",
    "report {home}/quiet",
    "export {home}/quiet -o {home}/quiet_packed --format safetensors",
    "inspect {home}/tiny.gguf",
    "evaluate {home}/tiny.gguf --data {home}/test.txt --context 32 --max-windows 2",
):
    print("==", line)
    cli.app(line.format(home=home).split(), standalone_mode=False)
import logging, torchao
print("level", logging.getLogger("torchao").level)
"""


@pytest.mark.slow
def test_every_verb_prints_our_words_only(home, tmp_path):
    pytest.importorskip("torchao")
    write_gguf(home / "tiny.gguf", tiny_llama())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(home / "cache")}
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", EVERY_VERB, str(home)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stderr.splitlines() if not line.startswith("note: ")] == []
    assert done.stdout.count("== ") == 10 and done.stdout.endswith("level 0\n")  # torchao is heard again


def test_only_our_warnings_are_heard(capsys):
    before = logging.root.manager.disable
    with quiet():
        warnings.warn("theirs", stacklevel=1)
        warnings.warn("theirs", DeprecationWarning, stacklevel=1)
        logging.getLogger("theirs").warning("theirs")
        warnings.warn("ours", SparseForgeWarning, stacklevel=1)
    assert capsys.readouterr().err == "note: ours\n"
    assert logging.root.manager.disable == before


def test_sparsify_writes_a_plain_checkpoint_a_report_and_curves(sparse):
    names = set(os.listdir(sparse))
    assert {"config.json", "model.safetensors", "tokenizer.json", "report.json", "report.html"} <= names
    assert STATE not in names and STATE_OF not in names
    assert not [n for n in os.listdir(sparse.parent) if n.startswith(".")]  # nothing half-written beside it
    report = json.loads((sparse / "report.json").read_text())
    assert report["method"] == "sparseforge" and report["tokens"] == 96 and len(report["curves"]) == 3
    assert report["recipe"]["tokens"] == 96 and report["seed"] == 0
    assert len(report["sites"]) == 7 and all(s["reason"] for s in report["skipped"])
    model, _ = models.load_dense(sparse)
    for site in report["sites"]:
        groups = model.get_parameter(site["name"]).reshape(-1, 4)
        assert int((groups != 0).sum(1).max()) <= 2
    assert "sparsity" not in (sparse / "config.json").read_text()


def test_magnitude_needs_no_data(home, tmp_path):
    assert "magnitude" in ok("sparsify", home / "dense", "--output", tmp_path / "out")
    assert "This method does not train" in (tmp_path / "out" / "report.html").read_text()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["method"] == "magnitude" and not any("is given and not used" in note for note in report["notes"])


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
    assert report["compute_dtype"] == {"dtype": "bfloat16", "checkpoint": "float32", "seconds_per_step": {}}
    assert models.load_dense(tmp_path / "out")[0].dtype == torch.float32, "the checkpoint keeps its own dtype"


def test_overwrite_replaces_the_folder(home, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    ok("sparsify", home / "dense", "-o", out, "--overwrite")
    assert not (out / "old").exists() and (out / "config.json").exists()


def test_lower_measures_and_decides_again_from_its_table(home, tmp_path, monkeypatch):
    from sparseforge_fx.deploy.lowering import cost, cost_table

    def measure(shapes, tokens, *_):
        (shape,) = shapes
        ratio = 2.0 if shape.out_features > shape.in_features else 0.5
        rows = {t: cost_table.Timing(shape, "rows", t, 10 * ratio, (1.0, 1.0), 10.0, (1.0, 1.0)) for t in tokens}
        return {shape: {"rows": rows}}

    monkeypatch.setattr(cost, "measure", measure)
    ok("sparsify", home / "dense", "--method", "magnitude", "-o", tmp_path / "sparse")
    first = ok("lower", tmp_path / "sparse", "--tokens", "1", "--device", "cpu", "-o", tmp_path / "table.json")
    assert "2 packed" in first and "gate: slower than dense at 1 tokens (0.50x)" in " ".join(first.split())
    monkeypatch.setattr(cost, "measure", None)
    again = ok("lower", tmp_path / "sparse", "--tokens", "1", "--device", "cpu", "--table", tmp_path / "table.json")
    assert again == first.replace(f"wrote {tmp_path / 'table.json'}\n", "")
    bad = run("lower", tmp_path / "sparse", "--tokens", "0", "-o", tmp_path / "none.json")
    assert bad.exit_code == 2 and "token counts" in bad.stderr and not (tmp_path / "none.json").exists()
    bad = run("lower", home / "dense", "--tokens", "1", "--device", "cpu", "-o", tmp_path / "none.json")
    assert bad.exit_code == 2 and "nothing to lower" in bad.stderr and not (tmp_path / "none.json").exists()


def test_inspect_needs_no_weights_and_sums_up_the_layers(home, tmp_path):
    config = json.loads((home / "dense" / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = ok("inspect", tmp_path, "--include", "*_proj", "--exclude", "*.o_proj")
    assert "time and memory of a run on this machine: sparseforge-fx sparsify" in text and "--dry-run" in text
    assert "18 eligible linears" in text and "model.layers.*.mlp.up_proj.weight" in text and "layers.2" not in text
    assert "excluded by name" in text and "embed_tokens" in text


def test_inspect_begins_to_answer_before_it_imports_what_takes_seconds(home):
    said = fresh.run(
        """
from typer.testing import CliRunner
from sparseforge_fx import cli
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in ("transformers", "accelerate", "sparseforge_fx.graph"):
            raise SystemExit(f"imports {name}")
sys.meta_path.insert(0, Blocked())
print(CliRunner().invoke(cli.app, ["inspect", sys.argv[1]]).output)
""",
        home / "dense",
    )
    assert "LlamaForCausalLM; reading its shapes" in said and "imports " in said and "parameters" not in said


def test_inspect_counts_bytes(home):
    found = json.loads(ok("inspect", home / "dense", "--json"))
    sites, everything = found["site_parameters"], found["parameters"]
    assert sites == sum(s["out"] * s["in"] for s in found["sites"]) and found["bytes_dense_bf16"] == 2 * everything
    assert found["bytes_sparse_bf16"] == 2 * (everything - sites) + 2 * sites * 9 / 16
    loaded = json.loads(ok("inspect", home / "dense", "--json", "--weights"))
    assert loaded["sites"] == found["sites"] and loaded["skipped"] == found["skipped"]


def test_inspect_of_a_gguf_file_reads_its_header_only(home, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("weights or tokenizer")

    monkeypatch.setattr("gguf.dequantize", never)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", never)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", never)
    model = tiny_llama()
    write_gguf(tmp_path / "tiny.gguf", model)
    found = json.loads(ok("inspect", tmp_path / "tiny.gguf", "--json"))
    model.save_pretrained(tmp_path / "same")
    same = json.loads(ok("inspect", tmp_path / "same", "--json"))
    for part in ("sites", "skipped", "parameters", "bytes_dense_bf16", "bytes_sparse_bf16"):
        assert found[part] == same[part], part
    assert found["parameters"] == sum(p.numel() for p in model.parameters())  # the embedding counts once


def test_evaluate_puts_dense_beside_sparse(home, sparse, tmp_path):
    options = ["--data", home / "test.txt", "--context", "32", "--max-windows", "5"]
    text = ok("evaluate", sparse, "--dense", home / "dense", *options, "-o", tmp_path / "numbers.json")
    assert "7 of 7 eligible linears are exactly 2:4" in text and "155" in text  # 5 * 31 tokens scored
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["perplexity"]["model"]["tokens_scored"] == numbers["perplexity"]["dense"]["tokens_scored"] == 155
    rows = {r["name"]: r for r in numbers["linears"]}
    assert sum(r["exact"] for r in rows.values()) == 7
    assert all(r["zeros"] == pytest.approx(0.5) for r in rows.values() if r["exact"])
    head = [r for r in rows.values() if not r["exact"]]
    assert len(head) == 1 and head[0]["reason"]


def test_evaluate_names_what_of_the_data_it_does_not_read(home, tmp_path):
    row = {"text": (home / "test.txt").read_text(), "title": "a"}
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text(json.dumps(row))
    (tmp_path / "text" / "b.pdf").write_text("no text")
    options = ["--data", tmp_path / "text", "--context", "32", "--max-windows", "1", "-o", tmp_path / "numbers.json"]
    said = " ".join(ok("evaluate", home / "dense", *options).split())
    notes = json.loads((tmp_path / "numbers.json").read_text())["notes"]
    assert len(notes) == 2 and notes[0].endswith("no text: b.pdf") and notes[1].endswith("not from title")
    assert notes[1] in said


def test_evaluate_of_a_dense_model_says_so(home):
    text = ok("evaluate", home / "dense", "--data", home / "test.txt", "--context", "32", "--max-windows", "1")
    assert "0 of 7 eligible linears are exactly 2:4" in text and "0.0%" in text


def test_evaluate_measures_packed_weights_as_it_does_dense_ones(home, sparse, tmp_path):
    models_of = {"dense": sparse, "packed": tmp_path / "packed"}
    save_packed(*models.load_dense(sparse), tmp_path / "packed")
    numbers = {}
    for kind, folder in models_of.items():
        options = ["--data", home / "test.txt", "--context", "32:16", "--max-windows", "3", "-o", tmp_path / "n.json"]
        assert "7 of 7 eligible linears are exactly 2:4" in ok("evaluate", folder, *options)
        numbers[kind] = json.loads((tmp_path / "n.json").read_text())["perplexity"]["model"]
        assert (numbers[kind]["context"], numbers[kind]["stride"], numbers[kind]["windows"]) == (32, 16, 3)
        del numbers[kind]["seconds"]
    assert numbers["dense"] == numbers["packed"]


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (("--context", "many"), "write 1024 or 1024:512, say"),
        (("--context", "32:"), "write 1024 or 1024:512, say"),
        (("--context", "0"), "write 1024 or 1024:512, say"),
        (("--context", "32:0"), "write 1024 or 1024:512, say"),
        (("--tasks", "all:"), "write all:200, say"),
        (("--tasks", "all:0"), "write all:200, say"),
        (("--tasks", ":200"), "names no task before its colon"),
    ],
)
def test_evaluate_says_how_its_options_are_written(home, option, says):
    result = run("evaluate", home / "dense", "--data", home / "test.txt", *option)
    assert result.exit_code == 2 and says in result.stderr


def test_parts_of_the_options_of_evaluate():
    assert [_read_windows(t) for t in ("", "64", ":8", "64:8")] == [(None, None), (64, None), (None, 8), (64, 8)]
    assert _read_tasks("") == ((), None) and _read_tasks("rte, boolq:20") == (("rte", "boolq"), 20)
    assert len(_read_tasks("all:5")[0]) == 7


def test_packed_weights_are_refused_where_dense_ones_are_needed(home, sparse, tmp_path):
    save_packed(*models.load_dense(sparse), tmp_path / "packed")
    for arguments in (
        ["sparsify", tmp_path / "packed", "-o", tmp_path / "out"],
        ["inspect", tmp_path / "packed", "--weights"],
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and "are packed, and must be dense here: load it with sf.load" in result.stderr


def test_report_prints_the_summary(sparse):
    for where in (sparse, sparse / "report.json"):
        text = ok("report", where)
        assert "sparseforge alps+kd" in text and "7 linears" in text and "96 in 3 steps" in text


def test_report_sums_up_the_experts(tmp_path):
    report = {"method": "wanda", "sites": [], "skipped": [], "pattern": "2:4"}
    report["experts"] = {"up": {"tokens": [1200, 7, 40], "error": [0.1, 0.2, 0.3], "by_magnitude": [1]}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    text = " ".join(ok("report", tmp_path).replace("│", " ").split())
    assert "experts 3, each saw 7 to 1,200 tokens, 1 too few: judged by magnitude" in text


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
        ("{home}/dense", ["--data", "{home}/train.txt", "--tokens", "10"], "less than one step of 32"),
        ("{home}/dense", ["--include", "*.nothing"], "nothing to prune"),
        ("{home}/nan", ["--data", "{home}/train.txt"], "holds NaN or infinite values"),
        ("{home}/dense", ["--data", "{home}/train.txt", "--set", "heat=1"], "write NAME=VALUE"),
        ("{home}/dense", ["--data", "{home}/train.txt", "--set", "score=best"], "the value must be one of"),
        (
            "{home}/dense",
            ["--data", "{home}/train.txt", "--method", "alps", "--set", "iterations=four"],
            "must be of type int",
        ),
        (
            "{home}/dense",
            ["--data", "{home}/train.txt", "--method", "sparsegpt", "--set", "values=int3"],
            "must be one of float, int8",
        ),
        ("{home}/dense", ["--data", "{home}/train.txt", "--method", "ast", "--preset", "alps+kd"], "unknown preset"),
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


@pytest.mark.parametrize(
    ("entry", "value"),
    [("method", 3), ("sites", None), ("skipped", "x"), ("skipped", [{}]), ("density", []), ("curves", [{"loss": 1}]),
     ("tokens", "many"), ("lr", []), ("seconds", None), ("versions", []), ("recipe", 1), ("notes", 1)],
)  # fmt: skip
def test_a_damaged_report(sparse, tmp_path, entry, value):
    report = json.loads((sparse / "report.json").read_text()) | {entry: value}
    (tmp_path / "report.json").write_text(json.dumps(report))
    refused(tmp_path, tmp_path, "report", str(tmp_path), says="not a whole report")


# -- the dtype of the computation ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def half(home):
    """The model in bfloat16."""
    model, tokenizer = models.load_dense(home / "dense", dtype="bfloat16")
    models.write_checkpoint(model, tokenizer, home / "half")
    return home / "half"


def slow_halves(dtypes):
    return {str(d)[6:]: 9.0 if d == torch.bfloat16 else 1.0 for d in dtypes}


def never_timed(dtypes):
    raise AssertionError(f"{dtypes} were timed")


def test_slow_halves_are_trained_and_evaluated_in_float32_and_saved_as_they_were(half, home, tmp_path, monkeypatch):
    monkeypatch.setattr("sparseforge_fx.models.compute_dtype.time_steps", slow_halves)
    out = tmp_path / "out"
    said = " ".join(ok("sparsify", half, "--data", home / "train.txt", "-o", out, *SHORT).split())
    sentence = (
        "computed in float32, which is 9.0 times as fast on this processor; the checkpoint's own dtype is bfloat16"
    )
    report = json.loads((out / "report.json").read_text())
    assert sentence in report["notes"] and sentence[:30] in said
    assert report["compute_dtype"]["seconds_per_step"] == {"bfloat16": 9.0, "float32": 1.0}
    saved = load_file(out / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    for site in report["sites"]:
        assert int((saved[site["name"]].reshape(-1, 4) != 0).sum(1).max()) <= 2

    options = ("--data", home / "test.txt", "--context", "32", "-o", tmp_path / "out.json")
    assert sentence in " ".join(ok("evaluate", out, "--dense", half, *options).split())
    measured = json.loads((tmp_path / "out.json").read_text())
    ok("evaluate", out, "--dense", half, *options, "--dtype", "float32")
    wanted = json.loads((tmp_path / "out.json").read_text())
    for role in ("dense", "model"):
        assert measured["perplexity"][role]["perplexity"] == pytest.approx(wanted["perplexity"][role]["perplexity"])
    assert "7 of 7 eligible linears are exactly 2:4" in ok("evaluate", out, *options)


def test_a_resumed_run_computes_in_the_dtype_in_which_it_began(half, home, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left")

    arguments = ("sparsify", half, "--data", home / "train.txt", "-o", tmp_path / "out", *SHORT, "--save-seconds", "0")
    with monkeypatch.context() as patch:
        patch.setattr("sparseforge_fx.models.compute_dtype.time_steps", slow_halves)
        patch.setattr("sparseforge_fx.training.sparsify.write_checkpoint", full_disk)
        assert run(*arguments).exit_code == 2
    monkeypatch.setattr("sparseforge_fx.models.compute_dtype.time_steps", never_timed)
    ok(*arguments, "--resume")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["compute_dtype"]["dtype"] == "float32"


# -- recipes ---------------------------------------------------------------------------------------------------------
def test_a_run_is_repeated_from_its_folder(home, sparse, tmp_path):
    ok("sparsify", "--config", sparse, "-o", tmp_path / "again", "--compile", "off")
    one, two = (load_file(folder / "model.safetensors") for folder in (sparse, tmp_path / "again"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert (sparse / "recipe.yaml").read_text() == (tmp_path / "again" / "recipe.yaml").read_text()


def test_options_go_before_the_recipe(home, sparse, tmp_path):
    (tmp_path / "run.yaml").write_text(f"model: {home / 'dense'}\nmethod: wanda\ndata: {home / 'train.txt'}\nseed: 3\n")
    options = ("--method", "sparsegpt", "--set", "damping=0.5", "--calibration", "4", "--length", "16")
    ok("sparsify", "--config", tmp_path / "run.yaml", "-o", tmp_path / "out", *options)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["method"], report["seed"], report["config"]["damping"]) == ("sparsegpt", 3, 0.5)
    assert "damping: 0.5" in (tmp_path / "out" / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("data: self", "there is no model: name a folder"),
        ("model: {home}/dense\nlearning_rate: 1", "no entry learning_rate"),
        ("model: {home}/dense\nmethod: ast", "method ast needs data"),
        ("model: {home}/dense\ndata: {home}/train.txt\ntokens: 96", "less than one sequence"),
        ("model: {home}/dense\ndata: {home}/train.txt\ntokens: 130", "less than one step of 512"),
        ("model: {home}/dense\ndata: {home}/train.txt\ntokens: 96\nlength: 32", "less than one step of 128"),
        (None, "there is no recipe"),
    ],
)
def test_bad_recipes(home, tmp_path, recipe, says):
    if recipe is not None:
        (tmp_path / "run.yaml").write_text(recipe.format(home=home))
    refused(home, tmp_path / "out", "sparsify", "--config", tmp_path / "run.yaml", "-o", tmp_path / "out", says=says)


# -- killed and resumed ----------------------------------------------------------------------------------------------
def killed_at_step(steps):
    real = train.save_state

    def save(path, step, state):
        real(path, step, state)
        if step == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    train.save_state = save


@pytest.fixture(scope="module")
def stopped(home):
    """The folder of a run that got SIGKILL right after its state of step 2 was saved."""
    out = home / "stopped"
    assert preloaded.run(killed_at_step, 2, home / "cache", command(home, out)) == -signal.SIGKILL
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
    assert sorted(os.listdir(out)) == [STATE, STATE_OF]
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
    started = json.loads((out / STATE_OF).read_text())
    started["recipe"]["model"] = str(moved)
    (out / STATE_OF).write_text(json.dumps(started))
    refused(home, out, *arguments, "--resume", says="has other weights")


def test_a_broken_training_state(home, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    arguments = ["sparsify", home / "dense", "--data", home / "train.txt", "-o", out, *SHORT]
    (out / STATE_OF).write_text("{")
    refused(home, out, *arguments, "--resume", says="cannot be read")


def test_interrupting_is_no_traceback(monkeypatch, home, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(opened, "load_dense", interrupt)
    result = run("sparsify", home / "dense", "-o", tmp_path / "out")
    assert result.exit_code == 130 and result.stderr.strip() == "interrupted; nothing was written"


# -- before anything was saved, and by several processes -------------------------------------------------------------
@pytest.mark.parametrize("left", ["no folder", "empty", "options", "half a state", "logs"])
def test_resuming_before_the_first_saved_state_starts_anew(home, sparse, tmp_path, left):
    """What a kill can leave before there is a state."""
    out = tmp_path / "out"
    if left != "no folder":
        out.mkdir()
    if left == "options":
        recipe = json.loads((sparse / "report.json").read_text())["recipe"]
        (out / STATE_OF).write_text(json.dumps({"recipe": recipe}))
    elif left == "half a state":
        (out / STATE / ".step-00000001.partial").mkdir(parents=True)
    elif left == "logs":
        (out / "logs").mkdir()
    arguments = [a for a in command(home, out) if a not in ("--save-seconds", "0")]
    if left in ("options", "half a state"):
        refused(home, out, *arguments, says="was not finished: give --resume")
    result = run(*arguments, "--resume")
    assert result.exit_code == 0, result.output
    assert f"nothing was saved in {out} yet: starting anew" in " ".join(result.stderr.split())
    one, two = (load_file(folder / "model.safetensors") for folder in (sparse, out))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_resuming_a_state_whose_options_were_not_written_yet(home, stopped, sparse, tmp_path):
    """A layer-wise start is saved before the first step, and the options after it."""
    out = shutil.copytree(stopped, tmp_path / "out")
    (out / STATE_OF).unlink()
    arguments = command(home, out)
    refused(home, out, *arguments, says="was not finished: give --resume")
    refused(home, out, *arguments, "--resume", "--lr", "1e-3", says="lr 0.001 instead of 0.0005")
    ok(*arguments, "--resume")
    one, two = (load_file(folder / "model.safetensors") for folder in (sparse, out))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_run_that_replaces_another_resumes(home, stopped, sparse, tmp_path):
    """With --overwrite the old checkpoint lies beside the state until the end."""
    out = shutil.copytree(sparse, tmp_path / "out")
    shutil.copytree(stopped / STATE, out / STATE)
    shutil.copy(stopped / STATE_OF, out / STATE_OF)
    ok(*command(home, out), "--resume")
    assert STATE not in os.listdir(out)


def test_an_interrupted_run_says_how_to_go_on(home, monkeypatch, tmp_path):
    from sparseforge_fx import report

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write_json", interrupt)  # of the options, in the first step
    result = run(*command(home, tmp_path / "out"))
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("interrupted; ")
    assert "--resume" in result.stderr and "Traceback" not in result.stderr


def test_an_output_that_cannot_be_written_is_seen_before_the_model(home, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    for home_of in (models, opened):
        monkeypatch.setattr(home_of, "load_dense", None)
    out = tmp_path / "file" / "out"
    for arguments in (
        ["sparsify", home / "dense", "-o", out],
        ["export", home / "dense", "--format", "safetensors", "-o", out],
        ["lower", home / "dense", "-o", out],
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and "is a file; name another place" in result.stderr, result.output


def test_a_low_rank_branch_from_the_command_line(home, tmp_path):
    out = tmp_path / "out"
    data = ["--data", home / "train.txt", "--method", "ast"]
    refused(
        home, out, "sparsify", home / "dense", *data, "-o", out, *SHORT, "--slorb-block", "7", says="does not divide"
    )
    ok("sparsify", home / "dense", *data, "-o", out, *SHORT, "--slorb-block", "8")
    assert any(k.endswith("slorb.s") for k in load_file(out / "model.safetensors"))
    ok("evaluate", out, "--data", home / "test.txt", "--context", "16")


def killed_at_write(moment):
    count = 0

    def killing(real):
        def call(*args, **options):
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    os.replace, os.fsync = killing(os.replace), killing(os.fsync)


@pytest.mark.parametrize("moment", [1, 2, 3, 6, 9, 12])
def test_a_kill_at_any_write_leaves_nothing_that_resuming_cannot_finish(home, sparse, tmp_path, moment):
    out = tmp_path / "out"
    arguments = command(home, out)
    exit_code = preloaded.run(killed_at_write, moment, home / "cache", arguments)
    assert exit_code in (-signal.SIGKILL, 0)
    if exit_code:
        assert not (out / "config.json").exists() or (out / "report.json").exists()
        result = run(*arguments, "--resume")
        assert result.exit_code == 0 or "is finished" in result.stderr, result.output
    one, two = (load_file(folder / "model.safetensors") for folder in (sparse, out))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert os.listdir(tmp_path) == ["out"] and STATE not in os.listdir(out)


@pytest.mark.slow
def test_of_two_processes_one_writes(home, tmp_path):
    out = tmp_path / "out"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(home / "cache")}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    launch += [str(20_000 + os.getpid() % 20_000), "-m", "sparseforge_fx.cli"]
    done = subprocess.run([*launch, *command(home, out)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    assert (out / "model.safetensors").exists()
    assert json.loads((out / "report.json").read_text())["curves"][-1]["tokens"] % 2 == 0
    assert not {STATE, STATE_OF} & set(os.listdir(out)) and os.listdir(tmp_path) == ["out"]
    again = subprocess.run([*launch, *command(home, out)], env=environment, capture_output=True, text=True)
    assert again.returncode and again.stderr.count("error: the output folder") == 1
