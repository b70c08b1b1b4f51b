"""``sparsify``: the whole job in one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.files import check_output, check_parent, new_folder
from sparseforge_fx.graph.adapters import adapter_notes
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.catalog import find_preset
from sparseforge_fx.methods.config import MethodConfig
from sparseforge_fx.methods.reorder import tell_moved
from sparseforge_fx.models.companions import copy_companions
from sparseforge_fx.models.dense import write_checkpoint
from sparseforge_fx.models.streamed import StreamedModel
from sparseforge_fx.page.page import write_page
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.pattern import density
from sparseforge_fx.progress import shown
from sparseforge_fx.ranges import AtLeastZero, checked
from sparseforge_fx.report import describe_sites, environment, peak_memory_bytes, write_json
from sparseforge_fx.training import processes
from sparseforge_fx.training.anneal import anneal
from sparseforge_fx.training.in_parts import InParts, open_both
from sparseforge_fx.training.inputs import Run, open_run
from sparseforge_fx.training.one_shot import prune_once
from sparseforge_fx.training.prepare import check_weights
from sparseforge_fx.training.recipe import FILE, Recipe
from sparseforge_fx.training.taught import is_taught, look_at_teacher
from sparseforge_fx.training.unused import SAVE_SECONDS

#: in an output folder, by the weights' names; not beside the checkpoint's files, where it would be taken for one
SCALES = "values/scales.safetensors"


@dataclass
class SparsifyResult:
    """``model`` is the object that went in, its weights now exactly N:M; ``report`` is plain data for report.json;
    ``recipe`` repeats the run; ``scales`` are those of weights on a grid (``values="int4"``), which ``sf.quantize``
    packs by them exactly. Of a checkpoint on disk, ``in_parts``, each process has its part of the weights (DTensor)."""

    model: nn.Module
    report: dict[str, Any] = field(repr=False)
    recipe: Recipe = field(repr=False)
    scales: dict[str, Tensor] = field(default_factory=dict, repr=False)
    in_parts: InParts | None = field(default=None, repr=False)

    @processes.together()
    @checked
    def save(
        self, folder: str | Path, tokenizer: Any = None, *, overwrite: bool = False, beside: Sequence[Path] = ()
    ) -> None:
        """Write a plain Hugging Face folder with report.json, recipe.yaml to repeat the run, and the scales of weights
        on a grid, if there are any, whole or not at all; then report.html, a page of all that. Of a module that is none
        of transformers', the folder has the state in ``model.safetensors``, for ``huggingface_hub.load_torch_model``.

        Args:
            beside: files and folders to copy into it, unless it has them.

        Raises SparseForgeError if ``folder`` exists and is not empty, unless ``overwrite``. One process calls it; of
        a model in parts, all do, and the first writes.
        """
        if self.in_parts is not None:
            processes.Processes().first_does(lambda: check_output(Path(folder), overwrite=overwrite))
            if not processes.Processes().first:
                self.in_parts.write(None)
                return
        with new_folder(Path(folder), overwrite=overwrite) as partial:
            if self.in_parts is None:
                write_checkpoint(self.model, tokenizer, partial)
            else:
                self.in_parts.write(partial)
                if tokenizer is not None:  # in the place of the checkpoint's own
                    tokenizer.save_pretrained(partial)
            write_json(partial / "report.json", self.report)
            (partial / FILE).write_text(self.recipe.to_yaml(), encoding="utf-8")
            if self.scales:
                (partial / SCALES).parent.mkdir()
                save_file({name: t.detach().cpu().contiguous() for name, t in self.scales.items()}, partial / SCALES)
            copy_companions(beside, partial)
        write_page(Path(folder))


@checked
@torch.inference_mode(False)
@torch.enable_grad()  # training needs both, whatever the caller stands in
@processes.together()
def sparsify(
    model: nn.Module | StreamedModel,
    data: Any = None,
    recipe: Recipe | None = None,
    *,
    teacher: nn.Module | StreamedModel | str | Path | None = None,
    tokenizer: Any = None,
    example_inputs: Any = None,
    cache_dir: str | Path | None = None,
    compile: bool | str = "auto",
    activation_checkpointing: bool = False,
    state_path: str | Path | None = None,
    save_seconds: AtLeastZero = SAVE_SECONDS,
    accelerator: Accelerator | None = None,
    show_progress: bool = True,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    **changes: Any,
) -> SparsifyResult:
    """Make ``model`` exactly N:M sparse, in place, and keep its accuracy by distilling the dense model into it.

    ``sparsify(model, data, tokenizer=tokenizer, tokens="20M", lr=1e-4)``: what a run consists of, from the method to
    the loss, are the fields of a :class:`Recipe`; single ones are given by name.

    Args:
        model: any nn.Module that torch.export takes; under FSDP2 also a checkpoint on disk (``sf.StreamedModel``), of
            which each process reads its part.
        data: training data: a hub id, a text / jsonl / parquet file, a folder of them, a list of strings (these need a
            ``tokenizer``), token ids [n] or [n, length], a DataLoader, or any list of batches. None: the recipe's or,
            without one, the weights alone decide (``magnitude``). ``"self"``: text drawn from the model itself.
        recipe: the run; default ``Recipe()``.
        teacher: the same model before it was pruned (or a folder, hub id, file), if ``model`` is N:M already: it is
            distilled from that; ``start="magnitude"`` begins at its own masks. Default: the recipe's, or ``model``.
        example_inputs: for capture, where they cannot be made from the model's config or from ``data``.
        cache_dir: where the token file of text is kept (default: the Hugging Face home).
        compile: True, False or "auto".
        activation_checkpointing: keep of each repeated block only what goes into it, and compute the block again in the
            backward pass: one forward pass more for the memory of all but one block's activations, the same numbers.
        show_progress: tell on standard error how far the run is: a bar on a terminal, else a line a minute.
        state_path: folder of the training state: written every ``save_seconds``, read if it exists, removed by nobody.
            The run that wrote it must have had the same weights, data, seed, rate and losses.
        changes: fields of the recipe, and options of its method.

    Returns SparsifyResult. Raises SparseForgeError on anything that is wrong. Whatever else ends the call (Ctrl-C, an
    error of ``on_step``) leaves the model dense as it was, too, to the bit (under FSDP: training/sharded.py).
    """
    began, recipe = time.monotonic(), Recipe.of(recipe).changed(**changes)
    data = recipe.data if data is None else data
    config = recipe.config(data is not None)  # what is wrong with it is found out before anything is read
    taught, teacher = is_taught(recipe, config), recipe.teacher if teacher is None else teacher
    in_parts, model, opened = open_both(model, teacher if taught else None, data, config)
    check_weights(model)
    _check_loop(compile, state_path)
    beside: dict[str, Any] = {
        "tokenizer": tokenizer, "cache_dir": cache_dir, "state_path": state_path, "save_seconds": save_seconds,
        "accelerator": accelerator, "on_step": on_step, "compile": compile is True or None,
        "activation_checkpointing": activation_checkpointing or None, "teacher": None if taught else teacher,
    }  # fmt: skip
    if isinstance(config, TrainedConfig):
        accelerator = accelerator or processes.accelerator()
    run = open_run(
        model, data, recipe, config, accelerator, tokenizer=tokenizer, cache_dir=cache_dir,
        example_inputs=example_inputs, teacher=opened, in_parts=in_parts, state_path=state_path,
    )  # fmt: skip
    run.notes += adapter_notes(model, [run.program.tensor(s.fqn) for s in eligible(run.sites)])
    run.notes += look_at_teacher(run, recipe, config) if taught else []
    report = _begun(run, recipe.name(data is not None), config, recipe.seed)
    with shown(show_progress and (accelerator is None or accelerator.is_main_process)):
        if accelerator is not None and isinstance(config, TrainedConfig):
            report["preset"] = find_preset(report["method"], recipe.preset)
            scales = anneal(
                run, recipe, beside, report, accelerator=accelerator, state_path=state_path, save_seconds=save_seconds,
                activation_checkpointing=activation_checkpointing, compile=compile, on_step=on_step,
            )  # fmt: skip
        else:
            scales = prune_once(run, recipe, config, beside, report)
    names = {k: str(v) if isinstance(v, str | Path) else None for k, v in (("data", data), ("teacher", teacher))}
    recipe = recipe.resolved(data is not None).changed(**names)
    report |= {"options": dict(recipe.options), "recipe": recipe.describe()}
    _end(report, run, time.monotonic() - began)
    return SparsifyResult(model, report, recipe, scales, in_parts)


def _check_loop(compile: Any, state_path: str | Path | None) -> None:
    """Raise SparseForgeError for what the loop cannot be told, or where its state cannot be."""
    if not (isinstance(compile, bool) or compile == "auto"):
        raise SparseForgeError(f"compile is {compile!r}: give True, False or 'auto'")
    if state_path is not None:
        check_parent(Path(state_path))


def _end(report: dict[str, Any], run: Run, seconds: float) -> None:
    """What a report can say of any run behind it, which took this process so long."""
    report["seconds"] = report.get("seconds", 0.0) + seconds  # beside what those before it spent
    notes = report["notes"]
    notes += [n for n in run.reader.notes if n not in notes]
    by_layer = report.get("layer_notes") or {}
    notes += [*tell_moved(by_layer), *_by_text(by_layer)]
    weights = ((s.fqn, run.program.tensor(s.fqn)) for s in eligible(run.sites))
    # where processes share a model, what was gathered is the first one's
    whole = ((fqn, w.full_tensor() if isinstance(w, DTensor) else w) for fqn, w in weights)
    report["density"] = {fqn: density(w) for fqn, w in whole if w.numel()}
    report["peak_memory_bytes"] = peak_memory_bytes()


def _begun(run: Run, method: str, config: MethodConfig, seed: int) -> dict[str, Any]:
    """What a report can say before the run."""
    return {
        "method": method,
        "pattern": str(config.pattern),
        "seed": seed,
        "notes": run.notes,
        **describe_sites(run.sites),
        **environment(),
    }


def _by_text(layer_notes: Mapping[str, str]) -> list[str]:
    """A sentence for every text, with the weights that it is about."""
    names: dict[str, list[str]] = {}
    for fqn, text in layer_notes.items():
        names.setdefault(text, []).append(fqn)
    return [
        f"{text}: {', '.join(found[:3])}" + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        for text, found in names.items()
    ]
