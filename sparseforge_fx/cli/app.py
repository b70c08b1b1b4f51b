"""The typer application, the options that commands share, and how they print and fail."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.console import Console

from sparseforge_fx.errors import SparseForgeError, SparseForgeWarning, one_line

PROGRAM = "sparseforge-fx"
app = typer.Typer(
    name=PROGRAM,
    no_args_is_help=True,
    epilog=f"Begin with: {PROGRAM} inspect MODEL. {PROGRAM} VERB --help has examples; --install-completion lets your "
    "shell complete verbs and options.",
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(metadata.version(PROGRAM))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make PyTorch models exactly 2:4 sparse, and keep their accuracy by distillation."""


QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bars, too; ours is loading_bar
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # DistributedDataParallel's advice on its own options
}

Model = Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, or a GGUF file.", show_default=False)]
PatternOption = Annotated[str, typer.Option("--pattern", help="Keep at most N of every M weights along the input.")]
Include = Annotated[
    list[str], typer.Option("--include", help="Only weights, or all in modules, that match this glob (repeatable).")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="To compute in: bfloat16, float16 or float32; default the checkpoint's or, on a CPU where that is slower, "
        "float32.",
    ),
]
Tokens = Annotated[
    list[int] | None,
    typer.Option("--tokens", help="Token counts (batch x sequence) that matter (repeatable); default: sf.lower's."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print all numbers as json, and nothing else.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")]
Exclude = Annotated[
    list[str],
    typer.Option("--exclude", help="Keep dense the weights, or all in modules, that match this glob (repeatable)."),
]


def examples(*lines: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What the help of a command shows below its options: (arguments, what that does), as ``arguments  # does``."""
    shown = "\n\n".join(["Examples:", *(f"{PROGRAM} {line}" for line in lines)])

    def mark(function: Callable[..., None]) -> Callable[..., None]:
        function.epilog = shown  # type: ignore[attr-defined]
        return function

    return mark


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a guarded command, during which only we speak."""

    @functools.wraps(function)
    def quietly(*args: Any, **given: Any) -> None:
        with quiet():
            function(*args, **{name: at_home(name, value) for name, value in given.items()})

    return app.command(epilog=getattr(function, "epilog", None))(guard(quietly))


def at_home(name: str, value: Any) -> Any:
    """A path with the home folder for its ``~``, which shells leave in ``--output=~/out``; anything else as it is."""
    if isinstance(value, Path) or (name in ("model", "dense", "teacher", "plan") and isinstance(value, str)):
        return type(value)(os.path.expanduser(value))
    return value


def guard(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose expected errors become one line on standard error."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):  # a model writes what a terminal of ASCII cannot show
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            function(*args, **kwargs)
        except (SparseForgeError, OSError) as error:
            _say(f"error: {as_typed(one_line(error, lines=None, limit=None), function)}")
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            notes = getattr(error, "__notes__", None) or ["nothing was written"]
            _say("; ".join(["interrupted", *notes]))
            raise typer.Exit(getattr(error, "exit_code", 130)) from error

    return guarded


#: an argument of Python with a plain value, behind no --set; and a call that is not closed
ARGUMENT = re.compile(r"(?<![\w(,.=-])(?<!--set )([a-z_]+)=([\w.+-]*\w)(?![\w(=\[])")
OPEN_CALL = re.compile(r"\w\([^()]*$")


def as_typed(text: str, command: Callable[..., None]) -> str:
    """Arguments that an error names as Python has them, as options of the command."""
    takes = get_type_hints(command)

    def typed(found: re.Match) -> str:
        name, value = found.groups()
        if OPEN_CALL.search(text, 0, found.start()):
            return found[0]
        if name not in takes:
            return f"--set {found[0]}" if "change" in takes else found[0]
        kinds = get_args(takes[name]) or (takes[name],)
        if str in kinds or (int in kinds and value.isdecimal()) or (float in kinds and not value[0].isalpha()):
            return f"--{name.replace('_', '-')} {value}"
        return found[0]  # a switch, or a word that the command does not take

    return ARGUMENT.sub(typed, text)


def _say(text: str) -> None:
    """On standard error; of several processes one does."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from sparseforge_fx.training.processes import first_to_say

        if not first_to_say():
            return
    print(text, file=sys.stderr, flush=True)


def pick_device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SparseForgeError(f"the device {name} cannot be used here: {one_line(error)}") from error
    return device


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Loading bars, advice and warnings of the libraries below would drown the one line that matters.

    Most are told through the environment, before they are imported: a command that needs none of them does not wait.
    What the user has set there, and Python's own ``-W``, is left alone.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", SparseForgeWarning)
            warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def stdout(*, quiet: bool = False) -> Console:
    """Standard output; wide enough for the tables where it is a file. ``quiet``: nothing, because json goes there."""
    plain: dict[str, Any] = {"quiet": quiet, "markup": False, "emoji": False}  # a name may have brackets and colons
    console = Console(**plain)
    return console if console.is_terminal else Console(width=140, **plain)


def print_json(value: Any) -> None:
    """All of standard output, for a program that reads it."""
    print(json.dumps(value, indent=1, default=str))


def readable_bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def read_bytes(option: str, text: str) -> int:
    """``2GB`` -> 2000000000: what :func:`readable_bytes` writes. Raises SparseForgeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", text.strip(), re.IGNORECASE)
    scale = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
    count = round(float(match[1]) * scale[match[2].lower()]) if match else 0
    if count < 1:
        raise SparseForgeError(f"{option} {text} is no size: write 2GB or 500MB, say")
    return count


def grouped(rows: list[dict[str, Any]], key: Callable[[dict[str, Any]], tuple]) -> dict[tuple, list[dict[str, Any]]]:
    """Rows that differ only in the numbers in their names, under the name with the numbers as ``*``."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", row["name"]), *key(row)), []).append(row)
    return {(v[0]["name"], *k[1:]) if len(v) == 1 else k: v for k, v in groups.items()}


def tell_packed(report: Any, output: Path, as_json: bool = False) -> None:
    """What was written to ``output``, by the report of it."""
    if as_json:
        print_json({**report, "output": str(output)})
    console = stdout(quiet=as_json)
    before, after = readable_bytes(report["dense_bytes"]), readable_bytes(report["lowered_bytes"])
    console.print(f"{len(report['sites'])} packed linears: {before} dense, {after} now", highlight=False)
    for note in report.get("notes", ()):
        console.print(f"note: {note}", highlight=False)
    files = output.iterdir() if output.is_dir() else [output]
    size = readable_bytes(sum(file.stat().st_size for file in files))
    console.print(f"wrote {output}, {size}", highlight=False)
