"""Write the measured tables into README.md and docs/ from results/*.json. Nothing is typed by hand; plots.py draws the
pictures.

python examples/benchmarks/tables.py [--check]     (--check: fail if a page is not what the files say)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import budget_tables as budget
import frontier_tables as frontier
import quality_tables as quality
import speed_tables as speed
import training_tables as training

ROOT = Path(__file__).resolve().parents[2]
TABLES = {
    "main": quality.main_table,
    "quality": quality.quality_table,
    "leaderboard": quality.leaderboard_table,
    "budget": budget.budget_table,
    "swap-gains": budget.swap_table,
    "mixture": budget.mixture_table,
    "objective": budget.objective_table,
    "continued": budget.continued_table,
    "rates": budget.rates_table,
    "rotated": budget.rotated_table,
    "ablations": quality.ablation_table,
    "reorder": quality.reorder_table,
    "estimator-quality": quality.estimator_quality_table,
    "quantized": quality.quantized_table,
    "overhead": training.overhead_table,
    "attention-gradients": training.attention_table,
    "step-against": training.step_against_table,
    "step-profile": training.step_profile_table,
    "forecasts": training.forecast_table,
    "on-disk": training.on_disk_table,
    "sharded": training.sharded_table,
    "scale": training.scale_table,
    "many-rows": speed.many_rows_table,
    "kernels": speed.kernel_table,
    "experts-decode": speed.experts_table,
    "huge-pages": speed.huge_pages_table,
    "large-decode": speed.large_decode_table,
    "decode-attention": speed.decode_attention_table,
    "gpu-kernels": speed.gpu_kernel_table,
    "decode": speed.decode_table,
    "generation": speed.generation_table,
    "prefill": speed.prefill_table,
    "one-shot": training.one_shot_table,
    "estimators": training.estimator_table,
    "formats": speed.formats_table,
    "frontier": frontier.frontier_table,
    "plan-check": frontier.plan_check_table,
    "row-split": frontier.row_split_table,
    "contenders": frontier.contenders_table,
}
PAGES = ("README.md", "docs/choosing.md", "docs/measurements.md", "docs/scale.md")


def main() -> None:
    stale = [page for page in PAGES if not update(ROOT / page, write="--check" not in sys.argv)]
    if stale and "--check" in sys.argv:
        raise SystemExit(f"{', '.join(stale)} not what results/*.json say: run examples/benchmarks/tables.py")


def update(page: Path, write: bool) -> bool:
    """Fill the blocks of a page; was it up to date?"""
    before = page.read_text()

    def filled(match: re.Match) -> str:
        return f"<!-- table:{match[1]} -->\n{TABLES[match[1]]()}\n<!-- /table -->"

    after = re.sub(r"<!-- table:([\w-]+) -->\n.*?<!-- /table -->", filled, before, flags=re.DOTALL)
    if write:
        page.write_text(after)
    return after == before


if __name__ == "__main__":
    main()
