"""The layer-wise start of a model that processes are about to share.

In memory, where the model was given so, every process computes all of it, before it is cut up. Of a model on disk the
first process walks through it block by block while the others wait; then each reads its part of what that wrote.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from sparseforge_fx.data.batches import count_rows
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.experts import EXPERT_TOKENS
from sparseforge_fx.methods.one_shot import LAYERWISE
from sparseforge_fx.models.compute_dtype import dtype_of
from sparseforge_fx.models.shards import Shards
from sparseforge_fx.training.distillation import Distillation
from sparseforge_fx.training.from_disk import first_walks, walk
from sparseforge_fx.training.in_parts import InParts
from sparseforge_fx.training.inputs import Run
from sparseforge_fx.training.prepare import finalize, prepare_captured
from sparseforge_fx.training.recipe import Recipe
from sparseforge_fx.training.undo import dense_again_on_error

WHOLE = ("reorder", "reconstruct")  # options that want a model in memory
END = "-start"  # of the folder's name, which begins with the training state's


@dataclass(frozen=True)
class SharedStart:
    """``config`` is the run's as far as it can be followed, ``trained`` what is left to do behind the start, with the
    masks that it leaves."""

    config: TrainedConfig
    trained: TrainedConfig
    notes: list[str]

    @classmethod
    def of(cls, config: TrainedConfig, recipe: Recipe, on_disk: bool) -> SharedStart | None:
        """None: the start looks at the weights alone, or is one that processes cannot share. Raises SparseForgeError
        for options that were asked for and cannot be followed on disk."""
        if config.start not in LAYERWISE or not config.starts_fixed or config.values != "float":
            return None
        notes = []
        if on_disk:
            if asked := [n for n in WHOLE if recipe.options.get(n)]:
                raise SparseForgeError(
                    f"{asked[0]} needs the whole model in memory, and this one stays on disk: leave it out, or start "
                    "on one process and go on from there (teacher=, start='magnitude')"
                )
            told = f"the start {config.start} was solved from disk, block by block, on the CPU"
            if left_out := [n for n in WHOLE if getattr(config, n)]:
                told += f", without the preset's {' and '.join(left_out)}, which want the model in memory"
            config, notes = replace(config, reorder=False, reconstruct=0), [told]
        over = replace(
            config, start="magnitude", reorder=False, reconstruct=0, expert_tokens=EXPERT_TOKENS, every_token=False
        )
        return cls(config, over, notes)

    def in_memory(self, run: Run, calibrated: Sequence[Any]) -> dict[str, Any]:
        """Give the run's model the start's weights, and the run its dense ones to teach it. Returns what a report says
        of a start."""
        clock = time.monotonic()
        parameters = {n: p for n, p in run.program.state.items() if isinstance(p, nn.Parameter)}
        copies = {id(p): p.detach().clone() for p in parameters.values()}
        with dense_again_on_error(run.program) as written:
            written += [(p, copies[id(p)]) for p in parameters.values()]
            if run.taught_by is None:
                run.taught_by = {name: copies[id(p)] for name, p in parameters.items()}
            alone = Distillation(kl=0.0)  # nothing trains here
            whole = prepare_captured(run.program, run.sites, self.config, alone, taught_by=run.taught_by)
            try:
                whole.calibrate(calibrated)
                told = whole.start_report
                finalize(whole)
            finally:
                whole.release()
        told |= {"calibration_sequences": sum(map(count_rows, calibrated))}
        return told | {"calibration_seconds": time.monotonic() - clock}

    def from_disk(
        self, in_parts: InParts, data: Any, recipe: Recipe, state_path: Path | None, cache_dir: Any
    ) -> tuple[InParts, dict[str, Any]]:
        """The model with the start's weights, and what a run's report says of a start. A walk that is complete in its
        folder is not repeated, one that was killed goes on."""
        if state_path is None:
            raise SparseForgeError(
                f"the start {self.config.start} of a model on disk is written beside the training state: give "
                "state_path"
            )
        folder = state_path.with_name(state_path.name + END)
        source = in_parts.model
        asked = Recipe(
            model=str(source.folder), method=self.config.start, pattern=str(self.config.pattern),
            dtype=str(dtype_of(source.skeleton))[6:],
            options={n: getattr(self.config, n) for n in ("expert_tokens", "every_token")},
            **{n: getattr(recipe, n) for n in ("text_column", "separator", "include", "exclude", "plan", "batch_size")},
            **{n: getattr(recipe, n) for n in ("length", "calibration", "seed")},
        )  # fmt: skip

        def prune() -> None:
            if not (folder / "report.json").is_file():
                walk(data, asked, output=folder, resume=True, cache_dir=cache_dir)

        first_walks(prune)
        report = json.loads((folder / "report.json").read_text())
        done, wanted = report["recipe"], asked.describe()
        if different := [n for n in wanted if n != "data" and done.get(n) != wanted[n]]:
            raise SparseForgeError(
                f"{folder} is the start of another run (its {', '.join(different)} differ): remove it, or repeat that "
                "run's options"
            )
        told = {"layer_notes": report["layer_notes"], "calibration_sequences": report["calibration_sequences"]}
        told |= {name: report[name] for name in ("layer_errors", "experts") if name in report}
        told |= {"calibration_seconds": float(report["seconds"]), "start_notes": self.notes}
        return replace(in_parts, start=Shards(folder)), told
