"""Tables of what a kernel or a whole model takes."""

from __future__ import annotations

from collections import defaultdict

from records import blocks, machine, read, table


def cpu_runs(few_rows: bool) -> list[dict]:
    """The runs of cpu_kernels.py from one token on, or those of more."""
    runs = [run for run in read("kernels") if "instruction_set" in run]
    return [run for run in runs if any(case["rows"] == 1 for case in run["cases"]) == few_rows]


def kernel_table() -> str:
    """Every shape and number of threads."""
    parts = []
    for run in cpu_runs(few_rows=True):
        counts = sorted({case["rows"] for case in run["cases"]})
        groups: dict[tuple, dict[int, float]] = defaultdict(dict)
        for case in run["cases"]:
            key = f"{case['out']}x{case['in']}", case["dtype"], case["threads"]
            groups[key][case["rows"]] = case["median_of_ratios"]
        rows = [
            (shape, dtype, threads, *(f"{found[m]:.2f}x" for m in counts))
            for (shape, dtype, threads), found in groups.items()
        ]
        text = (
            f"{run['device']} ({run['instruction_set']}), load average {run['load_average'][0]} at the end, commit {run['commit']};"
            f" weights rotated over {run['rotated_bytes_of_dense_weights'] / 1e6:.0f} MB."
        )
        names = ("weight", "dtype", "threads", *(f"M = {m}" for m in counts))
        parts.append((text, table(names, "llr" + "r" * len(counts), rows)))
    return blocks(parts)


def experts_table() -> str:
    """One layer of a mixture in every format, beside its bfloat16."""
    parts = []
    for run in read("experts_decode"):
        seconds = {(row["tokens"], row["format"]): row["median_seconds"] for row in run["rows"]}
        rows = [
            (
                row["format"], row["tokens"], f"{row['bytes'] / 1e6:,.0f} MB", f"{1e3 * row['median_seconds']:.2f}",
                f"{1e3 * row['products_seconds']:.2f}",
                "{:.2f}x ({:.2f} to {:.2f})".format(row["median_of_ratios"], *row["quartiles"]),
                f"{seconds[row['tokens'], row['format'].replace('2:4', 'dense')] / row['median_seconds']:.2f}x",
            )
            for row in run["rows"]
        ]  # fmt: skip
        text = (
            f"{run['device']}, {run['threads']} threads, commit {run['commit']}: {run['experts']} experts of {run['width']} over"
            f" {run['hidden']} channels, eight for a token; medians of {run['rounds']} rounds in which all are called in turn, in"
            " brackets the middle half."
        )
        names = (
            "experts",
            "tokens",
            "bytes",
            "ms",
            "products, by a plan",
            "over bfloat16",
            "over dense of the same bits",
        )
        parts.append((text, table(names, "lrrrrrr", rows)))
    return blocks(parts)


def huge_pages_table() -> str:
    """A weight on large pages over the same on small ones."""
    parts = []
    for run in read("huge_pages"):
        counts = sorted({case["rows"] for case in run["cases"]})
        cases = {(f"{c['out']}x{c['in']}", c["format"], c["rows"]): c for c in run["cases"]}
        rows = []
        for shape, form in dict.fromkeys(key[:2] for key in cases):
            cells = []
            for m in counts:
                case = cases[shape, form, m]
                small, large = case["microseconds"]["4 KiB"], case["microseconds"]["2 MiB"]
                cells += [
                    f"{small:.0f}",
                    f"{large:.0f}",
                    "{:.2f}x ({:.2f} to {:.2f})".format(case["gain"], *case["quartiles"]),
                ]
            rows.append((shape, form, *cells))
        least = min(case["huge_share"] for case in run["cases"])
        text = (
            f"{run['device']}, {run['threads']} threads, commit {run['commit']}; weights rotated over"
            f" {run['rotated_bytes'] / 1e6:.0f} MB, both in turn, {run['rounds']} rounds, in brackets the middle half. The system gave"
            f" large pages for at least {least:.0%} of what was asked for."
        )
        heads = [head for m in counts for head in (f"us on 4 KiB, M = {m}", "on 2 MiB", "gain")]
        parts.append((text, table(("weight", "format", *heads), "ll" + "rrr" * len(counts), rows)))
    return blocks(parts)


#: by whether they begin differently
OF_BATCH = {True: "begin with other tokens each", False: "are the same, so that they go to the same experts"}


def _inside(run: dict) -> str:
    if not run["experts"]:
        return f"of {run['hidden']} channels, {run['width']} in the MLP"
    experts = f"of {run['experts']} experts of {run['width']} over {run['hidden']} channels"
    return f"{experts}, of which a token meets {run['chosen']}"


