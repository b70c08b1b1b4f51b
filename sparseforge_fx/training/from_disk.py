"""``sparsify_on_disk``: layer-wise methods on a checkpoint that does not fit into memory, block by block."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseforge_fx.data.batches import count_rows
from sparseforge_fx.data.opening import first_batches, is_self, open_batches, tell_length
from sparseforge_fx.data.reading import Reader
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.files import check_output, check_parent, replace_folder
from sparseforge_fx.graph.capture import as_call, capture
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.config import MethodConfig
from sparseforge_fx.methods.experts import Experts
from sparseforge_fx.methods.layerwise import prune_layer_by_layer
from sparseforge_fx.methods.one_shot import LayerwiseConfig
from sparseforge_fx.methods.streamed import Streamed, StreamedWeight
from sparseforge_fx.models.compute_dtype import ComputeDtype, choose_dtype, dtype_of
from sparseforge_fx.models.dense import find_dtype
from sparseforge_fx.models.shards import Shards
from sparseforge_fx.models.streamed import StreamedModel
from sparseforge_fx.page.page import write_page
from sparseforge_fx.passes import LinearSite, find_linears, run_passes, train_passes
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.globs import unmatched
from sparseforge_fx.passes.harden_masks import fold
from sparseforge_fx.pattern import density, hard_mask
from sparseforge_fx.ranges import Count, checked
from sparseforge_fx.report import describe_sites, environment, peak_memory_bytes, write_json
from sparseforge_fx.training.first_batch import check_ids, example_inputs_of
from sparseforge_fx.training.in_parts import copy_checkpoint
from sparseforge_fx.training.planned import planned_sites
from sparseforge_fx.training.prepare import check_sites
from sparseforge_fx.training.recipe import FILE, Recipe
from sparseforge_fx.training.sharded import SHARED
from sparseforge_fx.training.unused import unused_arguments, unused_for_experts

JOURNAL, SCRATCH = "sparseforge-journal.json", "sparseforge-scratch"
FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
SPARE = 1 << 28  # bytes of disk beside the checkpoint itself


@checked
@torch.no_grad()
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

    Returns the report, as report.json. Raises SparseForgeError for whatever does not fit, before anything is written.
    """
    began = time.monotonic()
    recipe = Recipe.of(recipe).changed(model=str(model), **changes)
    data = recipe.data if data is None else data
    config = recipe.config(data is not None)
    check_method(config, data)
    folder = Path(output)
    unfinished = check_place(folder, resume=resume, overwrite=overwrite)
    source = StreamedModel(model)
    wanted = find_dtype(recipe.dtype)
    computing = _begun_in(unfinished) or choose_dtype(dtype_of(source.skeleton), torch.device("cpu"), wanted)
    source.compute_in(computing.dtype)  # before the capture: a graph has its dtypes in it
    run = _Run(source, data, recipe, config, cache_dir)
    with _disk_full_told(folder):
        work = _Work(unfinished, source, run.identity(), computing)
        report = run.prune(work, activation_bytes, blocks)
        report["notes"] = computing.notes() + report["notes"]
        report |= {"compute_dtype": computing.describe(), "seconds": work.seconds + time.monotonic() - began}
        report["peak_memory_bytes"] = peak_memory_bytes()
        if blocks is None:
            work.finish(folder, report, recipe.resolved(data is not None))
    return report


def check_method(config: MethodConfig, data: Any) -> None:
    """Raise SparseForgeError for what a walk from disk cannot do."""
    if isinstance(config, TrainedConfig):
        raise SparseForgeError(
            "a model that stays on disk is not trained by one process: take magnitude, wanda, sparsegpt or alps, or "
            f"train it {SHARED}"
        )
    if is_self(data):
        raise SparseForgeError("a model that stays on disk draws no text: give a text as data")
    wanted = [n for n in ("reorder", "reconstruct") if getattr(config, n, False)]
    wanted += ["values"] if getattr(config, "values", "float") != "float" else []
    if wanted:
        raise SparseForgeError(f"{wanted[0]} needs the whole model in memory: leave it out, or sparsify in memory")


def check_place(folder: Path, *, resume: bool, overwrite: bool) -> Path:
    """Where the run is while it is under way. Raises SparseForgeError where it may not go."""
    check_parent(folder)
    check_output(folder, overwrite=overwrite)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if unfinished.exists() and not resume:
        raise SparseForgeError(
            f"{unfinished} holds a run that was not finished: give resume to go on with it, or remove it"
        )
    return unfinished


