"""``sparseforge-fx export``: a 2:4 model as a file or folder that others run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparseforge_fx.cli.app import AsJson, DryRun, Model, Tokens, command, examples, pick_device, tell_packed
from sparseforge_fx.cli.dry_run import of_export, tell
from sparseforge_fx.errors import SparseForgeError

FORMATS = ("pt2", "aoti", "safetensors")
MAX_LENGTH = "Tokens that the cache of a generator holds; default 1024, or as many as the model has positions."


@command
@examples(
    "export out -o model.pt2",
    "export out --format aoti --generator -o generator.pt2",
    "export out --format safetensors -o packed",
    "export out -o model.pt2 --dry-run",
)
def export(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file (.pt2) or, for safetensors, the folder.")],
    format: Annotated[str, typer.Option(help=f"{', '.join(FORMATS)}.")] = "pt2",
    generator: Annotated[
        bool, typer.Option("--generator", help="Prompt and next-token graphs with a key/value cache, for `generate`.")
    ] = False,
    max_length: Annotated[int | None, typer.Option(help=MAX_LENGTH)] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="pt2 of plain aten operators: torch alone runs it.")
    ] = False,
    tokens: Tokens = None,
    gate: Annotated[
        bool | None, typer.Option("--gate/--no-gate", help="Of a graph: pack only what was measured to be faster here.")
    ] = None,
    table: Annotated[Path | None, typer.Option(help="Decide by a table that `lower -o` wrote.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: cuda where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; default: the checkpoint's.")] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write MODEL, which is 2:4, as an ExportedProgram, an AOTInductor package, or a packed checkpoint."""
    from sparseforge_fx.deploy.checkpoints.load import load
    from sparseforge_fx.deploy.checkpoints.save import save_packed
    from sparseforge_fx.deploy.export.export import check_path
    from sparseforge_fx.deploy.export.export import export as export_model
    from sparseforge_fx.deploy.export.generation import export_generator
    from sparseforge_fx.files import check_output
    from sparseforge_fx.models.companions import companions

    if format not in FORMATS:
        raise SparseForgeError(f"unknown format {format!r}; choose {', '.join(FORMATS)}")
    timing = {"--tokens": bool(tokens), "--table": table is not None}
    if format == "safetensors":
        named = {"--generator": generator, "--portable": portable, "--max-length": max_length is not None}
        named |= {"--gate" if gate else "--no-gate": gate is not None, "--device": device is not None, **timing}
        _refuse(named, "is for graphs; a packed checkpoint has none, and all that is 2:4 is packed")
        check_output(output)
    else:
        if generator and portable:
            raise SparseForgeError("--generator needs this package's operators: leave --portable out")
        if not generator:
            _refuse({"--max-length": max_length is not None}, "is of the cache of a generator, without --generator")
        if portable:
            _refuse({"--gate": gate is True, **timing}, "is for timing, and --portable packs all that is 2:4 untimed")
        if gate is False:
            _refuse(timing, "is for timing, and --no-gate packs all that is 2:4 untimed")
        check_path(output)
    timed = format != "safetensors" and gate is not False and not portable
    if dry_run:
        tell(of_export(model, output, format, tokens, timed and table is None, dtype), as_json)
        return
    loaded, tokenizer = load(model, dtype=dtype)
    if format == "safetensors":
        report = save_packed(loaded, tokenizer, output, beside=companions(model))
    else:
        moved: Any = loaded.to(pick_device(device))
        options: dict[str, Any] = {"format": format, "tokens": tokens or None, "table": table}
        options["gate"] = gate is not False
        if generator:
            report = export_generator(moved, output, tokenizer, max_length=max_length, **options)
        else:
            report = export_model(moved, output, portable=portable, **options)
    tell_packed(report, output, as_json)


def _refuse(given: dict[str, bool], why: str) -> None:
    """Raise SparseForgeError for the first option that is given and has no part in this."""
    for name in (name for name, is_given in given.items() if is_given):
        raise SparseForgeError(f"{name} {why}: leave {name} out")
