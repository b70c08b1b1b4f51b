"""Perplexity by the definition the sparsity papers use, dense beside sparse."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from sparseforge_fx.data.rows import Column
from sparseforge_fx.data.sources import open_sources
from sparseforge_fx.data.tokens import TokenData
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.evaluation import paired
from sparseforge_fx.graph.modes import eval_mode
from sparseforge_fx.progress import counted, shown
from sparseforge_fx.ranges import checked

CHUNK_ELEMENTS = 1 << 24  # float32 logits alive at once: 64 MiB, whatever window and vocabulary


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What was measured and how; `dataclasses.asdict` of it is ready for json."""

    perplexity: float  # exp(nll_per_token)
    nll_per_token: float  # nats
    tokens_scored: int
    windows: int
    context: int  # tokens per window, with its beginning-of-sequence token where it has one
    stride: int  # tokens between the starts of neighbouring windows
    seconds: float
    bos_token_id: int | None = None  # in front of every window, and not scored; None: windows begin with text
    stderr: float | None = None  # of nll_per_token, over windows; None of a single one
    window_nll: list[float] = dataclasses.field(default_factory=list)  # summed over the tokens that each window scores
    window_tokens: list[int] = dataclasses.field(default_factory=list)


@torch.no_grad()
@checked
def perplexity(
    model: Callable[..., Any],
    tokens: torch.Tensor | TokenData,
    *,
    context: int = 1024,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
    progress: bool = False,
) -> Perplexity:
    """exp of the mean negative log-likelihood per scored token.

    With `stride == context` (default) windows do not overlap, the first token of each is not scored, and a rest shorter
    than a window is dropped: windows * (context - 1) tokens. This is the number that SparseGPT, Wanda and AST print
    (`nsamples = numel // seqlen`; at their seqlen of 2048 or 4096, so quote the context with the number).

    With `stride < context` each window after the first scores only its last `stride` tokens, which then have at least
    context - stride tokens before them, and the last window scores what remains: all tokens but the first, each once.
    This is the sliding window of https://huggingface.co/docs/transformers/perplexity.

    Tokens fewer than `context` are one window, scored but for the first.

    Where the tokens begin with the model's beginning-of-sequence token, as `text_tokens` gives them for a tokenizer
    that puts one, every window begins with it, within its `context` tokens: a model that was trained so is far off
    without (Gemma's perplexity is several times too high). It is context and not scored, nor is the first token of text
    behind it, as ever: windows * (context - 2) tokens. The papers' scripts have it in the first window alone.

    Args:
        model: gives logits [batch, sequence, vocabulary], as a tensor or as `.logits`, for ids [batch, sequence], given
            as `input_ids` where it knows that name, else by position. It is evaluated in eval mode and left in the
            modes in which it came.
        tokens: LongTensor [tokens] or [1, tokens], on any device, or TokenData (its sequences' borders are ignored).
        context: tokens per window.
        stride: tokens between the starts of neighbouring windows, 1 to context; None: context.
        max_windows: score only so many windows, from the start.
        batch_size: windows per forward pass.
        progress: tell on standard error how far it is.

    Log-softmax is float32 whatever the model's type, the sum float64; float32 logits exist for one chunk of rows only.

    Raises:
        SparseForgeError: fewer than 2 tokens, context longer than the model's positions, ids outside its vocabulary,
            bad options, output without logits, result not finite.
    """
    started = time.perf_counter()
    stride = context if stride is None else stride
    ids = _flat(tokens, None if max_windows is None else context + stride * (max_windows - 1) + 1)
    _check(model, ids, context, stride, max_windows, batch_size)
    bos = _leading_bos(model, ids)
    body, width = (ids, context) if bos is None else (ids[1:], context - 1)
    step = width if stride == context else min(stride, width)
    if len(body) < 2 or width < 2:
        raise SparseForgeError(f"{len(body)} tokens behind the first, in windows of {width}, give nothing to score")
    windows = list(itertools.islice(_windows(len(body), width, step), max_windows))
    front = body.new_empty(0) if bos is None else body.new_full((1,), bos)
    sums: list[float] = []
    device, call, groups = _device(model), _caller(model), list(_groups(windows, batch_size))
    modes = eval_mode(model) if isinstance(model, torch.nn.Module) else nullcontext()
    with modes, shown(progress), counted("perplexity", len(groups)) as advance:
        for group in groups:
            batch = torch.stack([torch.cat([front, body[start:end]]) for start, end, _ in group]).to(device, torch.long)
            logits = _logits(call(batch), batch)
            for row, (start, end, first) in enumerate(group):
                nll = _nll(logits[row], batch[row], first - start + len(front))
                if not math.isfinite(nll):
                    raise SparseForgeError(
                        f"the loss on tokens {start} to {end} is {nll}: the model's weights or activations are not "
                        "finite; look for NaN weights, and evaluate in bfloat16 or float32 rather than float16"
                    )
                sums.append(nll)
            advance()
            del logits  # before the next forward pass makes its own
    counts = [end - first for _, end, first in windows]
    mean = sum(sums) / sum(counts)
    if mean > 700:
        raise SparseForgeError(
            f"the mean loss is {mean:.4g} nats: exp of it is not finite; the model's logits are broken"
        )
    error, how = paired.ratio_error(sums, counts), (sum(counts), len(windows), context, step)
    return Perplexity(math.exp(mean), mean, *how, time.perf_counter() - started, bos, error, sums, counts)


