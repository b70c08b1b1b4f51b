"""Tables of what a kernel, a step, a method or a whole model takes."""

from __future__ import annotations

from collections import defaultdict

from records import NONE, blocks, machine, read, table

#: of operators, in step_profile.py
KINDS = ("products", "attention", "elementwise", "copies", "loss", "optimizer", "other")


def overhead_table() -> str:
    rows = []
    for run in read("training_overhead"):
        extra = sum(run["extra_memory"].values())
        for mode, result in run["modes"].items():
            s = result["median_seconds"]
            amortised = (result[f"amortised_over_dense_at_{steps}_steps"] for steps in (150, 20000))
            rows.append((
                f"{run['model']}, {run['device']}", mode, f"{s['dense']:.2f} s", f"{s['heating'] / s['dense']:.3f}x", f"{s['probe'] / s['dense']:.3f}x",
                f"{s['mask_update']:.2f} s", *(f"{a:.3f}x" for a in amortised), f"{extra:.1f}",
            ))  # fmt: skip
    names = (
        "model, device", "mode", "dense step", "heating", "with probe", "mask update", "amortised, K of 150 steps", "of 20,000 steps",
        "extra bytes/weight",
    )  # fmt: skip
    return table(names, "llrrrrrrr", rows)


def step_profile_table() -> str:
    """A column for every kind of operator that one of the steps spends a hundredth on."""
    runs = [(run, dtype, found) for run in read("step_profile") for dtype, found in run["dtypes"].items()]
    kinds = [kind for kind in KINDS if any(found["shares"].get(kind, 0) >= 0.01 for *_, found in runs)]
    rows = [
        (
            f"{run['model']}, {machine(run)}", dtype, f"{run['batch_size']} x {run['length']}", f"{found['seconds']:.2f} s",
            f"{found['tokens_per_second']:.0f}", *(f"{found['shares'].get(kind, 0):.0%}" for kind in kinds),
            f"{found['gflops_of_products']:.0f}", run["commit"],
        )
        for run, dtype, found in runs
    ]  # fmt: skip
    names = (
        "model, device, threads",
        "dtype",
        "tokens of a step",
        "step",
        "tokens/s",
        *kinds,
        "GFLOP/s of products",
        "commit",
    )
    return table(names, "ll" + "r" * (len(names) - 3) + "l", rows)


def scale_table() -> str:
    """What large models take while they train with masks."""
    runs = read("scale")
    if not runs:
        return NONE
    parts = []
    for run in sorted(runs, key=lambda r: r["parameters"]):
        text = (
            f"{run['model']}: {run['parameters'] / 1e9:.1f}B parameters, {run['sites']:,} sites with {run['site_entries'] / 1e9:.1f}B"
            f" entries, of which a token meets {run['active_site_entries'] / 1e9:.1f}B; steps of {run['tokens']:,} tokens; the largest"
            f" layer-wise problem takes {run['layerwise_bytes'] / 1e9:.1f} GB."
        )
        rows = [
            (
                row["gpus"],
                f"{row['bytes'] / 1e9:,.0f} GB",
                f"{row['state_bytes'] / 1e9:,.0f} GB",
                f"{row['gathered_bytes'] / 1e9:,.0f} GB",
                f"{row['sequences_at_a_time']} x {row['micro_batches']}",
                f"{row['compute_seconds']:,.1f} s",
                f"{row['network_seconds']:,.1f} s",
                row["first"] or "nothing",
            )
            for row in run["gpus"]
        ]
        names = (
            "GPUs",
            "bytes of each",
            "states",
            "gathered",
            "sequences x micro-batches",
            "computing",
            "messages",
            "gives out first",
        )
        parts.append((text, table(names, "rrrrrrrl", rows)))
    each = ", ".join(f"{name} {size:g}" for name, size in runs[0]["bytes_per_weight"].items())
    total = sum(runs[0]["bytes_per_weight"].values())
    head = (
        f"Bytes of a weight with a mask: {each}; together {total:g}. A step with masks takes {runs[0]['heating_over_dense']:.2f} times a"
        f" dense distillation step. Commit {', '.join(sorted({str(r['commit']) for r in runs}))}."
    )
    return f"{head}\n\n{blocks(parts)}"


def forecast_table() -> str:
    """What a dry run said beforehand, what was measured, and the former as a share of the latter."""

    def cell(run: dict, name: str, text: str, by: float = 1.0) -> str:
        if name not in run["ratio"]:
            return ""
        said, took = (text.format(run[of][name] / by) for of in ("predicted", "measured"))
        return f"{said}, {took}: {run['ratio'][name]:.2f}"

    rows = [
        (
            f"{run['model']}, {run['blocks']} blocks, {machine(run)}",
            run["method"],
            cell(run, "start", "{:.0f} s"),
            cell(run, "step", "{:.2f} s"),
            cell(run, "seconds", "{:.0f} s"),
            cell(run, "peak_memory_bytes", "{:.2f} GB", 1e9),
            run["commit"],
        )
        for run in read("forecasts")
    ]
    names = ("model, device, threads", "method", "start", "step", "whole run", "peak memory", "commit")
    return table(names, "llrrrrl", rows) if rows else NONE


