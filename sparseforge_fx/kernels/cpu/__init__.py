"""The C++ kernels for CPUs: built on first use, kept in a cache folder, chosen at run time for the machine's
instruction set.

Without a C++ compiler everything still works, in plain torch; one warning says so.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path

import torch
from filelock import FileLock

from sparseforge_fx.errors import SparseForgeError, SparseForgeWarning, one_line
from sparseforge_fx.files import move_file

ISA_VARIABLE = "SPARSEFORGE_CPU_ISA"
_SOURCES = (
    "rows_linear.cpp",
    "codes_linear.cpp",
    "pairs_linear.cpp",
    "sparse_linear.cpp",
    "sparse_experts.cpp",
    "attention_backward.cpp",
    "decode_attention.cpp",
    "operator.cpp",
    "aoti.cpp",
    "attention_backward.h",
    "decode_attention.h",
    "decode_tile.h",
    "exp_of.h",
    "rows_linear.h",
    "sparse_experts.h",
    "codes_linear.h",
    "codes_tile.h",
    "pairs_linear.h",
    "pairs_tile.h",
    "multiply_in_tiles.h",
    "quantize.h",
    "numbers.h",
    "levels.h",
    "primitives.h",
    "tile.h",
    "finish.h",
    "amx.h",
    "amx_rows.h",
    "amx_bytes.h",
    "amx_codes.h",
    "amx_pairs.h",
)
_LOCK = threading.Lock()


def available() -> bool:
    """Whether the C++ kernels are there; the first call builds them (half a minute) or, if that fails, warns."""
    with _LOCK:
        return _load()


@functools.cache
def instruction_sets() -> tuple[str, ...]:
    """What the built library can run on this machine, slowest first: ``portable``, ``avx2``, ``avx512``,
    ``avx512_bf16``, ``amx``. Each one uses those before it where it has nothing better."""
    return tuple(torch.ops.sparseforge_cpu.instruction_sets()) if available() else ()


@functools.cache
def instruction_set() -> str:
    """The one in use: the best, or the environment variable SPARSEFORGE_CPU_ISA (read once). From the first call on,
    ``sparseforge::sparse_linear`` of packed rows runs in C++ alone.

    Raises SparseForgeError if the variable names one that this machine does not have.
    """
    known = instruction_sets()
    wanted = os.environ.get(ISA_VARIABLE) or known[-1]
    if wanted not in known:
        raise SparseForgeError(
            f"{ISA_VARIABLE}={wanted} is not one of this machine's {', '.join(known)}: name one of these"
        )
    torch.ops.sparseforge_cpu.use(wanted)
    return wanted


def max_rows(dtype: torch.dtype, in_features: int, *, quantized: bool = False) -> int:
    """So many rows of x are served by :func:`rows_linear`; for more, the weight is better expanded. -1: no kernel."""
    if not available():
        return -1
    return torch.ops.sparseforge_cpu.max_rows(dtype, quantized, in_features, instruction_set())


def archive() -> Path:
    """The same kernels as a static library, for other libraries to be linked with.

    Raises SparseForgeError without a C++ compiler.
    """
    if not available():
        raise SparseForgeError("the CPU kernels could not be built: install a C++ compiler (g++ or clang++)")
    return _folder() / f"lib{_name()}.a"


def rows_linear(x, values, bitmask, in_features, scales=None, bias=None, activation="none", isa=None):
    """act(x W^T + b) by the C++ kernel; call only if :func:`available`.

    Args:
        x: [..., in], bfloat16 or float32; values, bitmask, in_features, scales: a 2-D ``Packed`` of the same dtype, or
            of codes.
        isa: one of :func:`instruction_sets`; None for the one in use.

    Sums are float32. Every output is summed by one thread in an order that depends on the number of rows only: the
    same bits on every run and for any number of threads.
    """
    isa = instruction_set() if isa is None else isa
    return torch.ops.sparseforge_cpu.rows_linear(x, values, bitmask, in_features, bias, activation, scales, isa)


def rows_dense(values, bitmask, in_features, scales=None):
    """The dense weight [out, in] of a 2-D ``Packed`` of a 2- or 4-byte dtype, or of codes, then in float32; call only
    if :func:`available`."""
    return torch.ops.sparseforge_cpu.rows_dense(values, bitmask, in_features, scales)


def pairs_rows(isa=None) -> int:
    """So many rows of x are served by :func:`pairs_linear`; 0: none, for want of instructions or of the kernels."""
    return torch.ops.sparseforge_cpu.pairs_rows(isa or instruction_set()) if available() else 0


def vnni() -> bool:
    """Whether codes are multiplied by AVX-512's instructions for 8-bit integers."""
    return available() and torch.ops.sparseforge_cpu.vnni(instruction_set())


