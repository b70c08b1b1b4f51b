"""A measurement is written before it is printed: whoever reads may stop, and a full disk does not take it away."""

import pytest
from rich.console import Console
from rich.table import Table
from tiny_checkpoint import write_checkpoint, write_text
from typer.testing import CliRunner

import sparseforge_fx as sf
from sparseforge_fx import cli, report
from sparseforge_fx.deploy.lowering import cost, cost_table


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A 2:4 model, a text, and a table without times."""
    root = tmp_path_factory.mktemp("beside")
    model, tokenizer = sf.load(write_checkpoint(root / "dense", num_hidden_layers=1))
    sf.sparsify(model).save(root / "sparse", tokenizer)
    (root / "sparse" / "report.json").unlink()
    write_text(root / "test.txt", repeats=6)
    cost_table.save_table({}, root / "table.json")
    return root


def run(line, home, out):
    return CliRunner().invoke(cli.app, line.format(home=home, out=out).split())


EVALUATE = "evaluate {home}/sparse --data {home}/test.txt --context 16 --max-windows 1 --device cpu -o {out}"
MEASURING = [
    EVALUATE,
    "lower {home}/sparse --table {home}/table.json --device cpu -o {out}",
    "benchmark {home}/sparse --batch 1 --prompt 4 --new-tokens 2 --rounds 1 --tokens 1 --device cpu -o {out}",
    "inspect {home}/dense --picture {out}",
]


@pytest.mark.parametrize("line", MEASURING)
def test_what_nobody_reads_is_written(home, tmp_path, monkeypatch, line):
    def closed(self, *objects, **how):
        if isinstance(objects[0], Table):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(Console, "print", closed)
    monkeypatch.setattr(cost, "measure", lambda shapes, *_: {shape: {} for shape in shapes})
    out = tmp_path / "out.svg"
    result = run(line, home, out)
    assert result.exit_code == 2 and "Broken pipe" in result.stderr
    assert out.stat().st_size > 0


def test_what_cannot_be_written_is_printed(home, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_json", full)
    result = run(EVALUATE, home, tmp_path / "out.json")
    assert result.exit_code == 2 and "No space left" in result.stderr
    assert "7 of 7 eligible linears are exactly 2:4" in result.stdout and "wrote" not in result.stdout
