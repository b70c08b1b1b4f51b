"""Compile a Triton kernel for a GPU that is not here, and count what came out. Needs Triton with its NVIDIA tools."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"x_ptr": "*bf16", "values_ptr": "*i32", "meta_ptr": "*i32", "scales_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16", "w_ptr": "*bf16", "parts_ptr": "*fp32"}  # fmt: skip


class Compiled(NamedTuple):
    conversions: int  # layout conversions, each a trip through shared memory
    shared: int  # bytes a program
    registers: int
    stack: int  # bytes of spilled registers
    sass: Counter  # opcode, and opcode with all its modifiers, -> how many


def compile_kernel(kernel, constants, capability, warps, stages=1, **types):
    """``constants`` are the kernel's constexpr arguments; ``types`` replaces pointer types, as y_ptr="*fp32"."""
    names = kernel.arg_names
    signature = {
        n: "constexpr" if n in constants else (types.get(n) or POINTERS[n] if n.endswith("_ptr") else "i32")
        for n in names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr")}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs=aligned,
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", cubin)
        listing = _run("nvdisasm", cubin)
    sass: Counter = Counter()
    for opcode in re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[T\d]+ )?([A-Z][A-Z0-9.a-z_]*)", listing, re.M):
        sass[opcode] += 1
        if "." in opcode:
            sass[opcode.split(".")[0]] += 1
    return Compiled(
        compiled.asm["ttgir"].count("ttg.convert_layout"),
        compiled.metadata.shared,
        int(re.search(r"REG:(\d+)", usage)[1]),
        int(re.search(r"STACK:(\d+)", usage)[1]),
        sass,
    )


def _run(tool, *arguments):
    return subprocess.run([str(TOOLS / tool), *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def tile_constants(tile, *, rows=1, tail=False, activation="none", bias=False, bits=16):
    """The constexpr arguments of ``gemv`` or ``dot`` for a tile, as ``planes_linear.launch`` gives them."""
    shared = {
        "BN": tile.rows,
        "BW": tile.words,
        "UNIT": 4,
        "TAIL": tail,
        "BITS": bits,
        "GROUP": 32 if bits == 4 else 0,
        "PARTS": bool(tile.lines) and activation == "silu_mul",
        "HAS_BIAS": bias,
        "ACTIVATION": activation,
        "ASM": True,
    }
    return shared | ({"BM": tile.lines, "PAIRS": tile.pairs} if tile.lines else {"ROWS": rows})
