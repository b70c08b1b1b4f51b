"""What README.md and docs/ promise: their code runs or at least calls what there is, their links and options exist."""

import ast
import inspect
import json
import operator
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoint import TEXT, write_checkpoint
from typer.main import get_command

import sparseforge_fx as sf
from sparseforge_fx.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]


def blocks(page, language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    return [text for kind, text in found if kind == language]


def test_a_stranger_has_seen_it_all_by_line_60():
    seen = "\n".join((ROOT / "README.md").read_text().splitlines()[:60])
    table = seen[seen.index("<!-- table:frontier -->") : seen.index("<!-- /table -->")]
    assert table.count("\n| ") >= 1 + 6 and "dominated by" in table and "dense int8" in table and "2:4 int8" in table
    assert "![" in seen and len(blocks("README.md", "python")[0].splitlines()) == 8 and "make demo" in seen


def test_the_code_of_the_readme_runs(tmp_path):
    write_checkpoint(tmp_path / "model", max_position_embeddings=1024)
    (tmp_path / "train.jsonl").write_text((json.dumps({"text": TEXT}) + "\n") * 200)
    (code,) = blocks("README.md", "python")
    for given, small in (
        ('"HuggingFaceTB/SmolLM2-135M"', '"model"'),
        ("1_000_000", "4096"),
        ("tokens=[1, 8]", "tokens=[1]"),
    ):
        assert code.count(given) == 1
        code = code.replace(given, small)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("14 ") and "The sky is" in done.stdout
    assert (tmp_path / "packed" / "model.safetensors").exists()


def test_the_code_of_a_pass_and_a_method_of_ones_own_runs():
    pass_, method = blocks("docs/extending.md", "python")
    for code in (pass_, method):
        exec(compile(code, "docs/extending.md", "exec"), {"__name__": "__main__"})


@pytest.mark.slow
def test_the_quick_start_runs(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "model", num_hidden_layers=1)
    (tmp_path / "train.jsonl").write_text((json.dumps({"text": TEXT}) + "\n") * 60)
    (code,) = blocks("docs/index.md", "python")
    small = {"tokens=1_000_000": "tokens=256, length=32, batch_size=2, calibration=4", "tokens=[1, 8]": "tokens=[1]"}
    for given, less in small.items():
        assert code.count(given) == 1
        code = code.replace(given, less)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    exec(compile(code, "docs/index.md", "exec"), {})
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_commands_that_are_shown_can_be_typed():
    """Of every page: the verb is there, and so are its options."""
    commands = get_command(app).commands
    shown = 0
    for page in PAGES:
        lines = [line for kind in ("", "bash") for block in blocks(page, kind) for line in block.splitlines()]
        for line in lines:
            if page == "docs/usage.md" or not line.startswith("sparseforge-fx "):
                continue  # a listing of all, which has a test of its own
            _, verb, *rest = shlex.split(line, comments=True)
            commands[verb].make_context(verb, rest)
            shown += 1
    assert shown >= 6


def test_every_pass_is_drawn():
    drawn = {p.stem for p in (ROOT / "docs" / "graphs").glob("*.svg")}
    named = set(re.findall(r"graphs/(\w+)\.svg", (ROOT / "docs/how_it_works.md").read_text()))
    assert drawn == named and {"insert_soft_masks", "harden_masks", "lower_sparse_linears"} < drawn
    inside = (ROOT / "docs" / "graphs" / "insert_soft_masks.svg").read_text()
    assert "sparseforge.soft_masked_linear" in inside


@pytest.mark.parametrize("page", PAGES)
def test_the_code_calls_what_there_is(page):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sf":
                assert node.attr in sf.__all__, f"{page}: sf.{node.attr}"
            if isinstance(node, ast.Call) and re.fullmatch(r"sf(\.\w+)+", name := ast.unparse(node.func)):
                known = inspect.signature(operator.attrgetter(name[3:])(sf)).parameters
                unknown = {k.arg for k in node.keywords} - set(known)
                assert not unknown or any(p.kind is p.VAR_KEYWORD for p in known.values()), f"{page}: {name} {unknown}"


@pytest.mark.parametrize("page", PAGES)
def test_names_in_the_text_are_public(page):
    named = set(re.findall(r"`sf\.(\w+)", (ROOT / page).read_text()))
    assert named <= set(sf.__all__)


def test_every_public_name_is_on_the_api_page():
    shown = re.findall(r"^::: [\w.]+\.(\w+)$", (ROOT / "docs/api.md").read_text(), flags=re.MULTILINE)
    assert sorted(shown) == sorted(sf.__all__)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_are_there(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text):
        target = (ROOT / page).parent / link[0] if link[0] else ROOT / page
        assert target.exists(), f"{page}: {link[0]}"
        if link[1]:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert link[1][1:] in anchors, f"{page}: {link}"
    for file in re.findall(r"`((?:sparseforge_fx|passes|tests|examples|docs)/[\w./]*)`", text):
        assert (ROOT / file).exists(), f"{page}: {file}"


def test_the_commands_have_the_options_that_are_named():
    commands = get_command(app).commands
    (listing,) = (b for b in blocks("docs/usage.md", "") if "sparseforge-fx inspect" in b)
    assert {line.split()[1] for line in listing.splitlines() if line.startswith("sparseforge-fx")} == set(commands)
    command = None
    for line in listing.splitlines():
        if line.startswith("sparseforge-fx"):
            command = commands[line.split()[1]]
        known = {option for parameter in command.params for option in parameter.opts}
        for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", line):
            assert option in known or option == "--help" or command.name == "serve", f"{command.name} {option}"
