"""Memory of each process when one model is shared by several (FSDP2), beside one process alone; one json.

    python examples/benchmarks/sharded.py MODEL [--ranks 1,2] [--steps 3] [--length 256]

Each count runs by itself, under torchrun, on this machine's CPU. ``peak_bytes`` is the largest resident size of a
process over its life, in which it has loaded the whole dense model once; ``training_bytes`` the resident size after the
last step's update, of a process that trains.
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
from common import model_and_ids, save

from sparseforge_fx.report import peak_memory_bytes


def main(model: str, ranks: str = "1,2", steps: int = 3, length: int = 256, label: str = "", worker: str = "") -> None:
    if worker:
        work(model, steps, length, Path(worker))
        return
    counts = [int(count) for count in ranks.split(",")]
    runs = [measured(model, count, steps, length) for count in counts]
    record = {"model": Path(model).name, "steps": steps, "length": length, "batch_size": 1, "runs": runs}
    save("sharded", label or Path(model).name, record)


def measured(model: str, count: int, steps: int, length: int) -> dict:
    """The records of all processes of one run."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        run = [__file__, model, "--steps", str(steps), "--length", str(length), "--worker", folder]
        shared = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
        subprocess.run([*launch, *run], env=os.environ | (shared if count > 1 else {}), check=True)
        return {"processes": count, "each": [json.loads(f.read_text()) for f in sorted(Path(folder).iterdir())]}


def work(model: str, steps: int, length: int, folder: Path) -> None:
    import sparseforge_fx as sf

    torch.manual_seed(0)  # the same ids on every process
    net, ids = model_and_ids(model, "cpu", 2 * steps, length)
    seen: dict = {"losses": [], "seconds": []}

    def on_step(step: int, row: dict) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen["training_bytes"] = pages * os.sysconf("SC_PAGE_SIZE")
        seen["losses"].append(row["loss"])
        seen["seconds"].append(row["seconds"])

    ranks = int(os.environ["WORLD_SIZE"])
    sf.sparsify(
        net, ids, preset="annealed", steps=steps, batch_size=1, length=length, accumulate=2 // ranks, compile=False,
        show_progress=False, on_step=on_step,
    )  # fmt: skip
    seen["peak_bytes"] = peak_memory_bytes()
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    typer.run(main)