def compare(
    dense: Callable[..., Any] | Perplexity,
    sparse: Callable[..., Any] | Perplexity,
    tokens: torch.Tensor | TokenData | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Dense beside sparse, ready for json: {"dense": {...}, "sparse": {...}, "ratio": sparse / dense perplexity,
    "nll_increase": nats per token,
    "paired": the same with its standard error and how likely it is by chance, see :func:`paired.windows`}.

    Args:
        dense, sparse: models, or results already measured (sparsify edits a model in place: measure it before).
        tokens, options: as for `perplexity`; tokens are needed only where a model is given.

    Raises:
        SparseForgeError: as `perplexity`; a model without tokens; two results of different windows.
    """
    if tokens is None and not (isinstance(dense, Perplexity) and isinstance(sparse, Perplexity)):
        raise SparseForgeError("comparing models needs tokens: pass them, or two Perplexity results")
    results = [m if isinstance(m, Perplexity) else perplexity(m, tokens, **options) for m in (dense, sparse)]  # type: ignore[arg-type]
    before, after = results
    for field in ("context", "stride", "windows", "tokens_scored", "bos_token_id"):
        if getattr(before, field) != getattr(after, field):
            raise SparseForgeError(
                f"dense and sparse differ in {field} ({getattr(before, field)} and {getattr(after, field)}): "
                "measure both on the same tokens with the same options"
            )
    return {
        "dense": dataclasses.asdict(before),
        "sparse": dataclasses.asdict(after),
        "ratio": math.exp(after.nll_per_token - before.nll_per_token),
        "nll_increase": after.nll_per_token - before.nll_per_token,
        "paired": paired.windows(before.window_nll, after.window_nll, before.window_tokens),
    }


def text_tokens(
    source: Any, tokenizer: Any, *, text_column: str | None = None, told: list[str] | None = None
) -> torch.Tensor:
    """An evaluation text as one LongTensor [tokens]: rows and documents joined by blank lines, nothing cut or shuffled.

    `tokenizer("\\n\\n".join(rows))` is how SparseGPT, Wanda and AST read WikiText-2, here
    "Salesforce/wikitext:wikitext-2-raw-v1:test". As there, the tokenizer's own special tokens (a BOS for LLaMA and OPT)
    come once; `perplexity` sets a BOS before every window. Several sources follow one another.

    Args:
        source, text_column, told: as for `sparseforge_fx.data.load_text`.

    Raises:
        SparseForgeError: as `load_text`; no text.
    """
    opened = open_sources(source)
    column = Column(text_column, tokenizer, told)
    text = "\n\n".join(itertools.chain.from_iterable(part.read(column, False) for part in opened))
    if not text.strip():
        raise SparseForgeError(
            f"{' and '.join(part.name for part in opened)} holds no text: check it and its text column"
        )
    return torch.tensor(
        tokenizer(text, verbose=False)["input_ids"], dtype=torch.long
    )  # verbose: "longer than" is meant


def _leading_bos(model: Any, ids: torch.Tensor) -> int | None:
    """The model's beginning-of-sequence token, if the text begins with it."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    bos = getattr(config, "bos_token_id", None)
    return bos if isinstance(bos, int) and int(ids[0]) == bos else None


def _flat(tokens: torch.Tensor | TokenData, limit: int | None) -> torch.Tensor:
    """The first `limit` tokens, [tokens]: of a large memory map no more is read than will be scored."""
    if isinstance(tokens, TokenData):
        ids = torch.from_numpy(tokens.ids[:limit].astype("int64"))
        return ids if tokens.bos is None else torch.cat([ids.new_full((1,), tokens.bos), ids])
    if (
        not isinstance(tokens, torch.Tensor)
        or tokens.is_floating_point()
        or tokens.numel() != tokens.shape[-1:].numel()
    ):
        shape = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise SparseForgeError(f"tokens must be a LongTensor [tokens] or TokenData, not {shape}: see text_tokens")
    return tokens.reshape(-1)[:limit]


def _check(model: Any, ids: torch.Tensor, context: int, stride: int, max_windows: int | None, batch_size: int) -> None:
    if context < 2 or not 1 <= stride <= context:
        raise SparseForgeError(f"context={context} with stride={stride}: use context >= 2 and stride from 1 to context")
    if batch_size < 1 or (max_windows is not None and max_windows < 1):
        raise SparseForgeError(f"batch_size={batch_size}, max_windows={max_windows}: both must be at least 1")
    if len(ids) < 2:
        raise SparseForgeError(f"{len(ids)} tokens give nothing to score: at least 2 are needed")
    config = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and min(context, len(ids)) > positions:
        raise SparseForgeError(f"context={context} exceeds the model's {positions} positions: use context={positions}")
    vocabulary = getattr(config, "vocab_size", None)
    if isinstance(vocabulary, int) and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
        raise SparseForgeError(
            f"token ids from {int(ids.min())} to {int(ids.max())} do not fit the model's vocabulary of {vocabulary}: "
            "tokenise with the model's own tokenizer"
        )


def _windows(total: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first scored token) of each window; predicting a token takes one before it in the window."""
    scored = 1  # tokens before this one are scored already, or have nothing before them
    for start in range(0, total, stride):
        end = min(start + context, total)
        if stride == context and end - start < context and start > 0:
            return  # the papers drop the rest
        first = max(scored, start + 1)
        if first < end:
            yield start, end, first
        if end == total:
            return
        scored = end


def _groups(windows: list[tuple[int, int, int]], batch_size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Up to `batch_size` neighbouring windows of one length."""
    for _, same in itertools.groupby(windows, key=lambda w: w[1] - w[0]):
        while group := list(itertools.islice(same, batch_size)):
            yield group


def _logits(output: Any, batch: torch.Tensor) -> torch.Tensor:
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != batch.shape:
        got = list(logits.shape) if isinstance(logits, torch.Tensor) else type(output).__name__
        raise SparseForgeError(
            f"the model returned {got} for ids {list(batch.shape)}: "
            "perplexity needs logits [batch, sequence, vocabulary]"
        )
    return logits


def _nll(logits: torch.Tensor, ids: torch.Tensor, first: int) -> float:
    """Sum over ids[first:] of -log p(id | ids before it); logits [sequence, vocabulary], ids [sequence]."""
    total = 0.0
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    for start in range(first, len(ids), rows):
        end = min(start + rows, len(ids))
        targets = ids[start:end].to(logits.device)
        losses = F.cross_entropy(logits[start - 1 : end - 1].float(), targets, reduction="none")
        total += losses.cpu().double().sum().item()  # on the CPU because not every device has float64
    return total


def _device(model: Any) -> torch.device:
    if not isinstance(model, torch.nn.Module):
        return torch.device("cpu")
    return next((t.device for t in itertools.chain(model.parameters(), model.buffers())), torch.device("cpu"))


def _caller(model: Any) -> Callable[[torch.Tensor], Any]:
    """ids -> output. An exported graph takes its inputs only as it was captured, by name or by position."""
    inner = getattr(model, "_orig_mod", model)  # torch.compile's wrapper takes (*args, **kwargs) whatever it wraps
    exported = getattr(inner, "_in_spec", None)
    if exported is not None:
        named = list(exported.children()[1].context)
        return (lambda ids: model(input_ids=ids)) if "input_ids" in named else model
    parameters = inspect.signature(getattr(inner, "forward", inner)).parameters
    if "use_cache" in parameters:
        return lambda ids: model(input_ids=ids, use_cache=False)  # a key/value cache would only take memory
    anything = {p.kind for p in parameters.values()} == {
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    }
    return (lambda ids: model(input_ids=ids)) if "input_ids" in parameters or anything else model
