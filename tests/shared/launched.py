"""The command line on several processes, as torchrun starts them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def start(arguments: list[str], home: Path, ranks: int = 2, **environment: str) -> subprocess.Popen:
    """``sparseforge-fx`` with these arguments under torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(port)]
    own = {"OMP_NUM_THREADS": "1", "HF_HOME": str(home / "cache"), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [*launch, "-m", "sparseforge_fx.cli", *map(str, arguments)],
        env=os.environ | own | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(run: subprocess.Popen, seconds: float = 300) -> tuple[int, str, str]:
    """Exit code and what was said, on standard output and on standard error."""
    try:
        said = run.communicate(timeout=seconds)
    finally:
        run.kill()
    return run.returncode, *said


def wait_for(run: subprocess.Popen, so: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until it is so, while the run goes on."""
    end = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < end and run.poll() is None, run.communicate()
        time.sleep(0.01)


def wait_for_step(run: subprocess.Popen, state: Path, step: int) -> None:
    """Wait until a state of that step, or of a later one, is complete."""
    wait_for(run, lambda: any(int(f.name[5:]) >= step for f in state.glob("step-*")))


def kill_one(run: subprocess.Popen, rank: int) -> None:
    """SIGKILL to one of the processes that torchrun started."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[rank]), signal.SIGKILL)
