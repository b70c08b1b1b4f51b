"""A training step of this checkout against the same step of another one, in turn; one json.

    git worktree add ../before COMMIT
    python examples/benchmarks/step_against.py MODEL ../before [--dtypes bfloat16] [--compile] [--rounds 3]

Each is a fresh process that distils the model into its 2:4 self (Wanda's masks, fixed; the default loss) over the same
random tokens, by what both checkouts have in common of ``sparsify``. Seconds are those of the steps behind the first
two; losses are compared step by step. A machine stands in for one with AVX2 alone, as far as it can, under
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 SPARSEFORGE_CPU_ISA=avx2.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer

WARM = 2  # steps that are not counted


def main(
    model: str,
    other: Annotated[Path, typer.Argument(help="another checkout of this repository", exists=True)],
    dtypes: Annotated[str, typer.Option(help="by commas")] = "bfloat16",
    compile: bool = False,
    batch_size: int = 2,
    length: int = 512,
    steps: Annotated[int, typer.Option(min=WARM + 2)] = 6,
    rounds: Annotated[int, typer.Option(min=2)] = 3,
    label: str = "",
) -> None:
    from common import save  # of this checkout: a worker may be of the other

    here = Path(__file__).parents[2]
    asked = {"batch_size": batch_size, "length": length, "steps": steps, "compile": compile}
    found: dict[str, dict[str, Any]] = {}
    for dtype in dtypes.split(","):
        runs: dict[str, list[list[dict[str, float]]]] = {"here": [], "other": []}
        for _ in range(rounds):
            for name, checkout in (("other", other), ("here", here)):
                runs[name].append(run({**asked, "model": model, "dtype": dtype}, checkout))
        found[dtype] = compared(runs)
        print(dtype, found[dtype], flush=True)
    record = {
        "model": Path(model).name, **asked, "rounds": rounds, "other_commit": commit_of(other),
        "instructions": torch.backends.cpu.get_cpu_capability(), "dtypes": found,
    }  # fmt: skip
    save("step_against", label or Path(model).name, record)


def run(request: dict[str, Any], checkout: Path) -> list[dict[str, float]]:
    """Seconds and loss of each step, of a fresh process over that checkout's package."""
    if not (checkout / "passes").is_dir():
        sys.exit(f"{checkout} has no passes/: give a checkout of this repository, as git worktree makes one")
    with tempfile.TemporaryDirectory() as folder:
        package, result = Path(folder) / "sparseforge_fx", Path(folder) / "result.json"
        shutil.copytree(checkout / "sparseforge_fx", package)
        shutil.copytree(checkout / "passes", package / "passes")  # where an installed package has them
        command = [sys.executable, __file__, "--worker", json.dumps(request), str(result)]
        subprocess.run(command, check=True, cwd=folder, env={**os.environ, "PYTHONPATH": folder})
        told = json.loads(result.read_text())
        for module in told["modules"]:
            if not Path(module).is_relative_to(package):
                sys.exit(f"{module} was imported, which is not of {checkout}")
    return told["steps"]


def compared(runs: dict[str, list[list[dict[str, float]]]]) -> dict[str, Any]:
    """Medians over all counted steps of all rounds, the ratio of the two, that of each round, and how far losses are
    apart."""
    counted = {name: [[step["seconds"] for step in one[WARM:]] for one in of] for name, of in runs.items()}
    every = {name: [s for one in of for s in one] for name, of in counted.items()}
    pairs = zip(counted["other"], counted["here"], strict=True)
    losses = {name: [step["loss"] for step in of[0]] for name, of in runs.items()}
    return {
        "seconds": {name: median(values) for name, values in every.items()},
        "quartiles": {name: quantiles(values, n=4)[::2] for name, values in every.items()},
        "speedup": median(every["other"]) / median(every["here"]),
        "speedups": [median(a) / median(b) for a, b in pairs],
        "losses": losses,
        "largest_difference": max(abs(a - b) for a, b in zip(losses["other"], losses["here"], strict=True)),
    }


def commit_of(checkout: Path) -> str:
    """The commit of a checkout, with a + where it has changes."""
    git = ["git", "-C", str(checkout)]
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()[:12]
    return head + ("+" if subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True) else "")


def work(request: dict[str, Any], result: Path) -> None:
    """Train for so many steps with whichever package is imported."""
    from transformers import AutoModelForCausalLM

    import sparseforge_fx as sf

    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_pretrained(request["model"], dtype=getattr(torch, request["dtype"])).eval()
    count = request["steps"] * request["batch_size"]
    ids = torch.randint(0, net.config.vocab_size, (count, request["length"]))
    rows: list[dict[str, float]] = []
    sf.sparsify(
        net, [{"input_ids": part, "labels": part} for part in ids.split(request["batch_size"])], start="wanda",
        calibration=1, steps=request["steps"], compile=request["compile"], show_progress=False,
        on_step=lambda _, row: rows.append({"seconds": row["seconds"], "loss": row["loss"]}),
    )  # fmt: skip
    modules = [sf.__file__, sys.modules["sparseforge_fx.passes"].__file__]
    result.write_text(json.dumps({"modules": modules, "steps": rows}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(json.loads(sys.argv[2]), Path(sys.argv[3]))
    else:
        typer.run(main)
