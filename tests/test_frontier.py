"""The frontier's points: how they are given, which are dominated, what the table says."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def frontier_tables(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import frontier_tables

    return frontier_tables


def point(name, perplexity, speed, size):
    said = {"name": name, "perplexity": perplexity, "tokens_per_second": {"1": speed, "8": speed}, "bytes": size}
    asked = {"windows": 1, "context": 8, "text": "t"}
    run = {"device": "cpu", "threads": 1, "commit": "c", "prompt": 2, "tokens": 2, "asked": asked}
    return {**said, **run, "zero_shot_mean": 0.5, "runtime": "ours"}


def test_who_is_dominated_and_by_whom(frontier_tables):
    points = [
        point("dense", 20, 10, 100),
        point("half", 25, 20, 50),
        point("worse", 25, 15, 50),
        point("as", 25, 20, 50),
    ]
    assert frontier_tables.dominators(points) == {"dense": [], "half": [], "worse": ["half", "as"], "as": []}
    assert frontier_tables.dominators([]) == {}


def test_faster_at_one_batch_alone_dominates_nobody(frontier_tables):
    slow, fast = point("a", 20, 10, 100), point("b", 20, 20, 100)
    fast["tokens_per_second"]["8"] = 5
    assert frontier_tables.dominators([slow, fast]) == {"a": [], "b": []}


def test_the_table_names_them(frontier_tables, monkeypatch):
    points = [point("half", 25, 20, 50e6), point("worse", 30, 15, 60e6)]
    monkeypatch.setattr(frontier_tables, "read", lambda folder: points)
    lines = frontier_tables.frontier_table().splitlines()
    assert "| half | 25.00 | 50.0 | 20.0 | 20.0 | 50 MB | nobody |" in lines
    assert "| worse | 30.00 | 50.0 | 15.0 | 15.0 | 60 MB | half |" in lines


def test_how_a_point_is_given(frontier_tables):
    from frontier import read_point

    given = read_point("2:4 int4=folder/a:b")
    assert given == ("2:4 int4", "folder/a:b", None) and given.label == "2-4-int4" and not given.is_gguf
    assert read_point("dense=model:float32") == ("dense", "model", "float32")
    assert read_point("q=x.gguf").is_gguf
    with pytest.raises(SystemExit, match="write NAME=PATH"):
        read_point("folder")
