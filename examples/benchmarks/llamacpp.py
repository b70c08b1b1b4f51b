"""llama.cpp on a GGUF file, as frontier.py asks it: quantise by its own tool, perplexity, tokens per second.

    llamacpp.py quantize SOURCE.gguf TARGET.gguf Q8_0      (Q4_0, Q4_1, Q4_K_M)
    llamacpp.py speed FILE.gguf REQUEST RESULT             (a process of its own; the files of formats_worker.py)
    llamacpp.py perplexity FILE.gguf REQUEST RESULT        (the request has windows [count, context] of ids)

Needs ``pip install llama-cpp-python``, which compiles llama.cpp for this machine; wheels of other packages are made
for any machine and leave AVX-512 out. For AMX compile with CXXFLAGS="-fno-tree-dse -fno-dse": without, GCC 12 drops
what configures the tiles (llama.cpp's pull request 26954), and the process dies of an illegal instruction. Perplexity
is of llama.cpp's own logits, its rounded activations included.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import llama_cpp as lib
import numpy as np
import torch
import torch.nn.functional as F


class Context:
    """A model and a cache for so many sequences of ``length`` tokens each."""

    def __init__(self, model: object, sequences: int, length: int, threads: int):
        options = lib.llama_context_default_params()
        options.n_ctx = sequences * length
        options.n_batch = options.n_ubatch = max(512, sequences * length)
        options.n_seq_max = sequences
        options.n_threads = options.n_threads_batch = threads
        self.held = lib.llama_init_from_model(model, options)
        if not self.held:
            raise SystemExit(f"llama.cpp makes no context of {sequences} x {length} tokens for this file")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self.batch = lib.llama_batch_init(options.n_batch, 0, 1)

    def forget(self) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(self.held), True)

    def logits(self, ids: np.ndarray, start: int, every: bool = False) -> np.ndarray:
        """Of ids [sequences, count] at positions from ``start``: [sequences, vocabulary], or with ``every`` those of
        each position in order; valid until the next call."""
        rows, count = ids.shape
        batch = self.batch
        batch.n_tokens = rows * count
        wanted = []
        for place, (row, column) in enumerate(np.ndindex(rows, count)):
            batch.token[place] = int(ids[row, column])
            batch.pos[place] = start + column
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = row
            batch.logits[place] = every or column + 1 == count
            if batch.logits[place]:
                wanted.append(place)
        if lib.llama_decode(self.held, batch) != 0:
            raise SystemExit(f"llama.cpp fails on a batch of {rows} x {count} tokens at {start}")
        found = lib.llama_get_logits(self.held)  # in the order of the batch
        return np.ctypeslib.as_array(found, (len(wanted), self.vocabulary))

    def close(self) -> None:
        lib.llama_batch_free(self.batch)
        lib.llama_free(self.held)


@contextmanager
def opened(file: str) -> Iterator[object]:
    options = lib.llama_model_default_params()
    model = lib.llama_model_load_from_file(file.encode(), options)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {file}")
    yield model
    lib.llama_model_free(model)


def quantize(source: str, target: str, kind: str) -> None:
    """Another file of the same weights, requantised if need be."""
    options = lib.llama_model_quantize_default_params()
    options.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
    options.allow_requantize = True
    options.nthread = torch.get_num_threads()
    if lib.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(options)) != 0:
        raise SystemExit(f"llama.cpp cannot quantise {source} to {kind}")


def generate(context: Context, prompts: np.ndarray, tokens: int) -> np.ndarray:
    """The ``tokens`` [sequences, tokens] that go on greedily from prompts [sequences, length]."""
    context.forget()
    rows, length = prompts.shape
    text = np.empty((rows, tokens), dtype=np.int64)
    ids = prompts
    for step in range(tokens):
        text[:, step] = context.logits(ids, 0 if step == 0 else length + step - 1).argmax(-1)
        ids = text[:, step : step + 1]
    return text


def speed(model: object, asked: dict) -> dict:
    """Of each round at each batch, as formats_worker.py counts them: tokens per second, prompt included, and the seconds
    to the first token."""
    prompt = asked["ids"].numpy()
    length = prompt.shape[1] + max(asked["tokens"], asked["text_tokens"])
    speeds, firsts = {}, {}
    for rows in asked["batch"]:
        context = Context(model, rows, length, asked["threads"])
        prompts = prompt[np.arange(rows) % len(prompt)]
        generate(context, prompts, 2)
        seconds = {1: [], asked["tokens"]: []}
        for _ in range(asked["rounds"]):
            for count, of in seconds.items():
                clock = time.perf_counter()
                generate(context, prompts, count)
                of.append(time.perf_counter() - clock)
        speeds[rows], firsts[rows] = [rows * asked["tokens"] / s for s in seconds[asked["tokens"]]], seconds[1]
        context.close()
    return {"tokens_per_second": speeds, "first_token_seconds": firsts}


def perplexity(model: object, asked: dict) -> dict:
    """exp of the mean loss per token but the first of every window: what evaluation/perplexity.py means by it."""
    windows = asked["windows"]
    context = Context(model, 1, windows.shape[1], asked["threads"])
    total = 0.0
    for window in windows:
        context.forget()
        logits = torch.from_numpy(context.logits(window[None].numpy(), 0, every=True))
        total += float(F.cross_entropy(logits[:-1], window[1:], reduction="sum").double())
    context.close()
    scored = windows.shape[0] * (windows.shape[1] - 1)
    return {"perplexity": float(np.exp(total / scored)), "tokens_scored": scored}


def main() -> None:
    command, file, *rest = sys.argv[1:]
    said = lib.llama_log_callback(lambda level, text, data: None)  # it tells of every tensor
    lib.llama_log_set(said, ctypes.c_void_p())
    lib.llama_backend_init()
    if command == "quantize":
        quantize(file, *rest)
        return
    request, result = rest
    with opened(file) as model:
        found = {"speed": speed, "perplexity": perplexity}[command](model, torch.load(request))
    found["system"] = lib.llama_print_system_info().decode()
    with open(result, "w") as out:
        json.dump(found, out)


if __name__ == "__main__":
    main()
