"""The command line, a file per command. Commands import torch when they run, so that ``--help`` is quick.

Bad input ends in one sentence on standard error and exit code 2, with nothing written.
"""

from sparseforge_fx.cli import (
    benchmark,
    evaluate,
    export,
    generate,
    inspect,
    lower,
    plan,
    quantize,
    report,
    rotate,
    serve,
    sparsify,
)
from sparseforge_fx.cli.app import app

__all__ = [
    "app",
    "benchmark",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "lower",
    "main",
    "plan",
    "quantize",
    "report",
    "rotate",
    "serve",
    "sparsify",
]


def main() -> None:
    """Entry point of ``sparseforge-fx``."""
    app()
