"""``sparsify_on_disk``: layer-wise methods on a checkpoint that does not fit into memory, block by block."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from sparseforge_fx.data.batches import count_rows
from sparseforge_fx.data.capturing import capture_for
from sparseforge_fx.data.opening import first_batches, is_self, open_batches, tell_length, tell_text
from sparseforge_fx.data.reading import Reader
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.files import disk_full_told
from sparseforge_fx.graph.capture import as_call
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.config import MethodConfig
from sparseforge_fx.methods.experts import Experts
from sparseforge_fx.methods.layerwise import prune_layer_by_layer
from sparseforge_fx.methods.one_shot import LayerwiseConfig
from sparseforge_fx.methods.streamed import Streamed, StreamedWeight
from sparseforge_fx.models.compute_dtype import ComputeDtype, cast_inputs, choose_dtype, dtype_of
from sparseforge_fx.models.dense import find_dtype
from sparseforge_fx.models.streamed import StreamedModel
from sparseforge_fx.passes import LinearSite, find_linears, run_passes, train_passes
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.globs import unmatched
from sparseforge_fx.passes.harden_masks import fold
from sparseforge_fx.pattern import density, hard_mask
from sparseforge_fx.ranges import Count, checked
from sparseforge_fx.report import describe_sites, environment, peak_memory_bytes
from sparseforge_fx.training import fingerprint
from sparseforge_fx.training.first_batch import check_ids
from sparseforge_fx.training.interruption import Interruption
from sparseforge_fx.training.planned import planned_sites
from sparseforge_fx.training.prepare import check_sites
from sparseforge_fx.training.processes import Processes, together
from sparseforge_fx.training.recipe import Recipe
from sparseforge_fx.training.sharded import SHARED
from sparseforge_fx.training.unused import unused_arguments, unused_for_experts, unused_options
from sparseforge_fx.training.walk_folder import WalkFolder, begun_in, check_place


@checked
def sparsify_on_disk(
    model: str | Path,
    data: Any = None,
    recipe: Recipe | None = None,
    *,
    output: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    cache_dir: str | Path | None = None,
    activation_bytes: Count | None = None,
    blocks: Count | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Prune a checkpoint by a method that does not train, with the weights of one block in memory at a time.

    The output has the input's files: same shards, names and dtypes. It equals what :func:`~sparseforge_fx.sparsify`
    gives in memory in the same dtype, to the bit.

    Args:
        model: a folder with safetensors files, or a hub id, which is fetched.
        data, recipe, cache_dir, changes: as for ``sparsify``.
        output: the folder to make. While the run is under way it is ``<output>.unfinished``.
        resume: go on with the run that is there, from its last finished block: the same bytes come out.
        activation_bytes: what the activations between two operators may take in memory; more of them are kept in
            files. None: all stay in memory.
        blocks: stop behind so many of the model's repeated blocks, and leave the output unfinished.

    Of several processes the first one works while the others wait. Ctrl-C and SIGTERM end it where it is; what it has
    finished is kept for ``resume``.

    Returns the report, as report.json. Raises SparseForgeError for whatever does not fit, before anything is written.
    """
    recipe = Recipe.of(recipe).changed(model=str(model), **changes)
    report: dict[str, Any] = {}

    def work() -> None:
        report.update(
            walk(
                data, recipe, output=Path(output), resume=resume, overwrite=overwrite, cache_dir=cache_dir,
                activation_bytes=activation_bytes, blocks=blocks,
            )
        )  # fmt: skip

    first_walks(work)
    return broadcast_object_list([report])[0] if Processes().several else report


def first_walks(work: Callable[[], None]) -> None:
    """Let the first of several processes walk while the others wait. SIGTERM and Ctrl-C end all of them where they are:
    blocks that are finished are kept."""
    processes = Processes()
    with together(), Interruption(active=True, patient=processes.several, at_once=True):
        processes.first_does(work)


