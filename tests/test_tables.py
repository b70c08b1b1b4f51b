"""The measured tables: what the pages say is what the json files say."""

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
