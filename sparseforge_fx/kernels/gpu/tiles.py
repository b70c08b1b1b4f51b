"""Tile shapes of the GPU kernels: what is legal on a device, and which was measured to be best there.

A choice is made by :func:`remember` (which the tuning in ``planes_linear.py`` calls) and kept in a small json file per
device and Triton version; without one, the first legal tile is taken. Nothing is timed while a graph is traced or run.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.files import new_file

GEMV_ROWS = 4  # more rows of x than this go to tensor cores
DECODE_ROWS = 128  # and more than this to the dense GEMM
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


class Tile(NamedTuple):
    """One program's part of the weight, and how it is run.

    Attributes:
        rows: rows of the weight.
        words: words of each plane that one step reads; 32 ``words`` inputs.
        warps: warps of a program.
        stages: software pipeline stages.
        split: programs that share a row's sum; their parts are added in order by a second kernel.
        lines: rows of x; the GEMV takes all of its own.
        pairs: neighbours of a group in two products (warp-group matrix instructions).
    """

    rows: int
    words: int
    warps: int
    stages: int = 1
    split: int = 1
    lines: int = 0
    pairs: bool = False


def bucket(m: int) -> int:
    """Rows of x that one tuned choice covers: 1 to 4 each, then powers of two up to 128."""
    if m <= GEMV_ROWS:
        for exact in range(1, GEMV_ROWS):
            if m == exact:
                return exact
        return GEMV_ROWS
    for power in (8, 16, 32, 64):
        if m <= power:
            return power
    return DECODE_ROWS


def legal_tiles(capability: int, rows: int, words: int, lines: int) -> list[Tile]:
    """Tiles for a weight of ``rows`` rows and ``words`` words a plane, ``lines`` from :func:`bucket`; best guess first.

    ``capability``: 80, 90, 120, ... Every one fits into shared memory; of those compiled offline (Triton 3.6) none
    spilled a register.
    """
    shapes = _gemv_shapes(lines) if lines <= GEMV_ROWS else []
    dots = _dot_shapes(capability, max(lines, 8)) if lines > 1 else []
    # with three rows the arithmetic of a GEMV costs more than the weight's bytes
    shapes = dots + shapes if lines > 2 else shapes + dots
    wide = max(32, 1 << max(words - 1, 0).bit_length())
    fitting = [t for t in shapes if t.words <= wide and shared_bytes(t, capability) <= _shared_limit(capability)]
    tiles = []
    for tile in fitting:
        steps = -(-words // tile.words)
        for split in (1, 2, 4, 8):
            if split == 1 or (split <= steps and -(-rows // tile.rows) * split <= 1056):
                tiles.append(tile._replace(split=split))
    # enough programs to fill 132 multiprocessors decides the first guess; then as listed
    return sorted(tiles, key=lambda t: (-(-rows // t.rows) * t.split < 132, fitting.index(t._replace(split=1))))


def _gemv_shapes(lines: int) -> list[Tile]:
    twice = [Tile(16, 128, 8)] if lines == 1 else []  # two weight rows a thread; with more lines registers spill
    return [
        Tile(8, 128, 8),
        *twice,
        Tile(4, 128, 4),
        Tile(1, 512, 4),
        Tile(16, 64, 8),
        Tile(8, 64, 4),
        Tile(16, 32, 4),
    ]


def _dot_shapes(capability: int, lines: int) -> list[Tile]:
    # sixteen weight rows a warp: otherwise two warps expand the same weights
    two_warps = [Tile(32, 32, 2, 2), Tile(32, 16, 2, 3), Tile(16, 32, 1, 2)]
    four_warps = [Tile(64, 16, 4, 2), Tile(64, 32, 4, 2)]
    if capability // 10 == 8:  # two registers too many
        two_warps, four_warps = two_warps[1:], four_warps[:1]
    if capability // 10 == 9:  # four warps are a warp group: its instruction takes pairs from registers
        four_warps = [t._replace(pairs=True) for t in four_warps]
        two_warps = [Tile(32, 16, 2, 3), Tile(32, 16, 2, 4), Tile(32, 32, 2, 2), Tile(16, 32, 1, 2)]  # as measured
    if lines <= 32:
        return [t._replace(lines=lines) for t in (*two_warps, *four_warps)]
    narrow = [t._replace(lines=32) for t in (*two_warps, *four_warps) if t.words == 16]  # weights again, from L2
    return [*narrow, Tile(32, 16, 2, 2, lines=64), *(t._replace(lines=64) for t in four_warps if t.words == 16)]


def shared_bytes(tile: Tile, capability: int) -> int:
    """Shared memory of one program, at most: the stages' pairs, metadata and x, and 8 KiB to exchange results."""
    if not tile.lines:
        return 8192
    weight, x = 9 * 4 * tile.rows * tile.words, 8 * 8 * tile.lines * tile.words
    group = int(capability // 10 == 9 and tile.warps == 4)  # the warp-group instruction reads x from one buffer more
    return (tile.stages - 1) * (weight + x) + group * x + 8192


def _shared_limit(capability: int) -> int:
    known = [SHARED_BYTES[c] for c in sorted(SHARED_BYTES) if c <= capability]
    if not known:
        raise SparseForgeError(
            f"the 2:4 kernels need compute capability 8.0, not {capability / 10:.1f}: keep the model dense"
        )
    return known[-1]


@cache
def capability_of(device: torch.device) -> int:
    """80, 90, ... of a CUDA device; 80 for a CPU, where the interpreter runs the same tiles."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def pick(device: torch.device, rows: int, words: int, lines: int, dtype: torch.dtype, bits: int = 16) -> Tile:
    """The remembered tile for this device and shape, or the first legal one."""
    tiles = legal_tiles(capability_of(device), rows, words, lines)
    kept = _remembered(cache_file(device)).get(_key(rows, words, lines, dtype, bits))
    return kept if kept in tiles else tiles[0]


def remember(
    device: torch.device, rows: int, words: int, lines: int, dtype: torch.dtype, tile: Tile, bits: int = 16
) -> None:
    """Keep a measured choice, for this process and the next ones."""
    file = cache_file(device)
    known = _remembered(file)
    known[_key(rows, words, lines, dtype, bits)] = tile
    try:
        with new_file(file, shared=True) as partial:
            partial.write_text(json.dumps({key: list(value) for key, value in sorted(known.items())}, indent=1) + "\n")
    except OSError:
        return  # a read-only home costs the next process its tuning, nothing else


@cache
def cache_file(device: torch.device) -> Path:
    """Where choices for this device are kept: ``$XDG_CACHE_HOME/sparseforge_fx`` or ``~/.cache/sparseforge_fx``."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "sparseforge_fx" / re.sub(r"[^A-Za-z0-9.]+", "-", f"tiles {name} triton {_triton_version()}.json")


@cache
def _remembered(file: Path) -> dict[str, Tile]:
    try:
        return {key: Tile(*value) for key, value in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # not there, or not ours: tune again


def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def _key(rows: int, words: int, lines: int, dtype: torch.dtype, bits: int) -> str:
    codes = f" int{bits}" if bits < 16 else ""
    return f"{rows}x{words}x{lines} {str(dtype).removeprefix('torch.')}{codes}"
