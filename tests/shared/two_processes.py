"""Two processes of one group, as a launcher would start them."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from forks import fork


def run_two(code: str, folder: Path) -> tuple[Any, Any]:
    """Run Python ``code`` as rank 0 and rank 1, with the folder and the rank as arguments; what each saved there as
    ``RANK.pt``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = dict(os.environ) | {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    ranks = [fork(_rank, code, folder, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    try:
        for rank in ranks:
            rank.join(300)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0], [(folder / f"{rank}.log").read_text() for rank in range(2)]
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    return first, second


def _rank(code: str, folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    rank = environment["RANK"]
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    sys.argv = ["-c", str(folder), rank]
    exec(compile(code, "<rank>", "exec"), {"__name__": "__main__"})
