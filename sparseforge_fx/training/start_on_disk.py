"""The layer-wise start of a model that stays on disk: the first process walks through it block by block while the
others wait; then each reads its part of what that wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.one_shot import LAYERWISE
from sparseforge_fx.models.compute_dtype import dtype_of
from sparseforge_fx.models.shards import Shards
from sparseforge_fx.training.from_disk import sparsify_on_disk
from sparseforge_fx.training.in_parts import InParts
from sparseforge_fx.training.processes import Processes
from sparseforge_fx.training.recipe import Recipe

WHOLE = ("reorder", "reconstruct", "values")  # options that want a model in memory
END = "-start"  # of the folder's name, which begins with the training state's


@dataclass(frozen=True)
class StartOnDisk:
    """``config`` is the run's as far as a model on disk can follow it, ``trained`` what is left to do after the walk.
    Raises SparseForgeError for options that were asked for and cannot be followed."""

    config: TrainedConfig
    trained: TrainedConfig
    notes: list[str]

    @classmethod
    def of(cls, config: TrainedConfig, recipe: Recipe) -> StartOnDisk | None:
        """None: the config's start looks at the weights alone."""
        if config.start not in LAYERWISE:
            return None
        if asked := [n for n in WHOLE if recipe.options.get(n)] or (["values"] if config.values != "float" else []):
            raise SparseForgeError(
                f"{asked[0]} needs the whole model in memory, and this one stays on disk: leave it out, or start on "
                "one process and go on from there (teacher=, start='magnitude')"
            )
        left_out = [n for n in WHOLE[:2] if getattr(config, n)]
        config = replace(config, reorder=False, reconstruct=0)
        told = f"the start {config.start} was solved from disk, block by block, on the CPU"
        told += f", without the preset's {' and '.join(left_out)}, which want the model in memory" if left_out else ""
        return cls(config, replace(config, start="magnitude"), [told])

    def walk(
        self, in_parts: InParts | None, data: Any, recipe: Recipe, state_path: Path | None, cache_dir: Any
    ) -> tuple[InParts, dict[str, Any]]:
        """The model with the start's weights, and what a run's report says of a start. A walk that is complete in its
        folder is not repeated, one that was killed goes on."""
        assert in_parts is not None
        if state_path is None:
            raise SparseForgeError(
                f"the start {self.config.start} of a model on disk is written beside the training state: give "
                "state_path"
            )
        folder = state_path.with_name(state_path.name + END)
        source = in_parts.model
        asked = Recipe(
            method=self.config.start, pattern=str(self.config.pattern), dtype=str(dtype_of(source.skeleton))[6:],
            **{n: getattr(recipe, n) for n in ("text_column", "separator", "include", "exclude", "plan", "batch_size")},
            **{n: getattr(recipe, n) for n in ("length", "calibration", "seed")},
        )  # fmt: skip

        def prune() -> None:
            if not (folder / "report.json").is_file():
                sparsify_on_disk(source.folder, data, asked, output=folder, resume=True, cache_dir=cache_dir)

        Processes().first_does(prune)
        report = json.loads((folder / "report.json").read_text())
        done, wanted = report["recipe"], asked.changed(model=str(source.folder)).describe()
        if different := [n for n in wanted if n != "data" and done.get(n) != wanted[n]]:
            raise SparseForgeError(
                f"{folder} is the start of another run (its {', '.join(different)} differ): remove it, or repeat that "
                "run's options"
            )
        told = {"layer_notes": report["layer_notes"], "calibration_sequences": report["calibration_sequences"]}
        told |= {name: report[name] for name in ("layer_errors", "experts") if name in report}
        return replace(in_parts, start=Shards(folder)), told | {"calibration_seconds": float(report["seconds"])}
