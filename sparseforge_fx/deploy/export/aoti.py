"""Programs compiled by AOTInductor, with this package's kernels in the library that comes out.

On a CPU our C++ library is linked in; on a CUDA device the graph holds the Triton kernels themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.exc import CppCompileError, InductorError
from torch.export.pt2_archive._package import package_pt2
from torch.types import FileLike

from sparseforge_fx.deploy.lowering.lower import refuse_packed_experts
from sparseforge_fx.errors import SparseForgeError, one_line
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.kernels import cpu
from sparseforge_fx.kernels.decode_attention import DECODE_ATTENTION_OP
from sparseforge_fx.kernels.sparse_experts import PACKED_EXPERTS_OP
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.passes import package_passes, run_passes
from sparseforge_fx.passes.rewrite import sparse_use

#: a value that several nodes read is kept: by default every layer computes the rotary sines and cosines once more,
#: which shows in a step of one token in few bits. Loops are shared out over the threads of whoever runs the package: by
#: default those of one that was compiled by a single thread never are, however many cores there are
_ON_CPU: dict[str, Any] = {"realize_reads_threshold": 0, "cpp.dynamic_threads": True}
_PACKED = "AtenTensorHandle x, AtenTensorHandle values, AtenTensorHandle meta, const char* layout, int64_t in_features"
# the functions of kernels/cpu/aoti.cpp
_SHIMS = {
    DECODE_ATTENTION_OP: """AOTITorchError aoti_torch_cpu_decode_attention(AtenTensorHandle query, AtenTensorHandle key,
    AtenTensorHandle value, AtenTensorHandle* mask, double scale, AtenTensorHandle* result)""",
    OP: f"""AOTITorchError aoti_torch_cpu_sparse_linear({_PACKED},
    AtenTensorHandle* bias, const char* activation, AtenTensorHandle* scales, AtenTensorHandle* result)""",
    PACKED_EXPERTS_OP: f"""AOTITorchError aoti_torch_cpu_sparse_experts({_PACKED},
    AtenTensorHandle* offsets, AtenTensorHandle* bias, AtenTensorHandle* scales, AtenTensorHandle* result)""",
}


def package(
    programs: dict[str, Exported], file: FileLike, extra_files: dict[str, str] | None = None, **options: Any
) -> None:
    """Compile each program and write them to one package under these names; ``options`` are Inductor's.

    Raises SparseForgeError where a layout has no kernels that run without Python, or there is nothing to compile with.
    """
    programs = {name: with_kernels(program) for name, program in programs.items()}
    if _device(*programs.values()) == "cpu":
        options = {**_ON_CPU, **options}
    files: dict[str, list] = {}
    with kernels_linked(*programs.values()):
        for name, program in programs.items():
            args, kwargs = program.exported.example_inputs  # type: ignore[misc]
            try:
                made = torch._inductor.aot_compile(
                    program.exported.module(check_guards=False),  # type: ignore[arg-type]
                    args,
                    kwargs,
                    options={"aot_inductor.package": True, **options},
                )
            except (InductorError, CppCompileError) as error:
                raise SparseForgeError(_explain(error)) from error
            assert isinstance(made, list)
            # without the sources: they are not needed, and name folders of this machine
            files[name] = [f for f in made if not str(f).endswith(".cpp")]
    package_pt2(file, aoti_files=files, extra_files=extra_files)  # type: ignore[arg-type]


def with_kernels(program: Exported) -> Exported:
    """The program as it is compiled; on a CUDA device with the Triton kernels in the place of the sparse operator."""
    device = _device(program)
    program, _ = run_passes(program, package_passes(device))
    if device == "cpu":
        return program
    refuse_packed_experts(program, "aoti has for CPUs alone: choose the format pt2")
    left = {sparse_use(n).layout for n in program.graph.find_nodes(op="call_function", target=OP)}
    if left:
        raise SparseForgeError(
            f"packages of aoti have no kernels for the layout {', '.join(sorted(left))} on this device: use pt2"
        )
    return program


def _device(*programs: Exported) -> str:
    """Where weights are: on a CPU, or on a CUDA device."""
    return next((t.device.type for p in programs for t in p.state.values() if t.device.type != "cpu"), "cpu")


def _explain(error: Exception) -> str:
    line = next((line for line in str(error).splitlines() if "error:" in line), one_line(error))
    advice = ": set CUDA_HOME to a CUDA toolkit" if ".h:" in line else ""
    return f"AOTInductor cannot compile this graph here ({line.strip()[:300]}){advice}"


@contextmanager
def kernels_linked(*programs: Exported) -> Iterator[None]:
    """Within it, Inductor calls the C functions for our operators and links the library that has them."""
    ours = any(p.graph.find_nodes(op="call_function", target=op) for p in programs for op in _SHIMS)
    library = cpu.archive() if ours else None
    before = os.environ.get("LIBRARY_PATH")
    patches: dict[str, Any] = {}
    if library is not None:
        # the linker searches the folders of this variable; Inductor has no setting for one
        os.environ["LIBRARY_PATH"] = os.pathsep.join([str(library.parent), *filter(None, [before])])
        patches = {
            "aot_inductor.custom_ops_to_c_shims": {op: [shim] for op, shim in _SHIMS.items()},
            "aot_inductor.custom_op_libs": [library.stem.removeprefix("lib")],
        }
    try:
        with config.patch(patches):
            yield
    finally:
        if library is not None:
            if before is None:
                del os.environ["LIBRARY_PATH"]
            else:
                os.environ["LIBRARY_PATH"] = before
