"""A tokenizer of bytes, and text files."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparseforge_fx.data.tokens import TokenData


def make_tokenizer(merges=(), eos="<eos>", unused=0, puts_bos=False, **options):
    """One token per byte, ids 0-255, merges after them, unused ids, then <eos>. ``puts_bos``: <s> before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: i
        for i, token in enumerate(
            [*alphabet, *("".join(m) for m in merges), *(f"<{i}>" for i in range(unused)), "<eos>"]
        )
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if puts_bos:
        backend.add_special_tokens(["<s>"])
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
        options["bos_token"] = "<s>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, **options)


def counted(sequences, length=3):
    """Sequence i holds only the number i: shows which one was drawn."""
    return TokenData(np.repeat(np.arange(sequences), length), length)


def drawn(batch):
    return batch["input_ids"][:, 0].tolist()


def zst_open(path, mode):
    import pyarrow

    return pyarrow.output_stream(str(path), compression="zstd")


def write(path: Path, content) -> Path:
    openers = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open, ".zst": zst_open}
    opener = openers.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write(content.encode())
    return path


def jsonl(texts, column="text"):
    return "".join(json.dumps({"title": "t", column: text}) + "\n" for text in texts)
