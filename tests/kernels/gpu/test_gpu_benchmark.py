"""The GPU sweep's code on tiny CPU tensors: everything but the device."""

import json
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

FOLDER = Path(__file__).parents[3] / "examples" / "benchmarks"
TINY = {"tiny": ((32, 64), (48, 64))}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import common
    import gpu_kernels

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    return gpu_kernels


def test_a_dry_run_measures_every_candidate_and_writes_nothing(bench, capsys, tmp_path):
    bench.main(rounds=2, dry=True)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 24 and all("dense" in p and "planes" in p and "failed" not in p for p in printed)
    assert not list(tmp_path.iterdir())


def test_rows_hold_what_the_json_needs(bench):
    row = bench.measure(bench.Site(32, 64, bench.parse_format("2:4"), torch.device("cpu"), 1), 3, 2, False, False)
    assert (
        set(row["results"]) == {"dense", "planes", "decompress"}
        and "cuSPARSELt" in row["no_cusparselt"]
        and row["format"] == "2:4"
    )
    for result in row["results"].values():
        assert result["error"] < 0.01 and result["min_us"] <= result["median_us"] <= result["max_us"]
        assert result["over_dense"] > 0 and result["gigabytes_per_second"] > 0
    json.dumps(row, allow_nan=False)


def test_a_wrong_candidate_gets_no_time(bench):
    site = bench.Site(32, 64, bench.parse_format("2:4"), torch.device("cpu"), 1)
    site.planes[0][0].zero_()  # the values of the copy that is compared
    row = bench.measure(site, 3, 2, False, False)
    assert "wrong" in row["results"]["planes"]["failed"] and "median_us" not in row["results"]["planes"]
    assert "wrong" in row["results"]["decompress"]["failed"] and "median_us" in row["results"]["dense"]
    assert "wrong" in bench.line(row)


def test_tiles_that_cannot_be_tuned_are_said_and_the_rest_is_timed(bench):
    row = bench.measure(bench.Site(32, 64, bench.parse_format("2:4"), torch.device("cpu"), 1), 3, 1, False, True)
    assert "have tiles to tune" in row["tune_failed"] and "median_us" in row["results"]["planes"]


def test_what_was_measured_is_written_with_what_a_number_needs(bench, tmp_path):
    bench.sweep(TINY, ("2:4",), (1, 200), torch.device("cpu"), "a-device", cold_bytes=1, rounds=1)
    written = json.loads((tmp_path / "kernels" / "a-device.json").read_text())
    assert written["complete"] and [(r["out"], r["m"]) for r in written["rows"]] == [
        (32, 1),
        (32, 200),
        (48, 1),
        (48, 200),
    ]
    assert written["shapes"] == {"tiny": [[32, 64], [48, 64]]} and not written["tuned"]
    assert {"device", "threads", "commit", "versions"} <= set(written)


def test_the_budget_stops_it_and_what_there_is_is_written(bench, tmp_path):
    bench.sweep(TINY, ("2:4",), (1, 200), torch.device("cpu"), "late", cold_bytes=1, rounds=1, minutes=0.0)
    written = json.loads((tmp_path / "kernels" / "late.json").read_text())
    assert not written["complete"] and written["rows"] == []


@pytest.mark.parametrize(
    ("options", "code", "said"), [(["--shapes", "no-such"], 2, "unknown shapes no-such"), ([], 1, "CUDA device")]
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_what_it_cannot_do_it_says(bench, options, code, said):
    script = typer.Typer()
    script.command()(bench.main)
    done = CliRunner().invoke(script, options)
    assert done.exit_code == code and isinstance(done.exception, SystemExit) and said in done.stderr
