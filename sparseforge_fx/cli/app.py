"""The typer application, the options that commands share, and how they print and fail."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console

from sparseforge_fx.errors import SparseForgeError

app = typer.Typer(
    name="sparseforge-fx",
    help="Make PyTorch models exactly 2:4 sparse, and keep their accuracy by distillation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, or a GGUF file.", show_default=False)]
PatternOption = Annotated[str, typer.Option("--pattern", help="Keep at most N of every M weights along the input.")]
Include = Annotated[
    list[str], typer.Option("--include", help="Only weights or modules that match this glob (repeatable).")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="To compute in: bfloat16, float16 or float32; default the checkpoint's or, on a CPU where that is slower, "
        "float32.",
    ),
]
Exclude = Annotated[list[str], typer.Option("--exclude", help="Keep what matches this glob dense (repeatable).")]


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a guarded command."""
    return app.command()(guard(function))


def guard(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose expected errors become one line on standard error."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (SparseForgeError, OSError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            print(f"error: {text}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from error

    return guarded


def pick_device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SparseForgeError(f"the device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def quiet() -> None:
    """Loading bars, advice and warnings of the libraries below would drown the one line that matters."""
    import warnings

    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)


def stdout() -> Console:
    """Standard output; wide enough for the tables where it is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def readable_bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def grouped(rows: list[dict[str, Any]], key: Callable[[dict[str, Any]], tuple]) -> dict[tuple, list[dict[str, Any]]]:
    """Rows that differ only in the numbers in their names, under the name with the numbers as ``*``."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", row["name"]), *key(row)), []).append(row)
    return {(v[0]["name"], *k[1:]) if len(v) == 1 else k: v for k, v in groups.items()}
