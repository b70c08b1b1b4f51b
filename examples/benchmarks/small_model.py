"""Train the study's own small language model: two million parameters, Llama's shape, on real text; it goes on after a kill.

    python examples/benchmarks/small_model.py FOLDER --data books-0.jsonl.xz,books-1.jsonl.xz --data reviews.jsonl.xz \\
        --data c4.jsonl

Each ``--data`` is one kind of text (several files of it by commas); the kinds are mixed evenly by documents, books cut into
pieces of 3,000 characters. Whole documents are dealt out by a hash of their text: SHARES. The tokenizer is a byte-level BPE
of the training text. FOLDER is then a Hugging Face folder with, beside the model, training.json (options, the curve of the
loss, tokens per second, perplexities of the weights in bfloat16, as they are stored), valid.txt (for choosing), test.txt (for quoting), and in text/ what the model has
seen (train-*.jsonl) and has not (further-*.jsonl, on which budget.py trains).
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from common import token_ids
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparseforge_fx.data.text import load_text
from sparseforge_fx.data.tokens import tokenize
from sparseforge_fx.evaluation.perplexity import perplexity
from sparseforge_fx.files import new_file
from sparseforge_fx.methods.schedule import learning_rate
from sparseforge_fx.report import environment, write_json

#: percent of the documents in each part
SHARES = {"valid": 2, "test": 2, "further": 16, "train": 80}
PIECE = 3000  # characters
SEPARATOR = "\n\n"  # between documents, in every part
END = "<|end|>"
WINDOWS = 256  # of held-out text, whose perplexity is quoted; a quarter of them along the way


def main(
    folder: Path,
    data: Annotated[list[str], typer.Option(help="one kind of text; several are mixed evenly by documents")],
    tokens: Annotated[int, typer.Option(help="of the whole training")] = 24_000_000,
    batch_size: int = 16,
    length: int = 256,
    lr: float = 3e-3,
    seed: int = 0,
    entries: Annotated[int, typer.Option(help="of the vocabulary")] = 4096,
    width: int = 128,
    layers: int = 8,
    save_seconds: float = 60.0,
    compile: Annotated[bool, typer.Option(help="worth it on a CPU, too: a third faster")] = True,
) -> None:
    """Split the text, train the tokenizer, train the model: what is there is not made again."""
    text = folder / "text"
    if not (folder / "test.txt").exists():
        split(data, folder, seed)
    if (folder / "model.safetensors").exists():
        print(f"{folder} has its model already")
        return
    train = sorted(map(str, text.glob("train-*.jsonl")))
    if not (folder / "tokenizer.json").exists():
        learn_tokenizer(train, folder, entries, seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    corpus = tokenize(train, tokenizer, length=length, seed=seed, tokens=tokens, separator=SEPARATOR, cache_dir=text)
    torch.manual_seed(seed)
    net = LlamaForCausalLM(shape(len(tokenizer), width, layers, length))
    steps = tokens // (batch_size * length)
    state = folder / "training.state"
    training = Training(net, steps, lr, compile)
    if state.exists():
        training.load_state_dict(torch.load(state, weights_only=True))
        print(f"goes on from step {training.done} of {steps}", flush=True)
    held_out = {which: token_ids(folder / f"{which}.txt", tokenizer) for which in ("valid", "test")}
    record: dict[str, Any] = {
        "options": {
            "data": [Path(name).name for group in data for name in group.split(",")], "tokens": tokens,
            "batch_size": batch_size, "length": length, "lr": lr, "seed": seed,
        },
        "parameters": net.num_parameters(),
        **environment(),
    }  # fmt: skip
    saved = time.monotonic()
    while training.done < steps:
        training.step(corpus.batch(training.done, batch_size, seed)["input_ids"])
        last = training.done == steps
        if training.done % max(1, steps // 40) == 0 or last:
            windows = WINDOWS if last else WINDOWS // 4
            loss = perplexity(
                net.eval(), held_out["valid"], context=length, max_windows=windows, batch_size=16
            ).nll_per_token
            net.train()
            training.note({"valid": loss})
        if time.monotonic() - saved > save_seconds or last:
            with new_file(state) as file:
                torch.save(training.state_dict(), file)
            write_json(folder / "training.json", {**record, **training.summary(batch_size * length)})
            saved = time.monotonic()
    net.eval().bfloat16().float()  # as they are stored
    found = {
        which: perplexity(net, ids, context=length, max_windows=WINDOWS, batch_size=16).perplexity
        for which, ids in held_out.items()
    }
    summary = training.summary(batch_size * length)
    write_json(folder / "training.json", {**record, "perplexity": found, "windows": WINDOWS, **summary})
    net.bfloat16().save_pretrained(folder)
    print(f"{folder}: {json.dumps(found)}")


# -- text and tokenizer ----------------------------------------------------------------------------------------------
def split(data: list[str], folder: Path, seed: int) -> None:
    """text/PART-KIND.jsonl of every part and kind, and the held-out parts mixed, in pieces, as valid.txt and test.txt."""
    text = folder / "text"
    for kind, source in enumerate(data):
        with ExitStack() as stack:
            files = {part: stack.enter_context(new_file(text / f"{part}-{kind}.jsonl")).open("w") for part in SHARES}
            for document in load_text(source):
                files[part_of(document)].write(json.dumps({"text": document}) + "\n")
            for file in files.values():
                file.close()
    for part in ("valid", "test"):
        kinds = sorted(map(str, text.glob(f"{part}-*.jsonl")))
        pieces = [list(load_text(kind, seed=seed, max_document_chars=PIECE)) for kind in kinds]
        even = min(sorted(map(len, pieces))[-2:])  # of the training text, too, no more is mixed
        mixed = [piece for kind in pieces for piece in kind[:even]]
        random.Random(seed).shuffle(mixed)
        with new_file(folder / f"{part}.txt") as whole:
            whole.write_text(SEPARATOR.join(mixed))


def part_of(document: str) -> str:
    place = int.from_bytes(hashlib.blake2b(document.encode(), digest_size=8).digest()) % 100
    for part, share in SHARES.items():
        if place < share:
            return part
        place -= share
    raise AssertionError("the shares are a hundred percent")


def learn_tokenizer(train: list[str], folder: Path, entries: int, seed: int) -> None:
    """A byte-level BPE of 20,000 pieces of the training text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(load_text(train, limit=20_000, seed=seed, max_document_chars=PIECE), trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END).save_pretrained(folder)