def pairs_linear(x, values, places, in_features, scales, bias=None, activation="none", isa=None):
    """act(x W^T + b), the weight in the layout of ``kernels/pairs.py``; call only where :func:`pairs_rows` is not 0."""
    isa = isa or instruction_set()
    return torch.ops.sparseforge_cpu.pairs_linear(x, values, places, scales, in_features, bias, activation, isa)


def pairs_dense(values, places, in_features, scales):
    """The dense weight [out, in] in float32; call only if :func:`available`."""
    return torch.ops.sparseforge_cpu.pairs_dense(values, places, scales, in_features)


@functools.cache
def differentiates_attention() -> bool:
    """Whether :func:`attention_backward` is there, on instructions for bfloat16."""
    if not available() or instruction_set() not in ("avx512_bf16", "amx"):
        return False
    torch.library.register_fake("sparseforge_cpu::attention_backward", _like_what_is_differentiated)
    return torch.ops.sparseforge_cpu.multiplies_bf16_blocks()


def _like_what_is_differentiated(gradient, query, key, value, mask, out, logsumexp, causal, scale):
    steps = (t if t.stride(3) == 1 and t.stride(2) >= t.shape[3] else t.contiguous() for t in (query, key, value))
    return tuple(torch.empty_like(t) for t in steps)


def attention_backward(gradient, query, key, value, mask, out, logsumexp, *, causal, scale):
    """The gradients of attention in query, key and value; call only where :func:`differentiates_attention`.

    Args:
        gradient, query, key, value, out: bfloat16 [B, H, L or S, D], D even, as many heads of keys as of queries.
        mask: bfloat16 [1 or B, 1 or H, L, S], added to the scores, or None.
        logsumexp: float32 [B, H, L], of the forward pass (``aten::_scaled_dot_product_flash_attention_for_cpu``).
    """
    given = gradient, query, key, value, mask, out, logsumexp
    return torch.ops.sparseforge_cpu.attention_backward(*given, causal, scale)


def decode_attention(query, key, value, mask, scale, isa=None):
    """``kernels/decode_attention.py``'s operator; call only if :func:`available`."""
    return torch.ops.sparseforge_cpu.decode_attention(query, key, value, mask, scale, isa or instruction_set())


def built() -> bool:
    """Whether :func:`available` has nothing to build."""
    library = _folder() / f"{_name()}.so"
    return library.exists() and library.with_name(f"lib{library.stem}.a").exists()


@functools.cache
def _load() -> bool:
    library = _folder() / f"{_name()}.so"
    try:
        if not built():
            library.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(library.parent.with_suffix(".lock")):  # of several processes one builds
                if not built():
                    _build(library)
                    return True
        torch.ops.load_library(library)
    except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
        reason = one_line(error)
        told = f"packed linears, and gradients of attention, run in plain torch on this CPU: no C++ kernel ({reason})"
        warnings.warn(told, SparseForgeWarning, stacklevel=4)
        return False
    return True


def _name() -> str:
    """Differs for different sources and torch versions: an old library is never taken for a new one."""
    here = Path(__file__).parent
    digest = hashlib.sha256(torch.__version__.encode())
    for source in _SOURCES:
        digest.update((here / source).read_bytes())
    return f"sparseforge_cpu_{digest.hexdigest()[:16]}"


def _folder() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root) / "sparseforge_fx"


def _build(library: Path) -> None:
    """Compile into a folder of our own, load, then move into the cache: another process never sees half a file."""
    from torch.utils.cpp_extension import load

    folder = tempfile.mkdtemp(prefix="build-", dir=library.parent)
    flags = ["-O3", "-std=c++20", "-Wno-psabi"]
    if torch.backends.openmp.is_available():
        flags.append("-fopenmp")
    try:
        load(
            library.stem,
            [str(Path(__file__).with_name(source)) for source in _SOURCES if source.endswith(".cpp")],
            extra_cflags=flags,
            build_directory=folder,
            is_python_module=False,
        )
        objects = [str(path) for path in sorted(Path(folder).glob("*.o"))]
        subprocess.run(["ar", "rcsD", f"{folder}/lib.a", *objects], check=True, capture_output=True)
        move_file(Path(folder) / "lib.a", library.with_name(f"lib{library.stem}.a"))
        move_file(Path(folder) / library.name, library)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
