"""``export``: a 2:4 model as one file that runs without its Python code, in the formats of PyTorch."""

from __future__ import annotations

import dataclasses
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree
from transformers.utils import ModelOutput

from sparseforge_fx.deploy.export.aoti import package
from sparseforge_fx.deploy.export.archive import seal
from sparseforge_fx.deploy.lowering import cost_table
from sparseforge_fx.deploy.lowering.lower import lower_captured
from sparseforge_fx.deploy.lowering.report import PackingReport
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.files import check_parent, disk_full_told, move_file
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.ranges import checked

FORMATS = ("pt2", "aoti")


@checked
def export(
    model: nn.Module,
    path: str | Path,
    example_inputs: Any = None,
    *,
    format: str = "pt2",
    portable: bool = False,
    target: str = "auto",
    tokens: Sequence[int] | None = None,
    table: str | Path | cost_table.Table | None = None,
    gate: bool = True,
) -> PackingReport:
    """Lower a 2:4 model and write its graph and packed weights to one file; batch and sequence stay dynamic.

    Args:
        path: a file whose name ends in ``.pt2``; written beside and renamed.
        example_inputs: as for :func:`sparseforge_fx.graph.capture.capture`.
        format: ``pt2``: an ExportedProgram, ``torch.export.load(path).module()``. Its sparse linears are this package's
            operator: ``import sparseforge_fx.kernels.sparse_linear`` before loading, or ``.sparse_experts``, if
            experts are packed. ``aoti``: compiled by AOTInductor for this machine's kind of processor,
            ``torch._inductor.aoti_load_package(path)``, or C++ (see examples/cpp): the sparse kernels are inside,
            Python and this package are not needed, the torch version that it was compiled with is. It takes contiguous
            inputs and does not look (AOTI_RUNTIME_CHECK_INPUTS=1 in the environment lets it).
            For a model on a CUDA device the toolkit's headers must be there: CUDA_HOME, which may be the folder
            nvidia/cu13 of site-packages after ``pip install nvidia-cuda-crt nvidia-cuda-cccl`` beside torch.
        portable: ``pt2`` of plain aten operators: torch alone runs it. The file is as small, but weights are
            expanded in every call.
        target, tokens, table, gate: as for :func:`sparseforge_fx.lower`. Linears that are packed already
            (:func:`sparseforge_fx.load`, :func:`sparseforge_fx.lower_modules`) stay so.

    The file has checksums, at which torch does not look: :func:`sparseforge_fx.check_export` does. Load either format
    only from people you trust: torch unpickles parts of ``pt2``, and ``aoti`` is compiled code.

    A Hugging Face model's output becomes a plain dict of its fields. The same model gives the same bytes again. Returns
    the report of :func:`sparseforge_fx.lower` with ``file_bytes`` and ``notes`` (dimensions that had to be fixed).
    Raises SparseForgeError, with nothing written.
    """
    check_path(path)
    if format not in FORMATS:
        raise SparseForgeError(f"unknown format {format!r}; choose {' or '.join(FORMATS)}")
    if portable and format != "pt2":
        raise SparseForgeError("portable is for the format pt2: a package of aoti needs no sparseforge_fx anyway")
    captured = capture(model, example_inputs)
    options: dict[str, Any] = {"target": target, "tokens": tokens, "table": table, "gate": gate, "durable": True}
    program, report = lower_captured(captured, portable=portable, **options)
    plain_outputs(program.exported)
    own_empties(program)
    if format == "aoti":
        replace_file(path, lambda file: package({"model": program}, file))
    else:
        replace_file(path, lambda file: torch.export.save(program.exported, file))
    notes = [*report["notes"], *program.notes]
    return {**report, "format": format, "notes": notes, "file_bytes": Path(path).stat().st_size}


def check_path(path: str | Path) -> None:
    """Raise SparseForgeError unless a ``.pt2`` file can be written there."""
    path = Path(path)
    if path.suffix != ".pt2":
        raise SparseForgeError(f"{path} does not end in .pt2, which torch insists on: rename it")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise SparseForgeError(f"{path} cannot be written: it is a folder, or its folder is not there")
    check_parent(path)


def replace_file(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` make an archive in a folder of its own, then move it to ``path``: never half a file, and sealed.

    Raises SparseForgeError where the disk is full.
    """
    path = Path(path).absolute()
    with disk_full_told(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        made = Path(folder) / "model.pt2"
        with _Patient(made, "wb") as file:  # and not its name, which the archive would hold
            write(cast(IO[bytes], file))
        if file.error is not None:
            raise file.error
        seal(made)
        move_file(made, path)


class _Patient(io.FileIO):
    """A file that takes whatever comes, and keeps what went wrong: torch's writer aborts the process on an error."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data)
        size = left.nbytes
        while left.nbytes and self.error is None:
            try:
                left = left[super().write(left) :]
            except OSError as error:
                self.error = error
        return size


def own_empties(program: Exported) -> None:
    """Give each empty tensor (the bitmask of a dense weight) memory of its own: one that was cut out of a file begins
    before what it is cut from, for torch's writer, and a negative size is read from that."""
    for name, tensor in program.state.items():
        if tensor.numel() == 0:
            own = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            program.state[name] = nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own


def plain_outputs(exported: ExportedProgram) -> None:
    """Let the program return dicts where the model returned objects of transformers, which a stranger has not."""
    entry = exported.module_call_graph[0]
    assert entry.signature is not None and entry.signature.out_spec is not None
    signature = dataclasses.replace(entry.signature, out_spec=_plain(entry.signature.out_spec))
    exported.module_call_graph[0] = dataclasses.replace(entry, signature=signature)


def _plain(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    children = [_plain(child) for child in spec.children()]
    if isinstance(spec.type, type) and issubclass(spec.type, ModelOutput):
        names = spec.context[0] if isinstance(spec.context, tuple) else spec.context
        return pytree.TreeSpec(dict, list(names), children)
    return pytree.TreeSpec(spec.type, spec.context, children) if children else spec