# -- the model -------------------------------------------------------------------------------------------------------
def shape(entries: int, width: int, layers: int, length: int) -> LlamaConfig:
    """Heads of 32, two of them on one key; an MLP of 2.75 widths; the head is tied to the embedding."""
    return LlamaConfig(
        vocab_size=entries, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=max(1, width // 64), max_position_embeddings=length,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


class Training:
    """AdamW over so many steps, warmed up and let down along a cosine."""

    def __init__(self, net: nn.Module, steps: int, lr: float, compile: bool):
        self.accelerator = Accelerator()
        self.steps, self.lr, self.done = steps, lr, 0
        self.seconds, self.curve, self.since = 0.0, list[dict[str, float]](), list[float]()
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.net, self.optimizer = self.accelerator.prepare(net, optimizer)

        def loss(ids: torch.Tensor) -> torch.Tensor:
            return self.net(input_ids=ids, labels=ids, use_cache=False).loss

        self.loss = torch.compile(loss) if compile else loss

    def step(self, ids: torch.Tensor) -> None:
        began = time.process_time()  # what else runs, or stops this, is no matter
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * learning_rate((self.done + 1) / (self.steps + 1), warmup=0.03, floor=0.05)
        loss = self.loss(ids.to(self.accelerator.device))
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        self.since.append(loss.item())
        self.seconds += time.process_time() - began
        if self.done % max(1, self.steps // 200) == 0:
            self.note({"loss": sum(self.since) / len(self.since)})
            self.since = []

    def note(self, row: dict[str, float]) -> None:
        """A row of the curve."""
        self.curve.append({"step": self.done, **row})
        print(json.dumps({**self.curve[-1], "seconds": round(self.seconds)}), flush=True)

    def summary(self, step_tokens: int) -> dict[str, Any]:
        """What a record says of the training so far."""
        done = {"steps": self.done, "tokens": self.done * step_tokens, "seconds": self.seconds}
        return {**done, "tokens_per_second": done["tokens"] / self.seconds, "curve": self.curve}

    def state_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("done", "seconds", "curve", "since")}
        net = self.accelerator.unwrap_model(self.net)
        return {"net": net.state_dict(), "optimizer": self.optimizer.state_dict(), "own": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.accelerator.unwrap_model(self.net).load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        vars(self).update(state["own"])


if __name__ == "__main__":
    typer.run(main)
