"""What a model is worth in each format: perplexity and zero-shot accuracy against speed and bytes; one json a point.

    python examples/benchmarks/frontier.py --text TEST.txt --folder FILES --model MODEL --data TRAIN.jsonl \\
        [--recipe RECIPE.yaml] [--two-four FOLDER] [--point "llama.cpp Q8_0=FILE.gguf"] [--tasks 200] [--prepare]

Of MODEL come dense, 2:4 and planned points (frontier_points.py), made sparse by the recipe; the 2:4 ones of what lies in
a sparse FOLDER, if one is named. Any other point is a name and what sf.load takes, if need be with the dtype to load it
in; a .gguf is run by llama.cpp (llamacpp.py). Files and qualities that are there are taken as they are, so that a run goes
on where it was killed; --prepare stops before the speeds, which want a quiet machine and are measured anew every time.
They are those of the compiled generator (AOTInductor) and of llama.cpp, each in a fresh process, all points in turn: of
the prompt until the first token is there, and of the tokens after it. In every round the points' linears are timed, too,
as a plan's prices are. Beside the speed stands what follows from these for a model of which all else takes as long as in
dense int8: of the points that are all of one format its linears take the least of a step in which nothing is sparse.

A GGUF's perplexity is of llama.cpp's own logits. Zero-shot accuracy is of the weights, dequantised. Which points are
dominated (another is as good, as fast and as small, and better in one of them) is for tables.py to say.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer
from common import CONTEXT, save, use
from formats import _run as run_generator
from frontier_points import Goal, Maker, Point, expected_speed, made, predicted, price_now, recipe_of, time_of
from frontier_prepared import held_bytes, llama_cpp, prepared

from sparseforge_fx.report import environment

BASE = "dense int8"
SAMPLES = 2  # of a process, in each round; of one with longer prompts, which take long, one


def main(
    text: Annotated[Path, typer.Option(help="test text, for quoting", exists=True)],
    folder: Annotated[Path, typer.Option(help="models, exported files and qualities stay here")],
    model: Annotated[str | None, typer.Option(help="the dense model that points are made of")] = None,
    data: Annotated[str | None, typer.Option(help="text to train, round and predict by")] = None,
    recipe: Annotated[Path | None, typer.Option(help="of the sparse points; default: sparsegpt, untrained")] = None,
    two_four: Annotated[
        Path | None, typer.Option(help="a sparse folder, instead of the recipe's 2:4 model", exists=True)
    ] = None,
    rounding: Annotated[int, typer.Option(help="sequences that values are rounded on")] = 32,
    dtype: Annotated[str, typer.Option(help="of the floats in the points that are made")] = "bfloat16",
    speedup: Annotated[list[float], typer.Option(help="of plans")] = [1.3, 1.6, 2.0],  # noqa: B006
    size: Annotated[list[float], typer.Option("--bytes", min=0, max=1, help="of plans, a share")] = [],  # noqa: B006
    in_loop: Annotated[bool, typer.Option("--in-loop", help="a 2:4 point trained in int4, too")] = False,
    point: Annotated[list[str], typer.Option(help="another one: NAME=PATH or NAME=PATH:DTYPE")] = [],  # noqa: B006
    batch: Annotated[list[int], typer.Option()] = [1, 8],  # noqa: B006
    windows: int = 16,
    tasks: Annotated[int, typer.Option(help="documents of each zero-shot task; 0: no tasks")] = 0,
    prompt: Annotated[list[int], typer.Option(help="tokens of the prompts; predictions are for the first")] = [16, 512],  # noqa: B006
    tokens: int = 64,
    max_length: Annotated[int, typer.Option(help="what the generator's cache could hold")] = CONTEXT,
    rounds: Annotated[int, typer.Option(min=2)] = 3,
    threads: int = 0,
    prepare: Annotated[bool, typer.Option("--prepare", help="qualities and files alone")] = False,
) -> None:
    if model is None and (unused := [n for n, given in (("recipe", recipe), ("two-four", two_four)) if given]):
        sys.exit(f"--{unused[0]} is for points that are made of a model: name it with --model")
    check_prompts(prompt, tokens, max_length)
    use(threads=threads)
    folder.mkdir(parents=True, exist_ok=True)
    points = [read_point(each) for each in point]
    if model is not None:
        if data is None:
            sys.exit("--model needs --data: points are made by it")
        maker = Maker(model, data, recipe_of(recipe), rounding, dtype, str(two_four) if two_four else None)
        goals = [*(Goal("speedup", s) for s in speedup), *(Goal("bytes", b) for b in size)]
        points = made(maker, folder, batch, goals, in_loop) + points
    known = {each.name: prepared(each, folder, text, list(batch), windows, tasks, max_length) for each in points}
    if prepare:
        return
    request = {"text_tokens": tokens, "tokens": tokens, "batch": list(batch), "device": "cpu"}
    request |= {"threads": threads or torch.get_num_threads()}
    plans = {each.name: each.plan for each in points if each.plan is not None}
    found: dict[int, dict[str, list[dict[str, Any]]]] = {
        length: {each.name: [] for each in points} for length in prompt
    }
    prices: list[dict[Any, dict[int, float]]] = []
    for _ in range(rounds):
        if plans:
            prices.append(price_now(list(plans.values()), dtype))
        for length, of in found.items():
            ids = torch.load(folder / "windows.pt")[:1, :length]
            samples = SAMPLES if length == prompt[0] else 1
            torch.save({**request, "ids": ids, "rounds": samples}, folder / "request.pt")
            for each in points:
                of[each.name].append(speed(each, folder))
    here = environment()  # before the first file is written, after which the tree has changes
    decoding, *longer = ({n: decoded(runs, p, tokens) for n, runs in of.items()} for p, of in found.items())
    now = {p: {t: median(of[p][t] for of in prices) for t in of_first} for p, of_first in (prices or [{}])[0].items()}
    linears = {name: time_of(plan, now) for name, plan in plans.items()}
    for each in points:
        record = {
            **known[each.name],
            "asked": {**known[each.name]["asked"], "path": Path(each.path).name},
            "bytes": Path(each.path).stat().st_size if each.is_gguf else held_bytes(each),
            "prompt": prompt[0],
            "tokens": tokens,
            "max_length": max_length,
            **decoding[each.name],
            "longer_prompts": {str(p): of[each.name] for p, of in zip(prompt[1:], longer, strict=True)},
        }
        if each.plan is not None:
            base = BASE if BASE in linears else points[0].name
            speeds = decoding[base]["tokens_per_second"]
            expected = expected_speed(linears[each.name], linears[base], speeds)
            record |= {"predicted": predicted(each.plan), "linears_microseconds": linears[each.name]}
            record |= {"predicted_from": base, "predicted_tokens_per_second": expected}
        save("frontier", each.label, record, here)
        print(each.name, f"perplexity {record['perplexity']:.2f}", record["tokens_per_second"], flush=True)


def check_prompts(prompts: list[int], tokens: int, max_length: int) -> None:
    """Leave with a sentence before anything takes long."""
    if prompts != sorted(set(prompts)) or prompts[0] < 1:
        sys.exit(f"--prompt {prompts}: name different numbers of tokens, the least first")
    if prompts[-1] > CONTEXT or prompts[-1] + tokens > max_length:
        sys.exit(
            f"--prompt {prompts[-1]}: a window has {CONTEXT} tokens, and a cache of {max_length} no room for {tokens} more"
            " behind a longer one: shorten it"
        )


def decoded(rounds: list[dict[str, Any]], prompt: int, tokens: int) -> dict[str, Any]:
    """By batch: tokens per second after the first one, median and quartiles, and those of the prompt."""
    speeds: dict[str, Any] = {"tokens_per_second": {}, "quartiles": {}, "prompt_tokens_per_second": {}}
    for b in rounds[0]["tokens_per_second"]:
        rows = int(b)
        first = [s for of in rounds for s in of["first_token_seconds"][b]]
        whole = [rows * tokens / v for of in rounds for v in of["tokens_per_second"][b]]
        after = [rows * (tokens - 1) / (w - f) for w, f in zip(whole, first, strict=True)]
        speeds["tokens_per_second"][b] = median(after)
        speeds["quartiles"][b] = quantiles(after, n=4)[::2]
        speeds["prompt_tokens_per_second"][b] = median(rows * prompt / f for f in first)
    return speeds


def read_point(given: str) -> Point:
    name, equals, path = given.partition("=")
    if not (name and equals and path):
        sys.exit(f"--point {given!r}: write NAME=PATH, or NAME=PATH:float32")
    place, _, dtype = path.rpartition(":")
    known = dtype in ("float32", "bfloat16", "float16")
    return Point(name, place, dtype) if known else Point(name, path, None)


def speed(point: Point, folder: Path) -> dict[str, Any]:
    """Of one fresh process."""
    if point.is_gguf:
        return llama_cpp("speed", point, folder)
    return run_generator("generator-aoti", folder / f"{point.label}.pt2", folder)


if __name__ == "__main__":
    typer.run(main)