def large_decode_table() -> str:
    """Layers of a large model in every format, beside llama.cpp."""
    parts = []
    for run in read("large_decode"):
        points = run["points"]
        counts = list(next(iter(points.values()))["tokens_per_second"])
        rows = []
        for name, point in points.items():
            prompt = point["prompt_tokens_per_second"][counts[-1]]
            speeds = (f"{point['tokens_per_second'][b]:.1f}" for b in counts)
            rows.append((name, f"{point['bytes'] / 1e6:,.0f} MB", *speeds, f"{prompt:.0f}"))
        same = run["perplexity"]
        text = (
            f"{run['device']}, {run['threads']} threads, commit {run['commit']}: {run['parameters'] / 1e9:.2f}B random weights,"
            f" {run['layers']} layers {_inside(run)}, by the sides of {run['of']};"
            f" prompts of {run['prompt']} tokens, {run['tokens']} new ones, {run['rounds']} rounds in which all run in turn; the sequences"
            f" of a batch {OF_BATCH[run['prompts'] > 1]}."
        )
        if "llama.cpp" in same:
            text += (
                f" Perplexity of random tokens, by which both compute the same: {same['transformers']:.0f} in transformers,"
                f" {same['llama.cpp']:.0f} in llama.cpp."
            )
        names = ("point", "bytes", *(f"tokens/s, batch {b}" for b in counts), f"prompt tokens/s, batch {counts[-1]}")
        parts.append((text, table(names, "lr" + "r" * len(counts) + "r", rows)))
    return blocks(parts)


def decode_attention_table() -> str:
    """Attention of the next token by torch, in two ways, by Inductor's loops and by our kernel."""
    ways = ("torch", "repeated", "inductor", "ours")
    rows = [
        (
            f"{machine(run)}, {run['instruction_set']}", " x ".join(map(str, case["shape"])),
            *(f"{case['microseconds'][n]:.0f} us, {case['gigabytes_per_second'][n]:.1f} GB/s" for n in ways),
            f"{min(case['microseconds'][n] for n in ways[:3]) / case['microseconds']['ours']:.1f}x",
            *(f"{case['relative_error'][n]:.1e}" for n in ("torch", "ours")), run["commit"],
        )
        for run in read("decode_attention") for case in run["cases"]
    ]  # fmt: skip
    names = (
        "device, threads, instructions", "batch x heads x heads of keys x positions x width", "torch",
        "torch, keys repeated", "Inductor", "ours", "over the best", "error of torch's", "of ours", "commit",
    )  # fmt: skip
    return table(names, "llrrrrrrrl", rows)


def gpu_kernel_table() -> str:
    """Dense bfloat16 in microseconds; the best contender of the same bits and the best of ours, over it."""
    parts = []
    for run in (run for run in read("kernels") if "instruction_set" not in run):
        rows = []
        apart = ["tilelang"] if any("tilelang" in row["results"] for row in run["rows"]) else []
        for row in run["rows"]:
            times = {name: found for name, found in row["results"].items() if "median_us" in found}
            ours = {name: found for name, found in times.items() if not name.startswith(("dense", "torch", "tilelang"))}
            rivals = {name: found for name, found in times.items() if name.startswith("dense ")}
            cells = [_best(found) for found in (rivals, ours)]
            beside = min((*rivals.values(), times["dense"]), key=lambda found: found["median_us"])
            gain = beside["median_us"] / min(found["median_us"] for found in ours.values())
            dense = f"{times['dense']['median_us']:.1f} us"
            others = [_best({name: times[name]} if name in times else {}) for name in apart]
            rows.append((f"{row['out']}x{row['in']}", row["format"], row["m"], dense, *cells, f"{gain:.2f}x", *others))
        text = (
            f"{run['device']}, torch {run['versions']['torch']}, triton {run['versions']['triton']}, cuSPARSELt {run['cusparselt']},"
            f" commit {run['commit']}; medians of {run['rounds']} rounds of graph replays over rotated weights."
        )
        names = (
            "weight",
            "format",
            "M",
            "dense bfloat16",
            "best dense of the same bits",
            "best of ours",
            "over the best dense",
            *apart,
        )
        parts.append((text, table(names, "llrrllr" + "l" * len(apart), rows)))
    return blocks(parts)


def _best(found: dict[str, dict]) -> str:
    if not found:
        return ""
    name = min(found, key=lambda n: found[n]["median_us"])
    return f"{name}: {found[name]['median_us']:.1f} us ({found[name]['over_dense']:.2f}x)"


