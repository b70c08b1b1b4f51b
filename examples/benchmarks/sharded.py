"""Losses, masks and memory of each process when several train one model, beside one process alone; one json.

    python examples/benchmarks/sharded.py MODEL [--ranks 1,2] [--steps 3] [--length 256]

Each count runs by itself, under torchrun, on this machine's CPU, in float32: one process with the whole model, several
that load the whole of it before FSDP2 cuts it up ("loaded"), several that read it in parts ("in parts"), and several with all of
it each ("replicated", DDP). ``masks_differ`` is the share of all entries of all weights that are zero in the first process's
result and not in one process's, or the other way round. ``peak_bytes`` is
the largest resident size of a process over its life; ``training_bytes`` the resident size after the last step's update;
``import_bytes`` what it is before anything is loaded. glibc is told to give freed memory back (GLIBC below), of which
it may keep what blocks were gathered into.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import typer
from common import language_model, save
from safetensors.torch import load_file

from sparseforge_fx.report import peak_memory_bytes

WAYS = ("loaded", "in parts", "replicated")
GLIBC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}


def main(model: str, ranks: str = "1,2", steps: int = 3, length: int = 256, label: str = "", worker: str = "") -> None:
    if worker:
        work(model, steps, length, Path(worker))
        return
    counts = [int(count) for count in ranks.split(",")]
    ways = [(count, way) for count in counts for way in (("loaded",) if count == 1 else WAYS)]
    runs, first = [], None
    for count, way in ways:
        each, zeros = measured(model, count, way, steps, length)
        first = zeros if first is None else first
        runs.append({"processes": count, "way": way, "masks_differ": differing(zeros, first), "each": each})
    record = {"model": Path(model).name, "dtype": "float32", "steps": steps, "length": length, "batch_size": 1, "runs": runs}  # fmt: skip
    save("sharded", label or Path(model).name, record)


def measured(model: str, count: int, way: str, steps: int, length: int) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The records of all processes of one run, and where the weights that it wrote are zero."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        run = [__file__, model, "--steps", str(steps), "--length", str(length), "--worker", folder]
        shared = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        environment = os.environ | {"WAY": way} | GLIBC | (shared if count > 1 and way != "replicated" else {})
        subprocess.run([*launch, *run], env=environment, check=True)
        each = [json.loads(f.read_text()) for f in sorted(Path(folder).glob("*.json"))]
        return each, {name: value == 0 for name, value in load_file(Path(folder) / "out" / "model.safetensors").items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Share of all entries."""
    different = sum(int((one[name] != zeros).sum()) for name, zeros in other.items())
    return different / sum(zeros.numel() for zeros in other.values())


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def work(model: str, steps: int, length: int, folder: Path) -> None:
    import sparseforge_fx as sf

    sparsify, in_parts = sf.sparsify, os.environ["WAY"] == "in parts"
    seen: dict = {"losses": [], "seconds": [], "import_bytes": resident()}
    if in_parts:
        source = sf.StreamedModel(model)
        source.compute_in(torch.float32)
    net = source if in_parts else language_model(model, torch.float32)
    size = (source.skeleton if in_parts else net).config.vocab_size
    ids = torch.randint(0, size, (2 * steps, length), generator=torch.Generator().manual_seed(0))

    def on_step(step: int, row: dict) -> None:
        seen["training_bytes"] = resident()
        seen["losses"].append(row["loss"])
        seen["seconds"].append(row["seconds"])

    ranks = int(os.environ["WORLD_SIZE"])
    result = sparsify(
        net, ids, preset="annealed", steps=steps, batch_size=1, length=length, accumulate=2 // ranks, compile=False,
        show_progress=False, on_step=on_step,
    )  # fmt: skip
    if in_parts or os.environ["RANK"] == "0":
        result.save(folder / "out")
    seen["peak_bytes"] = peak_memory_bytes()
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    typer.run(main)
