"""What `sparsify --dry-run` says beforehand beside what the run then takes, fresh processes in turn; one json.

    python examples/benchmarks/forecasts.py FOLDER --data TEXT --tokenizer FOLDER [--model smollm2-135m] [--blocks 4] \\
        [-- OPTIONS OF SPARSIFY ...]

FOLDER gets a model of a published shape with random weights and so many blocks, and the output; both are removed. The two
follow each other, so many rounds of both; medians. On a machine that does other things neither number says much.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from common import SHAPES, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparseforge_fx.report import environment


def main(
    folder: Path,
    data: Annotated[str, typer.Option(help="text to train on or to calibrate by")],
    tokenizer: Annotated[str, typer.Option(help="a folder; its vocabulary is no larger than the model's")],
    options: Annotated[list[str] | None, typer.Argument(help="of sparsify, behind --")] = None,
    model: str = "smollm2-135m",
    blocks: int = 4,
    rounds: int = 3,
    label: str = "",
) -> None:
    here = environment()
    write_model(folder / "model", model, blocks, tokenizer)
    output = folder / "sparse"
    command = ["sparsify", str(folder / "model"), "--data", data, "-o", str(output), *(options or [])]
    said: list[dict[str, float]] = []
    took: list[dict[str, float]] = []
    for _ in range(rounds):
        said.append(json.loads(run([*command, "--dry-run", "--json"]))["predicted"])
        run(command)
        report = json.loads((output / "report.json").read_text())
        took.append({name: report[name] for name in ("seconds", "peak_memory_bytes")})
        if curves := report.get("curves"):
            took[-1] |= {
                "step": median(row["seconds"] for row in curves),
                "start": report.get("calibration_seconds", 0.0),
            }
        shutil.rmtree(output)
        print({name: told / took[-1][name] for name, told in said[-1].items() if took[-1].get(name)})
    predicted, measured = middle(said), middle(took)
    record: dict[str, Any] = {
        "model": model, "blocks": blocks, "options": options or [], "method": report["method"], "rounds": rounds,
        "predicted": predicted, "measured": measured, "all": {"predicted": said, "measured": took},
        "ratio": {name: told / measured[name] for name, told in predicted.items() if measured.get(name)},
    }  # fmt: skip
    save("forecasts", label or f"{model}-{blocks}-{report['method']}", record, here)
    print(record["ratio"])
    shutil.rmtree(folder / "model")


def middle(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of each number."""
    return {name: median(one[name] for one in rounds) for name in rounds[0]}


def write_model(folder: Path, name: str, blocks: int, tokenizer: str) -> None:
    config = copy.deepcopy(SHAPES[name])
    config.num_hidden_layers, config.vocab_size = blocks, SHAPES["smollm2-135m"].vocab_size
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


def run(arguments: list[str]) -> str:
    return subprocess.run(
        [sys.executable, "-m", "sparseforge_fx.cli", *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


if __name__ == "__main__":
    typer.run(main)
