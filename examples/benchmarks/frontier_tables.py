"""Tables of formats against each other: points of quality, speed and bytes, and the dense contenders of few bits."""

from __future__ import annotations

from statistics import median

from records import blocks, machine, read, table


def batches(points: list[dict]) -> list[str]:
    """The batches that all points were timed at."""
    return [b for b in points[0]["tokens_per_second"] if all(b in p["tokens_per_second"] for p in points)]


def longer(points: list[dict]) -> list[str]:
    """The longer prompts that all points were timed behind."""
    return [p for p in points[0].get("longer_prompts", {}) if all(p in o.get("longer_prompts", {}) for o in points)]


def dominators(points: list[dict]) -> dict[str, list[str]]:
    """Who is as good, as fast at every batch behind every prompt, and as small as a point, and better in one of them, by
    the point's name."""
    counts, prompts = (batches(points), longer(points)) if points else ([], [])

    def worth(point: dict) -> list[float]:
        speeds = [point, *(point["longer_prompts"][p] for p in prompts)]
        return [-point["perplexity"], -point["bytes"], *(of["tokens_per_second"][b] for of in speeds for b in counts)]

    worths = {point["name"]: worth(point) for point in points}
    return {
        name: [o for o, w in worths.items() if w != mine and all(a >= b for a, b in zip(w, mine, strict=True))]
        for name, mine in worths.items()
    }


def frontier_table() -> str:
    points = sorted(read("frontier"), key=lambda p: p["perplexity"])
    if not points:
        return table((), "", ())
    counts, beaten = batches(points), dominators(points)
    prompts = longer(points)
    scored = any(point["zero_shot_mean"] is not None for point in points)
    rows = []
    for point in points:
        quality = [f"{point['perplexity']:.2f}"]
        if scored:
            quality.append("" if point["zero_shot_mean"] is None else f"{100 * point['zero_shot_mean']:.1f}")
        speeds = (f"{point['tokens_per_second'][b]:.1f}{_predicted(point, b)}" for b in counts)
        prompt = point.get("prompt_tokens_per_second", {}).get(counts[-1])
        behind = (f"{point['longer_prompts'][p]['tokens_per_second'][b]:.1f}" for p in prompts for b in counts)
        rows.append((
            point["name"], *quality, *speeds, *behind, "" if prompt is None else f"{prompt:.0f}",
            f"{point['bytes'] / 1e6:.0f} MB", ", ".join(beaten[point["name"]]) or "nobody",
        ))  # fmt: skip
    asked = points[0]["asked"]
    text = (
        f"{machine(points[0])} threads; perplexity of the first {asked['windows']} windows of {asked['context']} tokens of {asked['text']};"
        f" prompts of {points[0]['prompt']} tokens, {points[0]['tokens']} new ones, decoded tokens/s are of those behind the first;"
        f" commit {points[0]['commit']}."
    )
    if base := next((point["predicted_from"] for point in points if "predicted_from" in point), None):
        text += f" In brackets: what the linears' times say if all else takes as long as in {base}."
    behind = (f"behind {p} tokens, batch {b}" for p in prompts for b in counts)
    speeds = (*(f"tokens/s, batch {b}" for b in counts), *behind, f"prompt tokens/s, batch {counts[-1]}")
    names = ("point", "perplexity", *(["zero-shot %"] if scored else []), *speeds, "bytes", "dominated by")
    return blocks([(text, table(names, "l" + "r" * (len(names) - 2) + "l", rows))])


def _predicted(point: dict, batch: str) -> str:
    speed = (point.get("predicted_tokens_per_second") or {}).get(batch)
    return "" if speed is None else f" ({speed:.1f})"


