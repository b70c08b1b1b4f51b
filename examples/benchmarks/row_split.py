"""Is it worth while to split the rows of a matrix in a dense and a sparse part? Loss by prediction, time by measurement.

    python examples/benchmarks/row_split.py MODEL --data c4.jsonl

Of every linear that can be 2:4, each output's share of the predicted loss (as ``sf.plan`` has it) in 2:4 and dense, both
in VALUES; then, for budgets between all dense and all 2:4, the least loss where whole matrices are chosen and where
single outputs are (by loss won per input, as a product's time goes by its bytes). ``time`` has two products over one
input, put together and brought into the order of the outputs, over what the same shares of the whole products take.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from common import language_model, random_two_four, save, seconds_in_turn, use
from torch import Tensor
from transformers import AutoTokenizer

from sparseforge_fx.deploy.lowering.measure import ROTATED_BYTES
from sparseforge_fx.formats import Format, parse_format
from sparseforge_fx.kernels.packed import Packed, pack_codes
from sparseforge_fx.kernels.sparse_linear import sparse_linear
from sparseforge_fx.methods.one_shot import SparseGPTConfig
from sparseforge_fx.methods.rounding import round_weight
from sparseforge_fx.planning import make
from sparseforge_fx.planning.candidates import Candidate, candidates
from sparseforge_fx.planning.sensitivity import loss_by_output
from sparseforge_fx.planning.solutions import solutions
from sparseforge_fx.training.inputs import open_run
from sparseforge_fx.training.recipe import Recipe

BUDGETS = (0.25, 0.5, 0.75)  # share of the inputs x outputs that is 2:4


def main(
    model: str,
    data: Annotated[str, typer.Option(help="text source of the prediction")],
    values: str = "int8",
    calibration: int = make.CALIBRATION,
    length: int = 512,
    kept: Annotated[float, typer.Option(help="share of the outputs that stays dense where times are measured")] = 0.25,
    rows: Annotated[list[int], typer.Option(help="tokens of a product")] = [1, 8],  # noqa: B006
    rounds: int = 15,
    rotate_bytes: int = ROTATED_BYTES,
    seed: int = 0,
    threads: int = 0,
) -> None:
    use(threads=threads)
    dense, sparse = parse_format(values), parse_format(f"2:4 {values}")
    tokenizer, net = AutoTokenizer.from_pretrained(model), language_model(model, torch.float32)
    recipe = Recipe(calibration=calibration, length=length, batch_size=2, seed=seed)
    run = open_run(net, data, recipe, SparseGPTConfig(), None, tokenizer=tokenizer, cache_dir=None, example_inputs=None)
    found = [c for c in candidates(run.program, [dense, sparse])[0] if sparse in c.formats]
    grown: dict[str, Tensor] = {}

    def each(name: str, weight: Tensor, moments: Tensor, curvature: Tensor) -> None:
        solved = solutions(weight, moments, [dense, sparse])
        by_form = {form: loss_by_output(w - weight, moments, curvature) for form, w in solved.items()}
        grown[name] = by_form[sparse] - by_form[dense]

    make.predict(run, recipe, [c._replace(formats=c.formats[:1]) for c in found], each)
    sizes = sorted({(c.site.out_features, c.site.in_features) for c in found})
    save("row_split", f"{Path(model).name}-{values.replace('/', '-')}", {
        "model": Path(model).name, "data": Path(data).name, "values": values, "calibration": calibration,
        "length": length, "seed": seed, "kept": kept, "weights": len(found),
        "loss_of_all_sparse": float(sum(g.sum() for g in grown.values())),
        "share_of_the_kept": {c.site.fqn: share(grown[c.site.fqn], kept) for c in found},
        "budgets": [compared(found, grown, budget) for budget in BUDGETS],
        "time": [timed(size, count, dense, sparse, kept, rotate_bytes, rounds) for size in sizes for count in rows],
    })  # fmt: skip


def share(grown: Tensor, kept: float) -> float:
    """Of a matrix's loss, what its worst outputs make, that many of them."""
    return float(grown.sort(descending=True).values[: round(kept * len(grown))].sum() / grown.sum().clamp(min=1e-30))


def compared(found: list[Candidate], grown: dict[str, Tensor], budget: float) -> dict[str, float]:
    """The least loss with that share of the weights 2:4, by whole matrices and by outputs."""
    every = [(grown[c.site.fqn], c.site.in_features) for c in found]
    limit = budget * sum(len(g) * width for g, width in every)
    whole = least([(float(g.sum()), len(g) * width) for g, width in every], limit)
    by_output = least([(loss, width) for g, width in every for loss in g.tolist()], limit)
    return {"sparse": budget, "by_matrix": whole, "by_output": by_output, "ratio": by_output / whole}


def least(items: list[tuple[float, int]], limit: float) -> float:
    """The sum of losses of the items taken, cheapest for their size first, until they have that size; the last one in
    part, so that both kinds of items meet the same budget."""
    total = size = 0.0
    for loss, its_size in sorted(items, key=lambda item: item[0] / item[1]):
        taken = min(1.0, (limit - size) / its_size)
        total, size = total + taken * loss, size + taken * its_size
        if size >= limit:
            break
    return total


def timed(
    size: tuple[int, int], count: int, dense: Format, sparse: Format, kept: float, rotate_bytes: int, rounds: int
) -> dict:
    """Microseconds of whole products and of a split one, weights rotated beyond the caches."""
    (out, width), few = size, round(kept * size[0])
    torch.manual_seed(0)
    x, order = torch.randn(count, width, dtype=torch.bfloat16), torch.randperm(out)
    copies = max(2, rotate_bytes // (out * width))
    weights = {
        "dense": rotated(torch.randn(out, width), dense, copies),
        "sparse": rotated(random_two_four(out, width), sparse, copies),
        "dense part": rotated(torch.randn(few, width), dense, copies),
        "sparse part": rotated(random_two_four(out - few, width), sparse, copies),
    }

    def whole(name: str) -> None:
        for packed in weights[name]:
            product(x, packed)

    def split() -> None:
        for one, other in zip(weights["dense part"], weights["sparse part"], strict=True):
            torch.cat([product(x, one), product(x, other)], 1).index_select(1, order)

    runs = {"dense": lambda: whole("dense"), "sparse": lambda: whole("sparse"), "split": split}
    times = {name: 1e6 * median(t) / copies for name, t in seconds_in_turn(runs, rounds).items()}
    ideal = kept * times["dense"] + (1 - kept) * times["sparse"]
    return {"out": out, "in": width, "rows": count, "microseconds": times, "split_over_shares": times["split"] / ideal}


def rotated(weight: Tensor, form: Format, copies: int) -> list[Packed]:
    rounded = round_weight(weight, form)
    packed = pack_codes(rounded.codes, rounded.scales, form)
    return [Packed(*(t.clone() if isinstance(t, Tensor) else t for t in packed)) for _ in range(copies)]


def product(x: Tensor, packed: Packed) -> Tensor:
    return sparse_linear(x, packed.values, packed.bitmask, "rows", packed.in_features, scales=packed.scales)


if __name__ == "__main__":
    typer.run(main)
