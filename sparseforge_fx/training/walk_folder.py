"""The folder of a walk through a model on disk: what a kill leaves in it, who may go on from that, and how it becomes
the output."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.files import (
    check_output,
    check_parent,
    finish_replacement,
    new_file,
    replace_folder,
    stays,
    sync_all,
    sync_folder,
)
from sparseforge_fx.models.compute_dtype import ComputeDtype
from sparseforge_fx.models.shards import Shards
from sparseforge_fx.models.streamed import StreamedModel
from sparseforge_fx.page.page import REPORT, write_page
from sparseforge_fx.report import write_json
from sparseforge_fx.training import fingerprint
from sparseforge_fx.training.in_parts import copy_checkpoint
from sparseforge_fx.training.recipe import FILE, Recipe

JOURNAL, SCRATCH = "sparseforge-journal.json", "sparseforge-scratch"
CONFIG = "config.json"
SPARE = 1 << 28  # bytes of disk beside the checkpoint itself


def check_place(output: Path, *, resume: bool, overwrite: bool) -> Path:
    """Where the run is while it is under way. Raises SparseForgeError where it may not go."""
    check_parent(output)
    if stays(output.resolve()):  # the copy of the checkpoint is made beside it, and takes its place
        raise SparseForgeError(
            f"{output} is the working folder or a mount point, or its folder takes no new ones: name a folder in it"
        )
    finish_replacement(output)
    unfinished = _unfinished(output)
    if resume and not unfinished.exists() and (output / JOURNAL).is_file():
        return output  # it had its name when it was killed, and what is left is to tidy up
    check_output(output, overwrite=overwrite)
    if unfinished.exists() and not resume:
        raise SparseForgeError(
            f"{unfinished} holds a run that was not finished: give resume to go on with it, or remove it"
        )
    return unfinished


def how_to_go_on(output: Path) -> str | None:
    """What a run that was interrupted has left, in a sentence; None where there is nothing."""
    place = next((p for p in (_unfinished(output), output) if (p / JOURNAL).is_file()), _unfinished(output))
    if not place.exists():
        return None
    try:
        blocks = int(json.loads((place / JOURNAL).read_text()).get("border", 0))
    except (OSError, ValueError, TypeError, AttributeError):
        blocks = 0  # the copy of the checkpoint was not finished
    kept = f"{blocks} finished block{'s' * (blocks != 1)}" if blocks else "a copy of the model, and no finished block"
    return f"{place} holds {kept}: go on with the same command and --resume"


def begun_in(place: Path) -> ComputeDtype | None:
    """What the run under way in this folder computes in: a second measurement might choose otherwise."""
    try:
        return ComputeDtype.read(json.loads((place / JOURNAL).read_text())["compute_dtype"])
    except (OSError, ValueError, TypeError, KeyError):
        return None  # nothing was computed yet, or the journal is damaged, which WalkFolder says


class WalkFolder:
    """The output's files, what is alive at the last border, and the journal, which says only what is on the disk."""

    def __init__(self, folder: Path, source: StreamedModel, identity: dict[str, Any], computing: ComputeDtype):
        self.folder, self.scratch, self.file = folder, folder / SCRATCH, folder / JOURNAL
        self.journal: dict[str, Any] = {}
        self.computing = computing
        self.seconds = 0.0
        self.began = time.monotonic()
        identity = json.loads(json.dumps(identity, default=str))
        if self.file.is_file():
            self._read(source, identity)
        else:  # nothing, or a copy that was not finished
            self._make(source, identity)
        self.shards = Shards(folder)
        for left in self.scratch.glob("*.activation"):
            left.unlink()

    @property
    def finished(self) -> dict[str, Any] | None:
        """The report, where nothing is left to compute."""
        return json.loads((self.folder / REPORT).read_text()) if self.journal.get("finished") else None

    def _read(self, source: StreamedModel, identity: dict[str, Any]) -> None:
        try:
            self.journal = dict(json.loads(self.file.read_text()))
            before = dict(self.journal["identity"])
            recipe = dict(before["recipe"])
        except (ValueError, TypeError, KeyError) as error:
            raise SparseForgeError(f"{self.file} cannot be read: remove {self.folder} and start anew") from error
        if different := [name for name, value in identity["recipe"].items() if recipe.get(name) != value]:
            raise SparseForgeError(
                f"the run in {self.folder} is another one (its {', '.join(different)} differ): repeat its options, or "
                "remove it"
            )
        if before.get("data") != identity["data"]:
            raise SparseForgeError(
                f"the data are not those that the run in {self.folder} began with: bring those back, or remove it"
            )
        self._check_files(source)
        self.seconds = float(self.journal.get("seconds", 0.0))

    def _check_files(self, source: StreamedModel) -> None:
        """Only a file that was touched is read again: whatever writes to one changes its times, ctime always."""
        known = self.journal.get("files", {})
        for file in (*source.shards.files, source.folder / CONFIG):
            before, stamp = known.get(file.name, {}), _stamp(file)
            if before.get("stamp") != stamp and before.get("digest") != fingerprint.of_file(file):
                raise SparseForgeError(
                    f"{file} is not what the run in {self.folder} began with: bring that back, or remove {self.folder}"
                )

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
        files: dict[str, Any] = {}

        def copy(file: Path, to: Path) -> None:
            if file in source.shards.files or file.name == CONFIG:
                files[file.name] = {"stamp": _stamp(file), "digest": fingerprint.of_file(file, to)}
            else:
                shutil.copyfile(file, to)

        copy_checkpoint(source, self.folder, copy)
        sync_all(self.folder)
        sync_folder(self.folder.parent)
        self.journal = {"identity": identity, "files": files}
        write_json(self.file, self.journal)

    def save(self) -> None:
        """Write the journal, behind all that it speaks of."""
        self.shards.sync()
        sync_folder(self.scratch)
        self.journal["compute_dtype"] = self.computing.describe()
        self.journal["seconds"] = self.seconds + time.monotonic() - self.began
        write_json(self.file, self.journal)

    def finish(self, output: Path, report: dict[str, Any], recipe: Recipe) -> None:
        """Let the folder become ``output``. The journal goes last, so that whatever ends this is gone on with."""
        if self.finished is None:
            write_json(self.folder / REPORT, report)
            with new_file(self.folder / FILE) as file:
                file.write_text(recipe.to_yaml(), encoding="utf-8")
            self.journal["finished"] = True
            self.save()
        if self.folder != output:
            try:
                replace_folder(output.resolve(), self.folder)
            except BaseException:
                finish_replacement(output)  # between two renames, the old one comes back
                raise
        write_page(output)
        shutil.rmtree(output / SCRATCH, ignore_errors=True)
        (output / JOURNAL).unlink()


def _unfinished(output: Path) -> Path:
    target = output.resolve()  # a symbolic link stays one: what it points to is replaced
    return target.with_name(f"{target.name}.unfinished")


def _stamp(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
