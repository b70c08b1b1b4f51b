"""A folder without the files of a tokenizer: verbs that read text say so in one sentence, the others do without."""

import pytest
from tiny_checkpoint import write_checkpoint, write_text
from typer.testing import CliRunner

from sparseforge_fx import cli


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    write_checkpoint(root / "model", num_hidden_layers=1)
    write_text(root / "text.txt")
    for file in (root / "model").glob("token*"):
        file.unlink()
    return root


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.mark.parametrize(
    "verb", ["sparsify", "sparsify --device disk --method wanda", "plan", "evaluate", "generate", "serve", "quantize"]
)
def test_text_cannot_be_read(home, tmp_path, verb):
    out, text = tmp_path / "out", home / "text.txt"
    options = {
        "sparsify": ["--data", text, "-o", out],
        "plan": ["--data", text, "--bytes", "0.5", "-o", out],
        "evaluate": ["--data", text],
        "generate": ["-p", "a"],
        "serve": [],
        "quantize": ["--data", text, "-o", out],
    }
    verb, *more = verb.split()
    result = run(verb, home / "model", *more, *options[verb])
    assert result.exit_code == 2 and "okenizer" in result.stderr and result.stderr.count("\n") == 1, result.output
    assert not out.exists()


@pytest.mark.parametrize("how", ["sparsify --method magnitude", "quantize", "inspect"])
def test_what_reads_none_works(home, tmp_path, how):
    verb, *more = how.split()
    where = [] if verb == "inspect" else ["-o", tmp_path / "out"]
    result = run(verb, home / "model", *more, *where)
    assert result.exit_code == 0, result.output
    assert not list(tmp_path.glob("out/token*"))