def on_disk_table() -> str:
    """A row for every run of larger_than_memory.py, and what its rate says of more."""
    rows = []
    for run in read("larger_than_memory"):
        whole, more, largest = run["predicted_hours"].values()
        seconds = sum(run["block_seconds"]) / run["blocks"]
        rows.append((
            f"{run['model']}, {machine(run)}", run["compute_dtype"]["dtype"], f"{run['bytes'] / 1e9:.1f} GB",
            f"{run['tokens']:,}", f"{run['blocks']} of {run['of_blocks']}", f"{seconds:.0f} s",
            f"{run['peak_memory_bytes'] / 1e9:.1f} GB", f"{whole:.1f} h", f"{more:.0f} h", f"{largest:,.0f} h",
            f"{run['authors']['hours']:.0f} h", run["commit"],
        ))  # fmt: skip
    names = (
        "model, device, threads", "dtype", "weights", "tokens", "blocks run", "a block", "peak memory", "all blocks",
        "128 x 2048 tokens", "OPT-175B, those tokens", "authors, one A100", "commit",
    )  # fmt: skip
    return table(names, "ll" + "r" * (len(names) - 3) + "l", rows)


def sharded_table() -> str:
    """A row for every way in which sharded.py has shared a model."""
    rows = []
    for run in read("sharded"):
        (alone,) = (r["each"][0] for r in run["runs"] if r["processes"] == 1)
        for shared in run["runs"]:
            kinds, base = ("training_bytes", "peak_bytes"), alone["import_bytes"]
            most = [max(each[key] for each in shared["each"]) for key in kinds]
            ratios = (f"{(size - base) / (alone[key] - base):.2f}x" for key, size in zip(kinds, most, strict=True))
            losses = zip(*(r["losses"] for r in (shared["each"][0], alone)), strict=True)
            rows.append((
                f"{run['model']}, {run['dtype']}", shared["processes"], shared["way"],
                *(f"{size / 1e9:.2f} GB" for size in most), *ratios,
                f"{max(abs(a - b) / b for a, b in losses):.1e}", f"{shared['masks_differ']:.1e}", run["commit"],
            ))  # fmt: skip
    names = (
        "model, dtype", "processes", "weights are", "after a step", "peak", "after a step, to one process's",
        "peak, to it", "losses differ by", "masks differ in", "commit",
    )  # fmt: skip
    return table(names, "lrl" + "r" * (len(names) - 4) + "l", rows)


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


def gpu_kernel_table() -> str:
    """Dense bfloat16 in microseconds; the best contender of the same bits and the best of ours, over it."""
    parts = []
    for run in (run for run in read("kernels") if "instruction_set" not in run):
        rows = []
        for row in run["rows"]:
            times = {name: found for name, found in row["results"].items() if "median_us" in found}
            ours = {name: found for name, found in times.items() if not name.startswith(("dense", "torch"))}
            rivals = {name: found for name, found in times.items() if name.startswith("dense ")}
            cells = [_best(found) for found in (rivals, ours)]
            beside = min((*rivals.values(), times["dense"]), key=lambda found: found["median_us"])
            gain = beside["median_us"] / min(found["median_us"] for found in ours.values())
            dense = f"{times['dense']['median_us']:.1f} us"
            rows.append((f"{row['out']}x{row['in']}", row["format"], row["m"], dense, *cells, f"{gain:.2f}x"))
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
        )
        parts.append((text, table(names, "llrrllr", rows)))
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


def one_shot_table() -> str:
    rows = []
    for run in read("one_shot_speed"):
        where = f"{run['shape'][0]} x {run['shape'][1]}, {machine(run)}"
        for method, seconds in run["median_seconds"].items():
            low, high = run["spread"][method]
            error = f"{run['relative_output_error'][method]:.4f}"
            rows.append((where, method, f"{seconds:.2f} ({low:.2f} to {high:.2f})", error))
    return table(("layer, device, threads", "method", "seconds", "error of the output"), "llrr", rows)


def estimator_table() -> str:
    rows = []
    for run in read("estimator_cost"):
        for name, seconds in run["median_seconds"].items():
            low, high = run["spread"][name]
            rows.append((
                f"{run['model']}, {machine(run)}", name, f"{seconds:.2f} s ({low:.2f} to {high:.2f})",
                f"{run['over_none'][name]:.2f}x", f"{run['amortised'][name]:.3f}x",
            ))  # fmt: skip
    names = (
        "model, device, threads", "estimator", "probe step", "over a step without", "amortised, one probe in K steps",
    )  # fmt: skip
    return table(names, "llrrr", rows)


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