def many_rows_table() -> str:
    """Where expanding the weight begins to win over the kernels."""
    rows = []
    for case in (case for run in cpu_runs(few_rows=False) for case in run["cases"]):
        times = (f"{case['median_microseconds'][n] / 1e3:.2f} ms" for n in ("dense", "sparse_kernel", "expanded"))
        rows.append((f"{case['out']}x{case['in']}", case["dtype"], case["threads"], case["rows"], *times))
    names = ("weight", "dtype", "threads", "M", "dense", "kernel", "expanded, then dense")
    return table(names, "llrrrrr", rows)


def decode_table() -> str:
    rows = []
    for run in read("decode"):
        for batch, found in run["batches"].items():
            for name, result in found.items():
                packed = name != "dense" and not name.startswith("dense,")
                low, high = result["quartiles"]
                rows.append((
                    run["model"], f"{run['dtype']}, {machine(run)}", batch, name, f"{result['tokens_per_second']:.1f} ({low:.1f} to {high:.1f})",
                    f"{result['ratio']:.2f}x", "yes" if result["same_greedy_text"] else "no", run["sites"] if packed else "",
                    f"{run['site_bytes']['lowered'] / run['site_bytes']['dense'] if packed else 1:.2f}x",
                ))  # fmt: skip
    names = (
        "model", "dtype, device, threads", "batch", "contender", "tokens/s", "over dense", "greedy text as dense", "linears packed", "their bytes",
    )  # fmt: skip
    return table(names, "llrlrrlrr", rows)


def prefill_table() -> str:
    rows = []
    for run in read("decode"):
        for name, result in (run.get("prefill") or {"contenders": {}})["contenders"].items():
            low, high = result["quartiles"]
            rows.append((
                run["model"], f"{run['dtype']}, {machine(run)}", run["prefill"]["tokens"], name,
                f"{result['tokens_per_second']:.0f} ({low:.0f} to {high:.0f})", f"{result['ratio']:.2f}x",
            ))  # fmt: skip
    names = ("model", "dtype, device, threads", "prompt", "contender", "tokens/s", "over dense")
    return table(names, "llrlrr", rows)


def formats_table() -> str:
    parts = []
    for run in read("formats"):
        batches = list(next(iter(run["formats"].values()))["tokens_per_second"])
        rows = []
        for name, row in run["formats"].items():
            error = row.get("logits_relative_error")
            speeds = (
                f"{row['tokens_per_second'][b]:.1f} ({row['ratio'][b]:.2f}x)" if row["cache"] else "no cache"
                for b in batches
            )
            rows.append((
                name, f"{row['file_bytes'] / 1e6:.0f} MB", f"{row['load_seconds']:.1f} s", f"{row['peak_bytes'] / 1e6:.0f} MB",
                "" if error is None else f"{error:.0e}", "yes" if row["same_greedy_text"] else "no", *speeds,
            ))  # fmt: skip
        text = f"{run['model']}, {run['dtype']}, {machine(run)} threads; {run['sites']['packed']} packed linears; commit {run['commit']}."
        names = (
            "format", "bytes", "loads in", "peak memory", "logits off by", "greedy text as dense", *(f"tokens/s, batch {b}" for b in batches),
        )  # fmt: skip
        parts.append((text, table(names, "lrrrrl" + "r" * len(batches), rows)))
    return blocks(parts)


#: the same runtime over dense and over packed linears
RUNTIMES = {
    "transformers' generate()": ("dense", "packed"),
    "exported generator, compiled (aoti)": ("generator-aoti-dense", "generator-aoti"),
}


def generation_table() -> str:
    rows, batches = [], []
    for run in read("formats"):
        found = run["formats"]
        batches = batches or list(found["dense"]["tokens_per_second"])
        where = f", {run['device']}" if run.get("on") == "cuda" else ""
        for name, (dense, packed) in RUNTIMES.items():
            if packed not in found or dense not in found:
                continue
            pairs = [(found[dense]["tokens_per_second"][b], found[packed]["tokens_per_second"][b]) for b in batches]
            rows.append((
                f"{run['model']}, {run['dtype']}{where}", name, *(f"{d:.1f} -> {p:.1f} (**{p / d:.2f}x**)" for d, p in pairs),
                f"{found[dense]['file_bytes'] / 1e6:.0f} -> {found[packed]['file_bytes'] / 1e6:.0f} MB",
                "yes" if found[packed]["same_greedy_text"] else "no",
            ))  # fmt: skip
    names = (
        "model, dtype", "runtime", *(f"tokens/s, batch {b}" for b in batches), "file", "greedy text as dense",
    )  # fmt: skip
    return table(names, "ll" + "r" * (len(batches) + 1) + "l", rows)
