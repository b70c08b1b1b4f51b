"""``--device disk``: models larger than memory, and when to think of it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseforge_fx.cli.app import print_json, read_bytes, stdout
from sparseforge_fx.errors import SparseForgeError

if TYPE_CHECKING:
    import torch

    from sparseforge_fx.training.recipe import Recipe

DISK = "disk"


def on_disk(device: str | None, **given: Any) -> bool:
    """Are the weights to stay on disk? Raises SparseForgeError for what a walk from there has no use for."""
    names = [name for name, value in given.items() if value]
    if device == DISK and names:
        raise SparseForgeError(f"--device disk has no use for --{names[0].replace('_', '-')}: leave it out")
    return device == DISK


def activation_limit(text: str | None, walks: bool) -> int | None:
    """Bytes of activations that stay in memory. Raises SparseForgeError where none go to files."""
    if text is not None and not walks:
        raise SparseForgeError(
            "--activation-bytes is for --device disk and a method that does not train: leave it out here"
        )
    return None if text is None else read_bytes("--activation-bytes", text)


def check_before(recipe: Recipe, output: Path, *, resume: bool, overwrite: bool, activation_bytes: int | None) -> None:
    """Raise SparseForgeError for what the run would refuse at once."""
    from sparseforge_fx.training.from_disk import check_method
    from sparseforge_fx.training.walk_folder import check_place

    check_method(recipe.config(recipe.data is not None), recipe.data, activation_bytes)
    check_place(output, resume=resume, overwrite=overwrite)


def run_on_disk(recipe: Recipe, output: Path, *, as_json: bool, **how: Any) -> None:
    """Prune block by block, and print what ``sparsify`` prints, on the first process; ``how`` goes to
    :func:`sparseforge_fx.sparsify_on_disk`."""
    from sparseforge_fx.cli.report import summary
    from sparseforge_fx.training.from_disk import sparsify_on_disk
    from sparseforge_fx.training.processes import Processes
    from sparseforge_fx.training.walk_folder import how_to_go_on

    assert recipe.model is not None
    try:
        report = sparsify_on_disk(recipe.model, recipe=recipe, output=output, **how)
    except KeyboardInterrupt as error:
        if told := how_to_go_on(output):
            error.add_note(told)
        raise
    if not Processes().first:
        return
    if as_json:
        print_json(report)
    console = stdout(quiet=as_json)
    console.print(summary(report))
    told = f"wrote {output}; next: sparseforge-fx evaluate {output} --dense {recipe.model} --device disk"
    told += f"; train it: sparseforge-fx {healing(output, recipe)}"
    console.print(told, highlight=False)


def healing(output: Path, recipe: Recipe) -> str:
    """The command that trains what a method has pruned that does not train."""
    asked: dict[str, Any] = {"--teacher": recipe.model, "--set": "start=magnitude", "--data": recipe.data or "DATA"}
    asked |= {"--pattern": recipe.pattern, "--plan": recipe.plan}
    words = [word for option, value in asked.items() if value is not None for word in (option, str(value))]
    for option, globs in (("--include", recipe.include), ("--exclude", recipe.exclude)):
        words += [word for glob in globs for word in (option, glob)]
    return shlex.join(["sparsify", str(output), *words, "-o", "healed"])


def windows_at_once(config: Any, dtype: torch.dtype, context: int) -> int:
    """How many windows half of the free memory takes: the whole checkpoint is read for each batch of them."""
    import psutil

    text = config.get_text_config()
    inner = getattr(text, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * text.hidden_size
    token = dtype.itemsize * (2 * text.vocab_size + 16 * text.hidden_size + 4 * inner)  # logits twice: float32 of them
    return max(1, int(psutil.virtual_memory().available / 2 / (token * context)))


def suggest(model: str) -> None:
    """Say so where the weights of a folder take more than the memory that is free."""
    import psutil

    size = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    free = psutil.virtual_memory().available
    if size > free:
        told = f"{model} has {size / 1e9:.1f} GB of weights and {free / 1e9:.1f} GB of memory are free"
        print(f"note: {told}: --device disk prunes block by block", file=sys.stderr)
