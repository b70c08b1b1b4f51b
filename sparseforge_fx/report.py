"""What a run leaves behind in report.json, and what a number needs beside it."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from sparseforge_fx.files import new_file

if TYPE_CHECKING:
    from sparseforge_fx.passes import LinearSite


class Environment(TypedDict):
    """See :func:`environment`."""

    versions: dict[str, str]
    device: str
    threads: int
    commit: str | None


def environment() -> Environment:
    """Versions, device and commit: what a number needs beside it."""
    packages = ("torch", "transformers", "accelerate", "datasets", "numpy", "triton")
    versions = {"python": platform.python_version()}
    for name in ("sparseforge-fx", *packages):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {"versions": versions, "device": device, "threads": torch.get_num_threads(), "commit": _commit()}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _commit() -> str | None:
    """The commit of the checkout that this file runs from (``+`` appended if it has changes); None when installed.

    Where the files were copied from a checkout to a machine without git, ``SPARSEFORGE_COMMIT`` says which it was."""
    if said := os.environ.get("SPARSEFORGE_COMMIT"):
        return said
    here = Path(__file__).resolve().parent
    try:
        # a virtual environment may lie inside somebody else's repository
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", Path(__file__).name], cwd=here, capture_output=True, timeout=10
        )
        if tracked.returncode != 0:
            return None
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")) or None


def peak_memory_bytes() -> int:
    """Largest memory so far: of the CUDA device if it was used, else of this process."""
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe_sites(sites: Sequence[LinearSite]) -> dict[str, Any]:
    """Sites, and what was skipped with the reason."""
    chosen = [s for s in sites if s.reason is None]
    return {
        "sites": [
            {
                "name": s.fqn,
                "out": s.out_features,
                "in": s.in_features,
                **({} if s.experts is None else {"experts": s.experts}),
                "transposed": s.transposed,
                "ties": list(s.ties),
                "uses": len(s.uses),
            }
            for s in chosen
        ],
        "skipped": [{"name": s.fqn, "shape": list(s.shape), "reason": s.reason} for s in sites if s.reason is not None],
        "site_parameters": sum(s.numel for s in chosen),
    }


def readable_sides(row: Mapping[str, Any]) -> str:
    """Of a site, or of a row of a cost table: out x in, of a stack experts x out x in, and how many a token goes to."""
    sides = " x ".join(str(row[side]) for side in ("experts", "out", "in") if side in row)
    return f"{sides}, {row['chosen']} a token" if "chosen" in row else sides


@torch.no_grad()
def describe_change(weight: Tensor, dense: Tensor) -> dict[str, float]:
    """What became of a weight: ``kept``, the share of the dense one's squared size where it is not zero now, and
    ``moved``, its distance from the dense one over that one's size."""
    before, after = dense.float(), weight.detach().float()
    whole = max(float(before.square().sum()), torch.finfo(torch.float32).tiny)
    left = float(before[after != 0].square().sum())
    return {"kept": left / whole, "moved": (float((after - before).square().sum()) / whole) ** 0.5}


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    text = json.dumps(value, indent=1, allow_nan=False, default=str) + "\n"
    with new_file(path) as file:
        file.write_text(text)
