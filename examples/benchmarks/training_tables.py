"""Tables of what a training step, a layer-wise method or a run takes."""

from __future__ import annotations

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


def step_against_table() -> str:
    """Steps of one commit against those of another, on one machine in one run."""
    rows = [
        (
            ", ".join(filter(None, (run["model"], machine(run), run.get("instructions")))),
            f"{dtype}, {'compiled' if run['compile'] else 'eager'}",
            f"{run['batch_size']} x {run['length']}", *(f"{found['seconds'][name]:.2f} s" for name in ("other", "here")),
            f"{found['speedup']:.2f}x ({min(found['speedups']):.2f} to {max(found['speedups']):.2f})",
            f"{found['largest_difference']:.1e}", run["other_commit"], run["commit"],
        )
        for run in read("step_against") for dtype, found in run["dtypes"].items()
    ]  # fmt: skip
    names = (
        "model, device, threads", "dtype", "tokens of a step", "before", "now", "speed-up (of each round)",
        "largest difference of a loss", "before: commit", "now: commit",
    )  # fmt: skip
    return table(names, "llrrrrrll", rows) if rows else NONE


def attention_table() -> str:
    """Gradients of attention by torch and by our kernel."""
    rows = [
        (
            f"{machine(run)}, {run['instruction_set']}", " x ".join(map(str, case["shape"])),
            *(f"{1e3 * case['median_seconds'][name]:.1f} ms ({1e3 * case['spread'][name][0]:.1f} to {1e3 * case['spread'][name][1]:.1f})"
              for name in ("torch", "ours")),
            f"{case['speedup']:.2f}x", *(f"{case['relative_error'][name]:.4f}" for name in ("torch", "ours")), run["commit"],
        )
        for run in read("attention_gradients") for case in run["cases"]
    ]  # fmt: skip
    names = (
        "device, threads, instructions", "batch x heads x length x size", "torch", "ours", "speed-up", "error of torch's",
        "of ours", "commit",
    )  # fmt: skip
    return table(names, "llrrrrrl", rows) if rows else NONE


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
