"""Training state on disk: written beside the old one, then put in its place, so that a kill leaves a whole file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from sparseforge_fx.errors import SparseForgeError

FORMAT, VERSION = "sparseforge-fx training state", 1


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain values atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save({"format": FORMAT, "version": VERSION, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_state(path: Path) -> dict[str, Any]:
    """Read what :func:`save_state` wrote; nothing in the file is executed. Raises SparseForgeError on any other
    file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign file makes of the unpickler: there is no end to the list
        raise SparseForgeError(
            f"{path} is not a training state of sparseforge-fx ({type(error).__name__}); delete it to start anew"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise SparseForgeError(f"{path} is not a training state of sparseforge-fx; delete it to start anew")
    if state.get("version") != VERSION:
        raise SparseForgeError(
            f"{path} has version {state.get('version')}, this release reads {VERSION}; delete it to start anew"
        )
    return state