class _Run:
    """The graph, its sites and the calibration set."""

    def __init__(self, source: StreamedModel, data: Any, recipe: Recipe, config: MethodConfig, cache_dir: Any):
        torch.manual_seed(recipe.seed)
        self.source, self.recipe, self.config = source, recipe, config
        model, batches, example = source.skeleton, None, None
        if isinstance(config, LayerwiseConfig):
            batches = open_batches(
                model, data, source.tokenizer, tokens=recipe.calibration * recipe.length, batch_size=recipe.batch_size,
                length=recipe.length, seed=recipe.seed, cache_dir=cache_dir, text_column=recipe.text_column,
                separator=recipe.separator,
            )  # fmt: skip
            example = example_inputs_of(model, batches.batch(0))
        self.program: Exported = capture(model, example)
        self.sites: list[LinearSite]
        planned: list[str] = []
        if recipe.plan is None:
            self.sites = find_linears(self.program, config.pattern, recipe.include, recipe.exclude)
            planned = unmatched(model, include=recipe.include, exclude=recipe.exclude)
        else:
            self.sites, planned = planned_sites(self.program, recipe.plan, config.pattern)
        check_sites(self.program, self.sites)
        self.chosen, told = ([], []) if batches is None else first_batches(batches, recipe.calibration)
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
            *tell_length(data, batches, recipe.length),
        ]
        self.notes += unused_arguments(
            recipe, beside, data=data, method=recipe.name(data is not None), trains=False,
            calibrates=bool(self.chosen), batches=batches,
        )  # fmt: skip
        self.notes += unused_for_experts(config, self.sites)
        self.method = recipe.name(data is not None)

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        drawn = [float(t.double().sum()) for r in self.readings for t in _tensors(r)]
        files = {f.name: f.stat().st_size for f in self.source.shards.files}
        return {"recipe": self.recipe.describe(), "data": drawn, "files": files}

    def prune(self, work: _Work, activation_bytes: int | None, blocks: int | None) -> dict[str, Any]:
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


class _Work:
    """The folder of a run under way: the output's files, what is alive at the last border, and the journal."""

    def __init__(self, folder: Path, source: StreamedModel, identity: dict[str, Any], computing: ComputeDtype):
        self.folder, self.scratch, self.file = folder, folder / SCRATCH, folder / JOURNAL
        self.journal: dict[str, Any] = {}
        self.computing = computing
        self.seconds = 0.0
        self.began = time.monotonic()
        identity = json.loads(json.dumps(identity, default=str))
        if self.file.is_file():
            self._read(identity)
        else:  # nothing, or a copy that was not finished
            self._make(source, identity)
        self.shards = Shards(folder)
        for left in self.scratch.glob("*.activation"):
            left.unlink()

    def _read(self, identity: dict[str, Any]) -> None:
        try:
            self.journal = dict(json.loads(self.file.read_text()))
        except (ValueError, TypeError) as error:
            raise SparseForgeError(f"{self.file} cannot be read: remove {self.folder} and start anew") from error
        before = self.journal.get("identity", {})
        if different := [k for k in identity if before.get(k) != identity[k]]:
            raise SparseForgeError(
                f"the run in {self.folder} is another one (its {' and '.join(different)} differ): repeat its options, "
                "or remove it"
            )
        self.seconds = float(self.journal.get("seconds", 0.0))

    def _make(self, source: StreamedModel, identity: dict[str, Any]) -> None:
        there = self.folder
        while not there.exists():
            there = there.parent
        needed, free = source.shards.bytes + SPARE, shutil.disk_usage(there).free
        if free < needed:
            raise SparseForgeError(
                f"{self.folder} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} free: make room, or "
                "name another place"
            )
        self.scratch.mkdir(parents=True, exist_ok=True)
        copy_checkpoint(source, self.folder)
        self.journal = {"identity": identity}
        write_json(self.file, self.journal)

    def save(self) -> None:
        self.journal["compute_dtype"] = self.computing.describe()
        self.journal["seconds"] = self.seconds + time.monotonic() - self.began
        write_json(self.file, self.journal)

    def finish(self, folder: Path, report: dict[str, Any], recipe: Recipe) -> None:
        write_json(self.folder / "report.json", report)
        (self.folder / FILE).write_text(recipe.to_yaml(), encoding="utf-8")
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.file.unlink()
        replace_folder(folder, self.folder)
        write_page(folder)


def _begun_in(folder: Path) -> ComputeDtype | None:
    """What the run under way in this folder computes in: a second measurement might choose otherwise."""
    try:
        return ComputeDtype.read(json.loads((folder / JOURNAL).read_text())["compute_dtype"])
    except (OSError, ValueError, TypeError, KeyError):
        return None  # nothing was computed yet, or the journal is damaged, which _Work says


@contextmanager
def _disk_full_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in FULL or any(text in str(error) for text in ("No space left", "File too large")):
            raise SparseForgeError(
                f"the disk of {folder} is full: make room there and repeat the command with resume"
            ) from error
        raise


def _tensors(reading: Any) -> list[Tensor]:
    return [t for t in (*reading.args, *reading.kwargs.values()) if isinstance(t, Tensor)]
