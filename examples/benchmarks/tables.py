"""Write the measured tables into README.md and docs/ from results/*.json. Nothing is typed by hand; plots.py draws the
pictures.

python examples/benchmarks/tables.py [--check]     (--check: fail if a page is not what the files say)
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"


def read(folder: str) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted((RESULTS / folder).glob("*.json"))]


def label(run: dict) -> str:
    name = run["method"]
    if name != "sparseforge":
        return name
    report = run["report"]
    changed = f", {run['note']}" if run.get("note") else ""
    return f"sparseforge ({report['preset']} preset{changed})"


def steps(report: dict) -> str:
    """Optimizer steps and tokens of each."""
    if not report.get("curves"):
        return ""
    return f"{len(report['curves'])} x {report['batch_size'] * report['length'] * report['accumulate']:,}"


def quality_table() -> str:
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for run in read("quality"):
        groups[label(run), run["tokens"]].append(run)
    if not groups:
        return "_no runs yet_"
    first = next(iter(groups.values()))[0]
    device = first["report"]["device"]
    lines = [
        f"{first['model']}: WikiText-2 test perplexity, first {first['windows']} windows of {first['context']} tokens"
        f" (dense {first['dense_perplexity']['test']:.2f}); every linear except the head exactly 2:4; {device}.",
        "",
        "| method | training tokens | steps x tokens | calibration sequences | test perplexity | validation | seeds | commit |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for (name, tokens), runs in sorted(
        groups.items(), key=lambda item: -mean(r["sparse_perplexity"]["test"] for r in item[1])
    ):
        test = [r["sparse_perplexity"]["test"] for r in runs]
        valid = mean(r["sparse_perplexity"]["valid"] for r in runs)
        spread = f" ± {stdev(test):.2f}" if len(test) > 1 else ""
        report = runs[0]["report"]
        cells = (
            name, f"{tokens:,}", steps(report), str(report.get("calibration_sequences", 0)), f"{mean(test):.2f}{spread}", f"{valid:.2f}",
            str(len(runs)), report["commit"] or "",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def overhead_table() -> str:
    lines = [
        "| model, device | mode | dense step | heating | with probe | mask update | amortised, K of 150 steps | of 20,000 steps | extra bytes/weight |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    runs = read("training_overhead")
    for run in runs:
        for mode, result in run["modes"].items():
            s = result["median_seconds"]
            extra = sum(run["extra_memory"].values())
            lines.append(
                f"| {run['model']}, {run['device']} | {mode} | {s['dense']:.2f} s | {s['heating'] / s['dense']:.3f}x | {s['probe'] / s['dense']:.3f}x "
                f"| {s['mask_update']:.2f} s | {result['amortised_over_dense_at_150_steps']:.3f}x | {result['amortised_over_dense_at_20000_steps']:.3f}x | {extra:.1f} |"
            )
    return "\n".join(lines) if runs else "_no runs yet_"


def leaderboard_runs() -> tuple[list[dict], dict[str, dict], list[dict]]:
    """The runs at full length; of each method the best of its sweep; the variants."""
    full, sweeps, variants = [], defaultdict(list), []
    for run in read("leaderboard"):
        kind = run["label"].split("-")[0]
        if kind == "sweep":
            sweeps[re.sub(r"^sweep-|-[\d.]+(e-?\d+)?-\d+$", "", run["label"])].append(run)
        elif kind == "ablation":
            variants.append(run)
        else:
            full.append(run)
    best = {m: min(runs, key=lambda r: (r["sparse_perplexity"]["valid"], -rate(r))) for m, runs in sweeps.items()}
    return full, best, variants


def rate(run: dict) -> float:
    """The learning rate that was swept; maskpro's is its logits'."""
    return run["report"]["config"].get("logit_lr", run["report"]["lr"])


def leaderboard_table() -> str:
    full, best, _ = leaderboard_runs()
    if not full:
        return "_no runs yet_"
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for run in full:
        groups[re.sub(r"-\d+-seed\d+$", "", run["label"]), run["tokens"]].append(run)
    for method, run in best.items():
        groups[method, run["tokens"]].append(run)
    first = full[0]
    tasks = list(next(r["zero_shot"] for r in full if r["zero_shot"]))
    documents = next(iter(next(r["zero_shot"] for r in full if r["zero_shot"]).values()))["documents"]
    lines = [
        f"{first['model']}, WikiText-2 test perplexity over the first {first['windows']} windows of {first['context']} tokens;"
        f" zero-shot accuracy in % over {documents} documents of each task (length-normalised where lm-eval has it), ± one"
        f" standard error of the mean over the tasks; {first['report']['device']}.",
        "",
        "| method | tokens | lr | perplexity | validation | seeds | zero-shot mean | " + " | ".join(tasks) + " |",
        "|---|---:|---:|---:|---:|---:|---:|" + "---:|" * len(tasks),
    ]
    order = sorted(
        groups.items(), key=lambda item: (item[0][1], -mean(r["sparse_perplexity"]["test"] for r in item[1]))
    )
    for (method, tokens), runs in order:
        test = [r["sparse_perplexity"]["test"] for r in runs]
        cells = [
            method, f"{tokens:,}", f"{rate(runs[0]):g}" if tokens else "",
            f"{mean(test):.2f}" + (f" ± {stdev(test):.2f}" if len(test) > 1 else ""),
            f"{mean(r['sparse_perplexity']['valid'] for r in runs):.2f}", str(len(runs)),
        ]  # fmt: skip
        scored = [r["zero_shot"] for r in runs if r["zero_shot"]]
        if scored:
            share = {t: mean(z[t].get("acc_norm", z[t]["acc"]) for z in scored) for t in tasks}
            errors = [scored[0][t].get("acc_norm_stderr", scored[0][t]["acc_stderr"]) for t in tasks]
            error = sum(e * e for e in errors) ** 0.5 / len(tasks)  # seeds answer the same documents
            cells += [f"{100 * mean(share.values()):.1f} ± {100 * error:.1f}"]
            cells += [f"{100 * share[t]:.0f}" for t in tasks]
        else:
            cells += [""] * (1 + len(tasks))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ablation_table() -> str:
    _, _, variants = leaderboard_runs()
    if not variants:
        return "_no runs yet_"
    lines = [
        "| variant | tokens | perplexity | validation | mask flips, last update |",
        "|---|---:|---:|---:|---:|",
    ]
    for run in sorted(variants, key=lambda r: (r["label"].split("-")[1], r["sparse_perplexity"]["test"])):
        curves = run["report"]["curves"]
        flips = [row["flip_rate"] for row in curves if row["flip_rate"]]
        cells = (
            re.sub(r"^ablation-|-\d+$", "", run["label"]), f"{run['tokens']:,}", f"{run['sparse_perplexity']['test']:.2f}",
            f"{run['sparse_perplexity']['valid']:.2f}", f"{100 * flips[-1]:.2f} %" if flips else "",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cpu_runs(few_rows: bool) -> list[dict]:
    """The runs of cpu_kernels.py from one token on, or those of more."""
    runs = [run for run in read("kernels") if "instruction_set" in run]
    return [run for run in runs if any(case["rows"] == 1 for case in run["cases"]) == few_rows]


def kernel_table(large_only: bool = False) -> str:
    """Every shape and number of threads, or the shapes of 7B models at the most threads."""
    runs = cpu_runs(few_rows=True)
    if not runs:
        return "_no runs yet_"
    lines = []
    for run in runs:
        rows = sorted({case["rows"] for case in run["cases"]})
        lines += [
            f"{run['device']} ({run['instruction_set']}), load average {run['load_average'][0]} at the end, commit {run['commit']};"
            f" weights rotated over {run['rotated_bytes_of_dense_weights'] / 1e6:.0f} MB.",
            "",
            "| weight | dtype | threads | " + " | ".join(f"M = {m}" for m in rows) + " |",
            "|---|---|---:|" + "---:|" * len(rows),
        ]
        groups: dict[tuple, dict[int, float]] = defaultdict(dict)
        for case in run["cases"]:
            key = f"{case['out']}x{case['in']}", case["dtype"], case["threads"]
            groups[key][case["rows"]] = case["median_of_ratios"]
        most = max(threads for _, _, threads in groups)
        for (shape, dtype, threads), found in groups.items():
            if large_only and (threads < most or min(map(int, shape.split("x"))) < 4096):
                continue
            lines.append(f"| {shape} | {dtype} | {threads} | " + " | ".join(f"{found[m]:.2f}x" for m in rows) + " |")
    return "\n".join(lines)


def many_rows_table() -> str:
    """Where expanding the weight begins to win over the kernels."""
    runs = cpu_runs(few_rows=False)
    lines = [
        "| weight | dtype | threads | M | dense | kernel | expanded, then dense |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for case in (case for run in runs for case in run["cases"]):
        times = (case["median_microseconds"][n] / 1e3 for n in ("dense", "sparse_kernel", "expanded"))
        lines.append(
            f"| {case['out']}x{case['in']} | {case['dtype']} | {case['threads']} | {case['rows']} | "
            + " | ".join(f"{t:.2f} ms" for t in times) + " |"
        )  # fmt: skip
    return "\n".join(lines) if runs else "_no runs yet_"


def decode_table() -> str:
    runs = read("decode")
    lines = [
        "| model | dtype, device, threads | batch | contender | tokens/s | over dense | greedy text as dense | linears packed | their bytes |",
        "|---|---|---:|---|---:|---:|---|---:|---:|",
    ]
    for run in runs:
        for batch, found in run["batches"].items():
            for name, result in found.items():
                packed = name != "dense" and not name.startswith("dense,")
                low, high = result["quartiles"]
                lines.append(
                    f"| {run['model']} | {run['dtype']}, {run['device']}, {run['threads']} | {batch} | {name} | {result['tokens_per_second']:.1f}"
                    f" ({low:.1f} to {high:.1f}) | {result['ratio']:.2f}x | {'yes' if result['same_greedy_text'] else 'no'}"
                    f" | {run['sites'] if packed else ''}"
                    f" | {run['site_bytes']['lowered'] / run['site_bytes']['dense'] if packed else 1:.2f}x |"
                )
    return "\n".join(lines) if runs else "_no runs yet_"


def prefill_table() -> str:
    lines = [
        "| model | dtype, device, threads | prompt | contender | tokens/s | over dense |",
        "|---|---|---:|---|---:|---:|",
    ]
    for run in read("decode"):
        for name, result in (run.get("prefill") or {"contenders": {}})["contenders"].items():
            low, high = result["quartiles"]
            lines.append(
                f"| {run['model']} | {run['dtype']}, {run['device']}, {run['threads']} | {run['prefill']['tokens']} | {name}"
                f" | {result['tokens_per_second']:.0f} ({low:.0f} to {high:.0f}) | {result['ratio']:.2f}x |"
            )
    return "\n".join(lines) if len(lines) > 2 else "_no runs yet_"


def one_shot_table() -> str:
    lines = ["| layer, device, threads | method | seconds | error of the output |", "|---|---|---:|---:|"]
    for run in read("one_shot_speed"):
        where = f"{run['shape'][0]} x {run['shape'][1]}, {run['device']}, {run['threads']}"
        for method, seconds in run["median_seconds"].items():
            low, high = run["spread"][method]
            lines.append(
                f"| {where} | {method} | {seconds:.2f} ({low:.2f} to {high:.2f}) | {run['relative_output_error'][method]:.4f} |"
            )
    return "\n".join(lines) if len(lines) > 2 else "_no runs yet_"


def estimator_table() -> str:
    lines = [
        "| model, device, threads | estimator | probe step | over a step without | amortised, one probe in K steps |",
        "|---|---|---:|---:|---:|",
    ]
    for run in read("estimator_cost"):
        for name, seconds in run["median_seconds"].items():
            low, high = run["spread"][name]
            lines.append(
                f"| {run['model']}, {run['device']}, {run['threads']} | {name} | {seconds:.2f} s ({low:.2f} to {high:.2f})"
                f" | {run['over_none'][name]:.2f}x | {run['amortised'][name]:.3f}x |"
            )
    return "\n".join(lines) if len(lines) > 2 else "_no runs yet_"


def estimator_quality_table() -> str:
    """Perplexity by what is averaged, over probes."""
    lines = []
    for run in read("estimator_quality"):
        points = sorted({int(p) for row in run["perplexity"].values() for p in row if p != "0"})
        lines += [
            f"{run['model']}, probes of {run['batch_size']} x {run['length']} tokens, {run['device']}, commit {run['commit']}; "
            f"dense {run['perplexity']['dense']['0']:.1f}, magnitude {run['perplexity']['magnitude']['0']:,.0f}.",
            "",
            "| estimate | " + " | ".join(f"{p} probes" for p in points) + " |",
            "|---|" + "---:|" * len(points),
        ]  # fmt: skip
        for name, row in run["perplexity"].items():
            if set(row) != {"0"}:
                cells = (f"{row[str(p)]:,.0f}" if str(p) in row else "" for p in points)
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) or "_no runs yet_"


def quantized_table() -> str:
    runs = read("quantized")
    if not runs:
        return "_no runs yet_"
    # whose own sweep rounds is quantised already: "" is without
    scores = [
        {str(run["report"].get("options", {}).get("bits", "")): run["sparse_perplexity"], **run["quantized_perplexity"]}
        for run in runs
    ]
    bits = sorted({b for known in scores for b in known if b}, key=int, reverse=True)
    lines = [
        f"Perplexity of the WikiText-2 test text, the first {runs[0]['windows']} windows of {runs[0]['context']} tokens.",
        "",
        "| run | not quantised | " + " | ".join(f"{b} bits" for b in bits) + " | commit |",
        "|---|" + "---:|" * (len(bits) + 1) + "---|",
    ]
    for run, known in zip(runs, scores, strict=True):
        shown = " | ".join(f"{known[b]['test']:.2f}" if b in known else "" for b in ("", *bits))
        lines.append(f"| {run['label']} | {shown} | {run['report']['commit']} |")
    return "\n".join(lines)


def formats_table() -> str:
    runs = read("formats")
    if not runs:
        return "_no runs yet_"
    lines = []
    for run in runs:
        batches = list(next(iter(run["formats"].values()))["tokens_per_second"])
        lines += [
            f"{run['model']}, {run['dtype']}, {run['device']}, {run['threads']} threads; {run['sites']['packed']} packed linears; commit {run['commit']}.",
            "",
            "| format | bytes | loads in | peak memory | logits off by | greedy text as dense | "
            + " | ".join(f"tokens/s, batch {b}" for b in batches) + " |",
            "|---|---:|---:|---:|---:|---|" + "---:|" * len(batches),
        ]  # fmt: skip
        for name, row in run["formats"].items():
            error = row.get("logits_relative_error")
            speeds = [
                f"{row['tokens_per_second'][b]:.1f} ({row['ratio'][b]:.2f}x)" if row["cache"] else "no cache"
                for b in batches
            ]
            cells = (
                name, f"{row['file_bytes'] / 1e6:.0f} MB", f"{row['load_seconds']:.1f} s", f"{row['peak_bytes'] / 1e6:.0f} MB",
                "" if error is None else f"{error:.0e}", "yes" if row["same_greedy_text"] else "no", *speeds,
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


#: the same runtime over dense and over packed linears
RUNTIMES = {
    "transformers' generate()": ("dense", "packed"),
    "exported generator, compiled (aoti)": ("generator-aoti-dense", "generator-aoti"),
}


def generation_table() -> str:
    lines = []
    for run in read("formats"):
        found = run["formats"]
        batches = list(found["dense"]["tokens_per_second"])
        if not lines:
            lines = [
                "| model, dtype | runtime | " + " | ".join(f"tokens/s, batch {b}" for b in batches)
                + " | file | greedy text as dense |",
                "|---|---|" + "---:|" * (len(batches) + 1) + "---|",
            ]  # fmt: skip
        where = f", {run['device']}" if run.get("on") == "cuda" else ""
        for name, (dense, packed) in RUNTIMES.items():
            if packed not in found or dense not in found:
                continue
            pairs = [(found[dense]["tokens_per_second"][b], found[packed]["tokens_per_second"][b]) for b in batches]
            cells = (
                f"{run['model']}, {run['dtype']}{where}", name, *(f"{d:.1f} -> {p:.1f} (**{p / d:.2f}x**)" for d, p in pairs),
                f"{found[dense]['file_bytes'] / 1e6:.0f} -> {found[packed]['file_bytes'] / 1e6:.0f} MB",
                "yes" if found[packed]["same_greedy_text"] else "no",
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) or "_no runs yet_"


TABLES = {
    "quality": quality_table,
    "leaderboard": leaderboard_table,
    "ablations": ablation_table,
    "overhead": overhead_table,
    "kernels": lambda: kernel_table(large_only=True),
    "many-rows": many_rows_table,
    "all-kernels": kernel_table,
    "decode": decode_table,
    "generation": generation_table,
    "prefill": prefill_table,
    "one-shot": one_shot_table,
    "estimators": estimator_table,
    "estimator-quality": estimator_quality_table,
    "formats": formats_table,
    "quantized": quantized_table,
}
PAGES = ("README.md", "docs/measurements.md")


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
