"""The GPU sweep's code on tiny CPU tensors: everything but the device."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[3] / "examples" / "benchmarks" / "gpu_kernels.py"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_kernels", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_kernels", module)
    spec.loader.exec_module(module)
    module.RESULTS = tmp_path
    return module


def test_a_dry_run_measures_every_candidate_and_writes_nothing(bench, capsys):
    bench.main(rounds=2, dry=True)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8 and all("dense" in p and "planes" in p and "failed" not in p for p in printed)
    assert not list(bench.RESULTS.iterdir())


def test_rows_hold_what_the_json_needs(bench):
    row = bench.measure(bench.Site(32, 64, torch.device("cpu"), 1), 3, 2, False, False)
    assert set(row["results"]) == {"dense", "planes", "decompress"} and "cuSPARSELt" in row["no_cusparselt"]
    for result in row["results"].values():
        assert result["error"] < 0.01 and result["min_us"] <= result["median_us"] <= result["max_us"]
        assert result["over_dense"] > 0 and result["gigabytes_per_second"] > 0
    json.dumps(row, allow_nan=False)


def test_a_wrong_candidate_gets_no_time(bench, monkeypatch):
    monkeypatch.setattr(bench, "planes_linear", lambda x, values, meta, in_features: x.new_zeros(len(x), len(values)))
    row = bench.measure(bench.Site(32, 64, torch.device("cpu"), 1), 3, 2, False, False)
    assert "wrong" in row["results"]["planes"]["failed"] and "median_us" not in row["results"]["planes"]
    assert "wrong" in bench.line(row)


def test_the_budget_stops_it_and_what_there_is_is_written(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "environment", lambda: {"device": "A GPU"})
    monkeypatch.setattr(bench.torch, "device", lambda name: torch.empty(0).device)
    monkeypatch.setattr(bench, "SHAPES", {"tiny": ((32, 64), (48, 64))})
    monkeypatch.setattr(bench, "tune", lambda *_: (8, 128, 8))
    monkeypatch.setattr(bench, "COLD_BYTES", 1)
    bench.main(minutes=0.0, shapes="tiny", rounds=1)
    written = json.loads((bench.RESULTS / "cuda-a-gpu.json").read_text())
    assert not written["complete"] and written["rows"] == [] and written["shapes"] == {"tiny": [[32, 64], [48, 64]]}
    monkeypatch.setattr(bench, "ROWS", (1, 200))
    bench.main(minutes=1.0, shapes="tiny", rounds=1)
    written = json.loads((bench.RESULTS / "cuda-a-gpu.json").read_text())
    assert written["complete"] and [(r["out"], r["m"]) for r in written["rows"]] == [
        (32, 1),
        (32, 200),
        (48, 1),
        (48, 200),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, str(FILE)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "CUDA device" in done.stderr and "Traceback" not in done.stderr
