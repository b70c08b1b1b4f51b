"""Write ``report.html`` beside the files that it is made of."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparseforge_fx.decision import everywhere, frontier, standing
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.files import new_file
from sparseforge_fx.formats import DENSE
from sparseforge_fx.page import facts, pictures, stacks
from sparseforge_fx.plans import Plan

PAGE, REPORT = "report.html", "report.json"
#: beside report.json, as far as somebody made them: what evaluate, benchmark, lower and plan measured
QUALITY, SPEED, COSTS, PLAN = "evaluation.json", "benchmark.json", "costs.json", "plan.json"


def write_page(folder: Path) -> Path:
    """Make the page of a run from ``report.json`` of its folder and the measurements beside it.

    Raises SparseForgeError where there is no report, or where one of the files is not what its name says.
    """
    text = render(folder)
    with new_file(folder / PAGE) as file:
        file.write_text(text, encoding="utf-8")
    return folder / PAGE


def render(folder: Path) -> str:
    """The page's text."""
    report = read(folder / REPORT)
    if report is None:
        raise SparseForgeError(f"there is no report.json in {folder}: name the output folder of a finished run")
    quality, speed, costs = (read(folder / name) or {} for name in (QUALITY, SPEED, COSTS))
    plan = _plan(folder, report)
    recipe = folder / "recipe.yaml"
    try:
        drawn, constant = pictures.curves(report.get("curves") or [])
        content: dict[str, Any] = {
            "folder": folder.name,
            "title": facts.title(report),
            "sentence": facts.sentence(report),
            "numbers": facts.key_numbers(report, quality, speed),
            "quality": facts.quality_tables(quality),
            "paired": facts.paired_sentence(quality),
            "texts": quality.get("texts") or [],
            "curves": drawn,
            "constant": {n.replace("_", " "): f"{v:.3g}" for n, v in constant.items()},
            "maps": facts.layer_maps(report, plan),
            "blocks": facts.block_tables(report),
            "stacks": stacks.of_stacks(report),
            "experts": stacks.of_experts(report),
            "speed": facts.speed_tables(speed, costs.get("rows") or speed.get("gate") or [], plan),
            "frontiers": _frontiers(quality, speed, plan),
            "notes": report.get("notes") or [],
            "skipped": facts.skipped(report),
            "recipe": recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
            "model": (report.get("recipe") or {}).get("model"),
            "made_with": {
                "device": report.get("device"),
                "threads": report.get("threads"),
                "commit": report.get("commit"),
                **(report.get("versions") or {}),
            },
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise SparseForgeError(
            f"the files of {folder} are no whole report of sparseforge-fx ({type(error).__name__}: {error})"
        ) from error
    return _template().render(content)


def read(file: Path) -> dict[str, Any] | None:
    """A json file's mapping; None where there is no file. Raises SparseForgeError for anything else."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SparseForgeError(f"{file} is not json ({error}): write it again, or delete it") from error
    if not isinstance(content, dict):
        raise SparseForgeError(f"{file} holds no mapping: write it again, or delete it")
    return content


def _plan(folder: Path, report: Mapping[str, Any]) -> Plan | None:
    """The plan beside the report, or the one that the run followed, if it is still there."""
    followed = (report.get("recipe") or {}).get("plan")
    for file in (folder / PLAN, *([Path(followed)] if isinstance(followed, str) else [])):
        if file.is_file():
            return Plan.read(file)
    return None


def _frontiers(quality: Mapping[str, Any], speed: Mapping[str, Any], plan: Plan | None) -> list[tuple[str, str]]:
    """(title, picture): of what was measured, and of what the plan's prices say."""
    by_role, batches = quality.get("perplexity") or {}, speed.get("batches") or {}
    found = []
    if {"dense", "model"} <= set(by_role) and batches:
        models = batches[min(batches, key=int)]
        names = (("dense", "dense", "dense"), ("this run, packed", "packed", "model"))
        points = [(name, models[fast]["tokens_per_second"], by_role[role]["perplexity"]) for name, fast, role in names]
        found.append(("Quality against speed, as measured", pictures.frontier(points)))
    if plan is not None and not math.isnan(sum(here := standing(plan))):
        counts = Counter(form for w in plan.weights for form in w.prices if form != DENSE)
        forms = [form for form, count in counts.items() if 2 * count > len(plan.weights)]  # the others fit too few
        named = [("dense", 1.0, 0.0), *((str(f), *standing(everywhere(plan, f))) for f in forms)]
        drawn = pictures.predicted_frontier(frontier(plan), named, here)
        found.append(("Quality against speed, as the plan predicts them", drawn))
    return found


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    loader = PackageLoader("sparseforge_fx.page", "")
    kept = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    kept.filters["breaking"] = lambda name: Markup(str(escape(name)).replace("_", "_<wbr>").replace(".", ".<wbr>"))
    return kept.get_template("page.html.jinja")
