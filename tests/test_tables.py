"""The measured tables: what the pages say is what the json files say."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import tables

    return tables


def test_the_pages_are_what_the_json_files_say(tables):
    for page in tables.PAGES:
        assert tables.update(tables.ROOT / page, write=False), f"{page}: run python examples/benchmarks/tables.py"


def test_every_table_is_on_a_page(tables):
    text = "".join((tables.ROOT / page).read_text() for page in tables.PAGES)
    assert [name for name in tables.TABLES if f"<!-- table:{name} -->" not in text] == []


def test_a_stale_page_is_seen_and_filled(tables, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: "| new |"})
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table:one -->\n| old |\n<!-- /table -->\nafter\n")
    assert not tables.update(page, write=False) and "| old |" in page.read_text()
    assert not tables.update(page, write=True) and tables.update(page, write=True)
    assert page.read_text() == "before\n<!-- table:one -->\n| new |\n<!-- /table -->\nafter\n"


def test_a_table(tables):
    import records

    assert records.table(("a", "b"), "lr", [("x", 1)]) == "| a | b |\n|---|---:|\n| x | 1 |"
    assert records.table(("a",), "l", []) == records.blocks([]) == "_no runs yet_"
    assert records.blocks([("one", "| 1 |"), ("two", "| 2 |")]) == "one\n\n| 1 |\n\ntwo\n\n| 2 |"
    assert records.with_spread([2.0]) == "2.00" and records.with_spread([1.0, 3.0]) == "2.00 ± 1.41"


def run(label, method, preset, **report):
    return {"label": label, "method": method, "report": {"preset": preset, **report}}


@pytest.mark.parametrize(
    ("before", "after", "earlier"),
    [
        (
            run("sparseforge-tuned-122880-seed0", "sparseforge", "tuned"),
            ("alps+kd-plain-122880-seed0", "alps+kd"),
            None,
        ),
        (
            run("alps+kd-122880-seed0", "sparseforge", "alps+kd", settings={}, config={"reconstruct": 1}),
            ("alps+kd-122880-seed0", "alps+kd"),
            None,
        ),
        (
            run("alps+kd-0.01-0.001-seed0", "sparseforge", "alps+kd", settings={}) | {"tokens_per_parameter": 0.01},
            ("alps+kd-0.01-0.001-seed0", "alps+kd"),
            None,
        ),
        (
            run("sweep-alps+kd-plain-0.0005-256", "sparseforge", "alps+kd", settings={}, config={"reconstruct": 0}),
            ("sweep-alps+kd-plain-0.0005-256", "alps+kd"),
            None,
        ),
        (
            run("ablation-tuned-fading-61440", "sparseforge", "tuned"),
            ("ablation-alps+kd-plain-fading-61440", "alps+kd"),
            None,
        ),
        (run("sparsegpt+kd-122880-seed0", "sparseforge", "tuned"), ("sparsegpt+kd-122880-seed0", "alps+kd"), None),
        (
            run("sweep-sparseforge-paper-0.0005-30720", "sparseforge", "paper"),
            ("sweep-sparseforge-annealed-0.0005-30720", "annealed"),
            "then called paper",
        ),
        (
            run("sweep-ast-0.0002-30720", "ast", "paper"),
            ("sweep-ast-earlier-0.0002-30720", "paper"),
            "earlier constants",
        ),
        (run("gmp-122880-seed0", "gmp", "paper"), ("gmp-122880-seed0", "paper"), None),
        (run("ast-122880-seed0", "ast", "paper", settings={}), ("ast-122880-seed0", "paper"), None),
        (
            run("sparseforge-paper-256-seed0", "sparseforge", "paper", settings={}),
            ("sparseforge-paper-256-seed0", "paper"),
            None,
        ),
    ],
)
def test_what_had_another_name_has_todays(tables, before, after, earlier):
    import records

    found = records.today(before)
    assert (found["label"], found["report"]["preset"]) == after and found.get("earlier") == earlier


def test_no_two_files_are_one_run(tables):
    """A run of today is not taken for one that was made before its preset was what it is."""
    import records

    for folder in ("leaderboard", "quality"):
        for file in (records.RESULTS / folder).glob("*.json"):
            label = records.today(json.loads(file.read_text())).get("label") or file.stem
            assert folder == "quality" or label == file.stem


def test_what_few_documents_can_tell(tables):
    import quality_tables

    def score(share):
        return [{"zero_shot": {"a": {"acc": share, "acc_stderr": 0.1, "documents": 4}}}]

    groups = {("dense", 0): score(0.5), ("ast", 256): score(0.6), ("alps", 0): score(0.4)}
    assert "the dense one is below ast after 256 tokens." in quality_tables.undecided(groups, ["a"])
    assert quality_tables.undecided({("dense", 0): score(0.5), ("alps", 0): score(0.4)}, ["a"]) == ""


def test_a_method_needs_a_budget(tables):
    import quality_tables

    runs = [{"tokens": 1000, "report": {"site_parameters": 10_000}}]
    assert quality_tables.meaningful("cast", runs) and quality_tables.meaningful("ast", [{"tokens": 1, "report": {}}])
    runs[0]["tokens"] = 999
    assert not quality_tables.meaningful("cast", runs) and not quality_tables.meaningful("maskpro", runs)
    assert quality_tables.seconds([{"report": {"seconds": 10.0, "calibration_seconds": 4.0}}]) == "10 (4)"
    assert quality_tables.seconds([{"report": {}}]) == ""
