"""Products with weights on pages of 2 MiB beside the same on pages of 4 KiB, on this CPU; one json.

    python examples/benchmarks/huge_pages.py [--label NAME] [--shapes 11008x4096,1536x576] [--rows 1,8] [--rounds 15]

Weights are random, rotated over 256 MiB; both memories in turn, every format in the layout that is native here. In a model
as small as the second shape's all weights lie together, which single ones do not by themselves: there "4 KiB" is what
torch gives, too. How much of the memory the system did put on large pages is recorded.
"""

from __future__ import annotations

from functools import partial
from statistics import median, quantiles

import torch
import typer
from common import in_turn, save, use

from sparseforge_fx.deploy.lowering.measure import MOST_COPIES, ROTATED_BYTES, _packed, _random, _Rotation
from sparseforge_fx.formats import parse_format
from sparseforge_fx.kernels.huge_pages import on_huge_pages
from sparseforge_fx.kernels.layouts import native_layout

FORMATS = ("2:4", "dense int8", "2:4 int8", "dense int4", "2:4 int4")
CPU = torch.device("cpu")


def main(
    label: str = "cpu",
    shapes: str = "11008x4096,4096x4096,1536x576",
    rows: str = "1,8",
    rounds: int = 15,
    rotate_bytes: int = ROTATED_BYTES,
    threads: int = 0,
) -> None:
    """Write results/huge_pages/LABEL.json."""
    use("cpu", threads)
    cases = []
    for shape in shapes.split(","):
        out, width = map(int, shape.split("x"))
        for name in FORMATS:
            form = parse_format(name)
            layout = native_layout(CPU, form, out, width, torch.bfloat16)
            packed = _random(torch.randn(out, width).bfloat16(), form)
            whole = (*layout.convert(packed), packed.scales)
            size = sum(t.nbytes for t in whole if t is not None)
            count = min(max(2, -(-rotate_bytes // size)), MOST_COPIES)
            small = [t.clone() for _ in range(count) for t in whole if t is not None]
            before = huge_bytes()
            large = list(on_huge_pages(small))
            share = (huge_bytes() - before) / sum(t.nbytes for t in large)
            call, each = partial(_packed, layout.name), sum(t is not None for t in whole)
            runs = {
                kind: _Rotation([(*held[i : i + each], None)[:3] for i in range(0, len(held), each)], call, CPU)
                for kind, held in (("4 KiB", small), ("2 MiB", large))
            }
            for m in map(int, rows.split(",")):
                inputs = [(torch.randn(m, width).bfloat16(),)]
                repeats = {kind: run.calibrate(inputs, 0.02) for kind, run in runs.items()}
                turns = {kind: partial(run.time, inputs, repeats[kind]) for kind, run in runs.items()}
                times = in_turn(turns, rounds)
                gains = [a / b for a, b in zip(*times.values(), strict=True)]
                case = {
                    "out": out, "in": width, "format": name, "layout": layout.name, "rows": m, "huge_share": share,
                    "microseconds": {kind: median(t) for kind, t in times.items()}, "gain": median(gains),
                    "quartiles": quantiles(gains, n=4)[::2],
                }  # fmt: skip
                cases.append(case)
                print(case, flush=True)
            del small, large, runs
    save("huge_pages", label, {"rotated_bytes": rotate_bytes, "rounds": rounds, "cases": cases})


def huge_bytes() -> int:
    """Of this process, on large pages."""
    with open("/proc/self/smaps_rollup") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("AnonHugePages"))


if __name__ == "__main__":
    typer.run(main)