def contenders_table() -> str:
    """Dense, the fastest of 8 and of 4 bits that is a whole linear, and how many times as fast as the best dense one the
    best 2:4 one of these bits is, per shape, dtype, threads and rows."""
    parts = []
    for run in read("contenders"):
        rows = []
        for case in run["cases"]:
            whole = {n: r for n, r in case["results"].items() if n != "stream" and not n.endswith("product")}
            best, gains = [], []
            for bits in (0, 8, 4):
                of = {n: r["microseconds"] for n, r in whole.items() if r["bits"] == bits}
                name = min(of, key=of.__getitem__)
                best.append(f"{name}: {of[name]:.0f} us, {whole[name]['gigabytes_per_second']:.1f} GB/s")
                if bits:
                    sparse, dense = (
                        min(t for n, t in of.items() if n.endswith("2:4") == is_sparse) for is_sparse in (True, False)
                    )
                    gains.append(f"{dense / sparse:.2f}x")
            rows.append((f"{case['out']}x{case['in']}", case["dtype"], case["threads"], case["rows"], *best, *gains))
        text = f"{run['device']} ({run['instruction_set']}); commit {run['commit']}; weights rotated over {run['rotated_bytes'] / 1e6:.0f} MB."
        names = ("weight", "dtype", "threads", "M", "dense", "best of 8 bits", "best of 4 bits")
        gained = ("2:4 over dense, 8 bits", "4 bits")
        parts.append((text, table((*names, *gained), "llrrlllrr", rows)))
    return blocks(parts)


def plan_check_table() -> str:
    """Predicted against measured: one weight in one format at a time."""
    parts = []
    for run in read("plan_check"):
        rows = []
        for form, correlation in run["spearman_by_format"].items():
            of_form = [r for r in run["rows"] if r["format"] == form]
            shares = [r["kl"] / r["predicted"] for r in of_form if r["predicted"] > 0]
            rows.append((form, len(of_form), f"{correlation:.2f}", f"{median(shares):.2f}"))
        shares = [r["kl"] / r["predicted"] for r in run["rows"] if r["predicted"] > 0]
        rows.append(("all pairs", run["pairs"], f"{run['spearman']:.2f}", f"{median(shares):.2f}"))
        text = (
            f"{run['model']}: {run['weights']} random linears and the head; predicted by {run['calibration']} sequences of {run['data']} in"
            f" {run['predict_seconds']:.0f} s, measured on {run['windows']} windows of {run['length']} tokens of {run['valid']};"
            f" {machine(run)} threads, commit {run['commit']}."
        )
        names = ("format", "pairs", "rank correlation", "divergence measured over predicted, median")
        parts.append((text, table(names, "lrrr", rows)))
    return blocks(parts)


def row_split_table() -> str:
    """What single outputs that stay dense would win over whole matrices that do, and what two products take."""
    parts = []
    for run in read("row_split"):
        rows = [
            (f"{b['sparse']:.0%}", f"{b['by_matrix']:.4f}", f"{b['by_output']:.4f}", f"{b['ratio']:.2f}")
            for b in run["budgets"]
        ]
        of_kept = median(run["share_of_the_kept"].values())
        text = (
            f"{run['model']}, {run['values']}: {run['weights']} linears, all 2:4 {run['loss_of_all_sparse']:.4f} nats predicted; the worst"
            f" {run['kept']:.0%} of a matrix's outputs make {of_kept:.0%} of its loss (median); commit {run['commit']}."
        )
        parts.append((text, table(("2:4 share", "loss by matrix", "loss by output", "ratio"), "rrrr", rows)))
        times = [
            (f"{t['out']}x{t['in']}", t["rows"], *(f"{t['microseconds'][n]:.0f}" for n in ("dense", "sparse", "split")),
             f"{t['split_over_shares']:.2f}")
            for t in run["time"]
        ]  # fmt: skip
        text = f"Microseconds on {machine(run)} threads; split: {run['kept']:.0%} of the outputs dense, the rest 2:4, put together in their order."
        names = ("weight", "M", "dense", "2:4", "split", "split over its shares of both")
        parts.append((text, table(names, "lrrrrr", times)))
    return blocks(parts)
