"""export, generate and benchmark as commands: what they write and say, and one sentence with exit code 2 for bad input."""

import json
import shutil

import pytest
import torch
from tiny_checkpoint import write_checkpoint
from typer.testing import CliRunner

import sparseforge_fx as sf
from sparseforge_fx import cli
from sparseforge_fx.deploy.lowering import cost, cost_table


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def ok(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A 2:4 model."""
    folder = write_checkpoint(tmp_path_factory.mktemp("cli") / "dense", num_hidden_layers=1)
    model, tokenizer = sf.load(folder)
    sf.sparsify(model).save(folder.parent / "sparse", tokenizer)
    return folder.parent / "sparse"


@pytest.fixture
def always_faster(monkeypatch):
    def measure(shapes, tokens, *_):
        row = lambda s, t: cost_table.Timing(s, "rows", t, 20.0, (1.0, 1.0), 10.0, (1.0, 1.0))  # noqa: E731
        return {s: {"rows": {t: row(s, t) for t in tokens}} for s in shapes}

    monkeypatch.setattr(cost, "measure", measure)


def test_a_generator_writes_what_the_folder_writes(folder, tmp_path, always_faster):
    said = ok("export", folder, "-o", tmp_path / "g.pt2", "--generator", "--max-length", "48", "--device", "cpu")
    assert said.startswith("4 packed linears: ") and f"wrote {tmp_path / 'g.pt2'}" in said
    arguments = ("-p", "The quick", "-p", "dog", "--max-new-tokens", "6")
    text = run("generate", tmp_path / "g.pt2", *arguments)
    assert text.exit_code == 0 and text.stdout.startswith("The quick")
    assert text.stdout == run("generate", folder, "--device", "cpu", *arguments).stdout
    for bad, says in ((("-p", ""), "has no tokens"), (("-p", "a", "--device", "cpu"), "is for a model folder")):
        refused = run("generate", tmp_path / "g.pt2", *bad)
        assert refused.exit_code == 2 and says in refused.stderr
    short = run("generate", folder, "--device", "cpu", "-p", "a" * 120, "--max-new-tokens", "20")
    assert "no more than 8 new tokens fit the model's 128 positions" in short.stderr and short.exit_code == 0
    drawn = [run("generate", tmp_path / "g.pt2", *arguments, "--sample", "--seed", s).stdout for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_what_a_generation_config_asks_for(folder, tmp_path, always_faster):
    """Stop strings are kept to, but where the time of so many tokens is taken; every prompt has one text."""
    shutil.copytree(folder, tmp_path / "stops")
    arguments = ("-p", "The quick", "--device", "cpu", "--max-new-tokens", "6")
    whole = run("generate", folder, *arguments).stdout.removeprefix("The quick").removesuffix("\n")
    unasked = {"eos_token_id": None, "stop_strings": [whole[:2]], "max_time": 1e-9}
    unasked |= {"do_sample": True, "num_return_sequences": 2, "return_dict_in_generate": True}
    config = tmp_path / "stops" / "generation_config.json"
    config.write_text(json.dumps({k: v for k, v in unasked.items() if k != "max_time"}))
    stopped = run("generate", tmp_path / "stops", *arguments)
    assert stopped.exit_code == 0, stopped.output
    assert whole.startswith(stopped.stdout.removeprefix("The quick").strip("\n"))
    assert len(stopped.stdout) < len("The quick" + whole)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 5)
    how = ("--data", tmp_path / "text.txt", "--context", "16", "--max-windows", "1", "--device", "cpu")
    assert "The quick" in ok("evaluate", tmp_path / "stops", "-p", "The quick", *how)
    config.write_text(json.dumps(unasked))
    options = ("--prompt", "4", "--new-tokens", "3", "--tokens", "2", "--rounds", "1", "--device", "cpu")
    assert "7 of 7" in ok("benchmark", tmp_path / "stops", "--batch", "1", *options)


def test_a_graph_and_a_packed_folder(folder, tmp_path, always_faster):
    ok("export", folder, "-o", tmp_path / "m.pt2", "--portable", "--device", "cpu")
    ids = torch.tensor([[5, 9, 11]])
    want = sf.load(folder)[0](ids).logits
    torch.testing.assert_close(torch.export.load(tmp_path / "m.pt2").module()(input_ids=ids)["logits"], want)
    assert "7 packed linears" in ok("export", folder, "-o", tmp_path / "packed", "--format", "safetensors")
    torch.testing.assert_close(sf.load(tmp_path / "packed")[0](ids).logits, want)
    assert "4 packed linears" in ok("export", tmp_path / "packed", "-o", tmp_path / "again.pt2", "--device", "cpu")
    generated = run("generate", tmp_path / "packed", "-p", "dog", "--device", "cpu", "--max-new-tokens", "4")
    assert generated.exit_code == 0 and generated.stderr == ""  # it runs packed as it is


def test_a_damaged_packed_folder(folder, tmp_path):
    ok("export", folder, "-o", tmp_path / "p", "--format", "safetensors")
    config = tmp_path / "p" / "config.json"
    whole = config.read_text()
    for damaged, says in (
        (whole.replace('"num_hidden_layers": ', '"num_hidden_layers": 9999999'), "layers (num_hidden_layers)"),
        (whole.replace('"2:4"', '"2:5"'), "format '2:5'"),
        (whole[:-20], "no json"),
    ):
        config.write_text(damaged)
        for command in (["generate", tmp_path / "p", "-p", "a"], ["export", tmp_path / "p", "-o", tmp_path / "m.pt2"]):
            result = run(*command)
            assert result.exit_code == 2 and says in result.stderr and result.stderr.count("\n") == 1, result.stderr
    config.write_text(whole)
    for file in (tmp_path / "p").glob("*token*"):
        file.unlink()
    result = run("generate", tmp_path / "p", "-p", "a", "--device", "cpu")
    assert result.exit_code == 2 and "has no tokenizer" in result.stderr and not (tmp_path / "m.pt2").exists()


def test_benchmark(folder, tmp_path, always_faster):
    options = (
        "--prompt",
        "4",
        "--new-tokens",
        "3",
        "--tokens",
        "2",
        "--rounds",
        "2",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    )
    said = ok("benchmark", folder, "--batch", "2", *options, "-o", tmp_path / "speed.json")
    assert said.startswith("7 of 7 2:4 linears packed")
    found = json.loads((tmp_path / "speed.json").read_text())["batches"]["2"]
    assert found["dense"]["ratio"] == 1 and found["packed"]["same_greedy_text"]
    assert found["packed"]["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "SPARSE", "-o", "OUT/m.pt2", "--format", "gguf"], "unknown format 'gguf'"),
        (["export", "SPARSE", "-o", "OUT/m.pt2", "--generator", "--portable"], "leave --portable out"),
        (
            ["export", "SPARSE", "-o", "OUT/packed", "--format", "safetensors", "--generator"],
            "--generator is for graphs",
        ),
        (["export", "SPARSE", "-o", "OUT/packed", "--format", "safetensors", "--no-gate"], "--no-gate is for graphs"),
        (["export", "SPARSE", "-o", "OUT/packed", "--format", "safetensors", "--gate"], "--gate is for graphs"),
        (
            ["export", "SPARSE", "-o", "OUT/packed", "--format", "safetensors", "--tokens", "3"],
            "--tokens is for graphs",
        ),
        (["export", "SPARSE", "-o", "OUT/packed", "--format", "safetensors", "--table", "t.json"], "leave --table out"),
        (["export", "SPARSE", "-o", "OUT/packed", "--format", "safetensors", "--device", "cpu"], "leave --device out"),
        (
            ["export", "SPARSE", "-o", "OUT/packed", "--format", "safetensors", "--max-length", "7"],
            "--max-length is for",
        ),
        (["export", "SPARSE", "-o", "OUT/m.pt2", "--max-length", "7"], "without --generator: leave --max-length out"),
        (["export", "SPARSE", "-o", "OUT/m.pt2", "--portable", "--tokens", "3"], "--portable packs all"),
        (["export", "SPARSE", "-o", "OUT/m.pt2", "--no-gate", "--table", "t.json"], "--no-gate packs all"),
        (["export", "SPARSE", "-o", "OUT/m.bin"], "does not end in .pt2"),
        (["export", "DENSE", "-o", "OUT/m.pt2", "--device", "cpu"], "nothing to lower"),
        (["export", "SPARSE/none", "-o", "OUT/m.pt2"], "none"),
        (
            ["export", "SPARSE", "-o", "OUT/m.pt2", "--generator", "--max-length", "999", "--device", "cpu"],
            "more than the 128 positions",
        ),
        (["generate", "OUT/none.pt2", "-p", "a"], "is not there"),
        (["generate", "SPARSE/config.json", "-p", "a"], "config.json"),
        (["generate", "SPARSE", "-p", ""], "has no tokens"),
        (["generate", "SPARSE", "-p", "a", "-p", ""], "has no tokens"),
        (["generate", "SPARSE", "-p", "a" * 300], "the prompt has 300 tokens and the model 128 positions"),
        (["generate", "SPARSE", "-p", "a", "--temperature", "0.5"], "--temperature without --sample has no effect"),
        (["generate", "SPARSE", "-p", "a", "--seed", "1"], "--seed without --sample has no effect"),
        (["generate", "SPARSE", "-p", "a", "--sample", "--top-p", "1.5"], "--top-p is 1.5"),
        (["generate", "SPARSE", "-p", "caf\udce9"], "is not UTF-8"),
        (["evaluate", "SPARSE", "-p", "a", "-p", "caf\udce9"], "--prompt 'caf\\udce9' is not UTF-8"),
        (["benchmark", "DENSE", "--device", "cpu"], "nothing to lower"),
        (["benchmark", "SPARSE", "--rounds", "0"], "at least 1"),
    ],
)
def test_bad_input(folder, tmp_path, arguments, message):
    places = {"SPARSE": folder, "DENSE": folder.parent / "dense", "OUT": tmp_path}
    named = []
    for argument in arguments:
        head, _, rest = argument.partition("/")
        named.append(places[head] / rest if head in places else argument)
    result = run(*named)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
