"""Every example runs as its user runs it: a process of its own, from another folder, without arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import TEXT, tiny_llama, write_checkpoint, write_gguf, write_text

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SAYS = {
    "sparsify_huggingface_model.py": "14 linears are 2:4 after 256 tokens",
    "sparsify_any_module.py": "vision transformer: 12 linears are 2:4",
    "own_loop.py": "non-zeros in a group of four: at most 2",
    "export_and_generate.py": "greedy text is the same",
    "lower_and_generate.py": "14 packed linears; greedy text is the same",
    "huggingface_trainer.py": "14 linears, 50% to 50% of their weights are zero",
    "lora.py": "packed again: 14 linears",
    "serve_with_openai.py": "streamed: the same answer",
}
NEEDS = {"lora.py": ["peft"], "serve_with_openai.py": ["fastapi", "uvicorn", "openai"]}


def test_no_example_is_forgotten():
    assert {p.name for p in EXAMPLES.glob("*.py")} == {*SAYS, "demo.py"}


@pytest.mark.slow  # all of them together: make examples
@pytest.mark.parametrize("name", SAYS)
def test_example_runs(name, tmp_path):
    for needed in NEEDS.get(name, ()):
        pytest.importorskip(needed)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert SAYS[name] in done.stdout


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import demo

    return demo


def test_the_demo_holds_whole_documents_out(demo):
    shared = "This sentence stands in two documents, one on either side of the border."
    documents = [f"Document number {i} says something that no other document says." for i in range(20)]
    documents[3] += " " + shared
    documents[-1] += " " + shared
    train, held = demo.split(documents, held_out=5)
    assert held == documents[-5:]
    assert train == [d for i, d in enumerate(documents[:15]) if i != 3]


def test_the_demo_takes_articles_from_the_hub_where_it_answers(demo, monkeypatch):
    import datasets
    import huggingface_hub

    class Hub:
        def dataset_info(self, name, timeout):
            assert name == "Salesforce/wikitext" and timeout <= 10

    lines = [
        " = One = \n",
        "\n",
        " First text . \n",
        " = = Section = = \n",
        " More text . \n",
        " = Two = \n",
        " Second text . \n",
    ]
    rows = {"train": {"text": lines}, "test": {"text": ["a", "b"]}}
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: rows)
    text = demo.find_text()
    assert [t.splitlines()[0].strip() for t in text.train] == ["= One =", "= Two ="]
    assert "More text" in text.train[0] and text.held_out == "a\n\nb"


def test_the_demo_counts_exact_sites_in_plain_torch(demo):
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(8, 2, bias=False), torch.nn.Linear(8, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3]] * 2))
        model[1].weight.copy_(torch.tensor([[1.0, 0, 2, 4, 0, 0, 0, 3]] * 2))
    sites = [{"name": f"{i}.weight", "transposed": False} for i in range(2)]
    assert demo.count_exact(model, sites) == 1


def test_the_demo_from_end_to_end_on_a_tiny_model(demo, monkeypatch, tmp_path, capsys):
    text = demo.Text("a test", [TEXT * 3] * 40, TEXT * 30)
    tiny = demo.Scale(steps=10, batch_size=4, length=64, calibration=8, context=64, windows=8)
    monkeypatch.setattr(demo, "find_text", lambda: text)
    monkeypatch.setattr(demo, "find_model", lambda: write_gguf(tmp_path / "tiny.gguf", tiny_llama()))
    monkeypatch.setattr(demo, "QUICK", tiny)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["demo.py", "--quick"])
    monkeypatch.chdir(tmp_path)
    demo.main()
    printed = capsys.readouterr().out
    assert "14 of 14 linears in demo_out/ are exactly 2:4" in printed
    files = {p.name for p in (tmp_path / "demo_out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "report.json", "report.html", "demo.json"} <= files
    summary = json.loads((tmp_path / "demo_out" / "demo.json").read_text())
    assert [r["method"] for r in summary["rows"]] == ["dense", "magnitude", "alps+kd"]
    assert [r["training_tokens"] for r in summary["rows"]] == [0, 0, 2560]
    assert all(r["tokens_scored"] == 8 * 63 for r in summary["rows"])


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    write_checkpoint(tmp_path / "model")
    write_text(tmp_path / "text.txt")
    for name, value in {"MODEL": "model", "TRAIN": "text.txt", "TEST": "text.txt", "LENGTH": "32"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # nobody's numbers are kept in it
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ()))
    assert "14 linears are 2:4" in said and "nats per token, p = " in said and "MB packed" in said
    assert (tmp_path / "sparse" / "report.html").is_file()