@torch.no_grad()
def walk(
    data: Any, recipe: Recipe, *, output: Path, resume: bool, overwrite: bool = False, cache_dir: Any = None,
    activation_bytes: int | None = None, blocks: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """:func:`sparsify_on_disk`, of the recipe's model, on this process."""
    began = time.monotonic()
    data = recipe.data if data is None else data
    config = recipe.config(data is not None)
    check_method(config, data, activation_bytes)
    place = check_place(output, resume=resume, overwrite=overwrite)
    assert recipe.model is not None
    source = StreamedModel(recipe.model)
    wanted = find_dtype(recipe.dtype)
    computing = begun_in(place) or choose_dtype(dtype_of(source.skeleton), torch.device("cpu"), wanted)
    source.compute_in(computing.dtype)  # before the capture: a graph has its dtypes in it
    run = _Run(source, data, recipe, config, cache_dir, computing)
    with disk_full_told(output, "repeat the command with resume"):
        work = WalkFolder(place, source, run.identity(), computing)
        report = work.finished
        if report is None:
            report = run.prune(work, activation_bytes, blocks)
            report["notes"] = computing.notes() + report["notes"]
            report |= {"compute_dtype": computing.describe(), "seconds": work.seconds + time.monotonic() - began}
            report["peak_memory_bytes"] = peak_memory_bytes()
        if blocks is None or work.finished is not None:
            work.finish(output, report, recipe.resolved(data is not None))
    return report


def check_method(config: MethodConfig, data: Any, activation_bytes: int | None = None) -> None:
    """Raise SparseForgeError for what a walk from disk cannot do."""
    if isinstance(config, TrainedConfig):
        raise SparseForgeError(
            "a model that stays on disk is not trained by one process: take magnitude, wanda, sparsegpt or alps, or "
            f"train it {SHARED}"
        )
    if activation_bytes is not None and not isinstance(config, LayerwiseConfig):
        raise SparseForgeError(
            f"a method that looks at weights alone has no activations: leave activation_bytes={activation_bytes} out"
        )
    if is_self(data):
        raise SparseForgeError("a model that stays on disk draws no text: give a text as data")
    wanted = [n for n in ("reorder", "reconstruct") if getattr(config, n, False)]
    wanted += ["values"] if getattr(config, "values", "float") != "float" else []
    if wanted:
        raise SparseForgeError(f"{wanted[0]} needs the whole model in memory: leave it out, or sparsify in memory")


class _Run:
    """The graph, its sites and the calibration set."""

    def __init__(
        self, source: StreamedModel, data: Any, recipe: Recipe, config: MethodConfig, cache_dir: Any,
        computing: ComputeDtype,
    ):  # fmt: skip
        torch.manual_seed(recipe.seed)
        self.source, self.recipe, self.config = source, recipe, config
        model, batches, first = source.skeleton, None, None
        if isinstance(config, LayerwiseConfig):
            batches = open_batches(
                model, data, source.tokenizer, tokens=recipe.calibration * recipe.length, batch_size=recipe.batch_size,
                length=recipe.length, seed=recipe.seed, cache_dir=cache_dir, text_column=recipe.text_column,
                separator=recipe.separator,
            )  # fmt: skip
            first = cast_inputs(batches.batch(0), computing.checkpoint, computing.dtype)
        self.program: Exported = capture_for(model, first)
        self.sites: list[LinearSite]
        planned: list[str] = []
        if recipe.plan is None:
            self.sites = find_linears(self.program, config.pattern, recipe.include, recipe.exclude)
            planned = unmatched(model, include=recipe.include, exclude=recipe.exclude)
        else:
            self.sites, planned = planned_sites(self.program, recipe.plan, config.pattern)
        check_sites(self.program, self.sites)
        self.chosen, told = ([], []) if batches is None else first_batches(batches, recipe.calibration)
        self.chosen = cast_inputs(self.chosen, computing.checkpoint, computing.dtype)
        self.reader = Reader(self.program, labels=False)
        self.readings = [self.reader.read(*as_call(b)) for b in self.chosen]
        for reading in self.readings:
            check_ids(model, reading)
        beside = {"tokenizer": None, "cache_dir": cache_dir, "teacher": recipe.teacher}
        self.notes = [
            *self.program.notes,
            *planned,
            *told,
            *self.reader.notes,
            *tell_text(data, batches, recipe.text_column),
            *tell_length(data, batches, recipe.length),
        ]
        self.notes += unused_arguments(
            recipe, beside, data=data, method=recipe.name(data is not None), trains=False,
            calibrates=bool(self.chosen), batches=batches,
        )  # fmt: skip
        self.notes += unused_options(config, recipe, data is not None)
        self.notes += unused_for_experts(config, self.sites)
        self.method = recipe.name(data is not None)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on, beside the model's files."""
        drawn = {f"{i}.{j}": t for i, r in enumerate(self.readings) for j, t in enumerate(_tensors(r))}
        return {"recipe": self.recipe.describe(), "data": fingerprint.of_tensors(drawn, sample=None)}

    def prune(self, work: WalkFolder, activation_bytes: int | None, blocks: int | None) -> dict[str, Any]:
        config, journal = self.config, work.journal
        experts = Experts(config.pattern)
        if isinstance(config, LayerwiseConfig):
            experts = Experts(config.pattern, config.expert_tokens, config.every_token)
        for name in ("tokens", "errors", "notes"):
            getattr(experts, name).update(journal.get("experts", {}).get(name, {}))
        masked, _ = run_passes(self.program, train_passes(self.sites))
        module, sites = masked.module(), {s.fqn: s for s in eligible(self.sites)}
        kept, notes = dict(journal.get("density", {})), dict(journal.get("notes", {}))
        times: list[float] = list(journal.get("block_seconds", []))
        clock = time.monotonic()

        def done(name: str, weight: Tensor, mask: Tensor) -> None:
            fold(weight, mask, config.pattern, sites[name].reduction_dim)
            self.source.write(name, weight, work.shards)
            kept[name] = density(weight)

        def fetch(name: str) -> Tensor:
            return self.source.fetch(name, work.shards if name in kept else None)

        def at_border(border: int) -> None:
            nonlocal clock
            times.append(time.monotonic() - clock)
            clock = time.monotonic()
            journal.update(border=border, density=kept, notes=notes, experts=asdict(experts), block_seconds=times)
            journal["padded"] = sorted(held.padded)
            work.save()

        held = Streamed(
            module, fetch, done=done, sites=sites, scratch=work.scratch, limit=activation_bytes, at_border=at_border,
            blocks=blocks,
        )  # fmt: skip
        held.begin, held.finished, held.padded = journal.get("border", 0), set(kept), set(journal.get("padded", []))
        if isinstance(config, LayerwiseConfig):
            shape = masked.tensor
            weights = [StreamedWeight(s.fqn, shape(s.fqn), s.reduction_dim, held) for s in sites.values()]
            found = prune_layer_by_layer(
                masked, weights, self.readings, config.solve, experts, streamed=(module, held), notes=notes
            )
        else:
            found = {}
            for name, site in sites.items():
                if name not in kept:
                    weight = held[name]
                    done(name, weight, hard_mask(weight.abs(), config.pattern, site.reduction_dim))
                    held.cache.clear()
        if blocks is None and (unread := sorted(set(sites) - set(kept))):
            raise SparseForgeError(f"{unread[0]} is never read by the graph: exclude it")
        report: dict[str, Any] = {
            "method": self.method, "pattern": str(config.pattern), "seed": self.recipe.seed,
            "notes": [*self.notes, *(f"{text}: {name}" for name, text in found.items())],
            **describe_sites(self.sites), **environment(), "config": config.describe(),
            "calibration_sequences": sum(map(count_rows, self.chosen)), "layer_notes": found, "density": kept,
            "block_seconds": times, "blocks": len(held.ends), "recipe": self.recipe.describe(),
        }  # fmt: skip
        return report | experts.describe()


def _tensors(reading: Any) -> list[Tensor]:
    return [t for t in (*reading.args, *reading.kwargs.values()) if isinstance(t, Tensor)]
