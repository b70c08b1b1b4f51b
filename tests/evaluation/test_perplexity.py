"""Perplexity against Hugging Face's loss, the papers' loop, and one forward pass per token."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparseforge_fx.data.tokens import TokenData
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.evaluation import perplexity as evaluate
from sparseforge_fx.evaluation.perplexity import Perplexity, compare, perplexity, text_tokens

VOCABULARY = 97


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        initializer_range=0.5,  # far from uniform predictions, so that a wrong position or context shows
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, VOCABULARY, (150,), generator=torch.Generator().manual_seed(1))


class Running(nn.Module):
    """Logits from the decayed sum of all ids so far in the window: cheap, causal, and every earlier token counts."""

    def __init__(self, vocabulary=11):
        super().__init__()
        table = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(2))
        self.register_buffer("table", table)

    def forward(self, x):
        state, out = torch.zeros(len(x), self.table.shape[1]), []
        for column in x.T:
            state = 0.7 * state + self.table[column]
            out.append(state)
        return torch.stack(out, 1)


def one_token_at_a_time(model, ids, context, stride, max_windows=None):
    """Negative log-likelihoods by the definition: where does the window that scores token t begin?"""
    losses = []
    for t in range(1, len(ids)):
        if stride == context:
            start = t // context * context
            if t == start or (start > 0 and start + context > len(ids)):
                continue
        else:
            start = max(0, -(-(t - context + 1) // stride)) * stride
        if max_windows is not None and start >= max_windows * stride:
            continue
        output = model(ids[None, start:t])
        logits = getattr(output, "logits", output)[0, -1].double()
        losses.append(-torch.log_softmax(logits, 0)[ids[t]].item())
    return losses


# --------------------------------------------------------------------------------------------------------- definition
@torch.no_grad()
def test_one_window_is_hugging_face_s_loss(llama, ids):
    expected = llama(ids[None, :60], labels=ids[None, :60]).loss.item()
    result = perplexity(llama, ids[:60], context=60)
    assert result.nll_per_token == pytest.approx(expected, abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert (result.tokens_scored, result.windows, result.context, result.stride) == (59, 1, 60, 60)
    assert result.seconds > 0


@torch.no_grad()
def test_default_windows_are_the_papers_loop(llama, ids):
    # SparseGPT's opt_eval and Wanda's eval_ppl, which AST took over.
    seqlen, nlls = 32, []
    nsamples = ids.numel() // seqlen
    for i in range(nsamples):
        batch = ids[None, i * seqlen : (i + 1) * seqlen]
        shift_logits, shift_labels = llama(batch).logits[:, :-1].contiguous(), batch[:, 1:]
        loss = nn.CrossEntropyLoss()(shift_logits.view(-1, VOCABULARY), shift_labels.view(-1))
        nlls.append(loss.float() * seqlen)
    expected = torch.exp(torch.stack(nlls).sum() / (nsamples * seqlen)).item()
    result = perplexity(llama, ids, context=seqlen)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert (result.windows, result.tokens_scored) == (4, 4 * 31)  # 150 = 4 * 32 + 22, the rest is dropped


@torch.no_grad()
def test_sliding_windows_are_hugging_face_s_guide(llama, ids):
    # https://huggingface.co/docs/transformers/perplexity
    context, stride, total, count, previous = 40, 16, 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + context, len(ids))
        window = ids[None, begin:end]
        target = window.clone()
        target[:, : -(end - previous)] = -100
        loss = llama(window, labels=target).loss.item()
        valid = (target[:, 1:] != -100).sum().item()
        total, count, previous = total + loss * valid, count + valid, end
        if end == len(ids):
            break
    result = perplexity(llama, ids, context=context, stride=stride)
    assert result.nll_per_token == pytest.approx(total / count, abs=1e-5)
    assert result.tokens_scored == count == len(ids) - 1


@torch.no_grad()
@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (8, 1), (9, 8), (30, 30)])
def test_every_token_has_the_context_it_should(llama, ids, context, stride):
    losses = one_token_at_a_time(llama, ids[:21], context, stride)
    result = perplexity(llama, ids[:21], context=context, stride=stride)
    assert result.tokens_scored == len(losses)
    assert result.nll_per_token == pytest.approx(np.mean(losses), abs=1e-5)


@settings(deadline=None, max_examples=25)
@given(draw=st.data())
def test_any_window_stride_batch_and_limit(draw):
    total, context = draw.draw(st.integers(2, 24)), draw.draw(st.integers(2, 9))
    stride, batch_size = draw.draw(st.integers(1, context)), draw.draw(st.integers(1, 4))
    max_windows = draw.draw(st.one_of(st.none(), st.integers(1, 4)))
    ids = torch.randint(0, 11, (total,), generator=torch.Generator().manual_seed(total))
    options = {"context": context, "stride": stride, "max_windows": max_windows}
    losses = one_token_at_a_time(Running(), ids, context, stride, max_windows)
    tokens = draw.draw(st.sampled_from([ids, ids[None], TokenData(ids.to(torch.int32), 2)]))
    result = perplexity(Running(), tokens, batch_size=batch_size, **options)
    assert result.tokens_scored == len(losses)
    assert result.nll_per_token == pytest.approx(np.mean(losses), abs=1e-5)
    assert max_windows is None or result.windows <= max_windows


@pytest.mark.parametrize("stride", [None, 5])
def test_every_window_begins_with_the_models_first_token(llama, ids, stride):
    """Where the text does. It is context, and one of the window's tokens."""
    bos, context = llama.config.bos_token_id, 9
    body = ids.flatten()[:40]
    body = body.where(body != bos, 7)
    found = perplexity(llama, torch.cat([torch.tensor([bos]), body]), context=context, stride=stride, batch_size=3)
    total, scored, last = 0.0, 0, 1
    for start in range(0, 40, stride or 8):
        part = body[start : start + 8]
        if stride is None and len(part) < 8:
            break
        logits = llama(torch.cat([torch.tensor([bos]), part])[None]).logits[0]
        first = max(last, start + 1) - start
        total += F.cross_entropy(logits[first : len(part)], part[first:], reduction="sum").item()
        scored += len(part) - first
        last = start + len(part)
        if last == 40:
            break
    assert (found.tokens_scored, found.bos_token_id, found.context) == (scored, bos, context)
    assert found.nll_per_token == pytest.approx(total / scored, rel=1e-5)
    plain = perplexity(llama, body, context=context, stride=stride)
    assert plain.bos_token_id is None and plain.nll_per_token != found.nll_per_token


def test_of_a_large_memory_map_only_what_is_scored_is_read(ids):
    class Spy(np.ndarray):
        def astype(self, *arguments, **options):
            read.append(self.size)
            return super().astype(*arguments, **options)

    read = []
    data = TokenData(np.arange(10_000).view(Spy) % 11, 4)
    perplexity(Running(), data, context=8, stride=4, max_windows=3)
    assert read == [17]  # a token more than three windows hold, as the first may be no text


# ----------------------------------------------------------------------------------------------------------- numerics
def test_chunks_bound_the_float32_logits_and_change_nothing(llama, ids, monkeypatch):
    whole = perplexity(llama, ids, context=50)
    rows = []
    original = evaluate.F.cross_entropy

    def spy(logits, *arguments, **options):
        assert logits.dtype == torch.float32
        rows.append(len(logits))
        return original(logits, *arguments, **options)

    monkeypatch.setattr(evaluate.F, "cross_entropy", spy)
    monkeypatch.setattr(evaluate, "CHUNK_ELEMENTS", 7 * VOCABULARY + 1)
    chunked = perplexity(llama, ids, context=50, batch_size=2)
    assert max(rows) == 7 and sum(rows) == 3 * 49
    assert chunked.nll_per_token == pytest.approx(whole.nll_per_token, abs=1e-6)


def test_half_precision_logits_are_scored_in_float32(ids):
    table = torch.randn(VOCABULARY, VOCABULARY).mul(5).bfloat16()
    losses = -torch.log_softmax(table[ids[:-1]].double(), 1)[torch.arange(149), ids[1:]]
    result = perplexity(lambda x: table[x], ids, context=150)
    assert result.nll_per_token == pytest.approx(losses.mean().item(), abs=1e-6)


# --------------------------------------------------------------------------------------------------------- the model
class Dropping(Running):
    def __init__(self, fail=False):
        super().__init__()
        self.first, self.frozen, self.fail = nn.Dropout(0.5), nn.Dropout(0.5), fail

    def forward(self, x):
        if self.fail:
            raise RuntimeError("broken model")
        return self.frozen(self.first(super().forward(x)))


@pytest.mark.parametrize("training", [True, False])
def test_modes_come_back_module_by_module(training):
    model = Dropping().train(training)
    model.frozen.train(not training)
    ids = torch.arange(22) % 11
    assert perplexity(model, ids, context=11).nll_per_token == perplexity(Running(), ids, context=11).nll_per_token
    model.fail = True
    with pytest.raises(RuntimeError, match="broken model"):
        perplexity(model, ids, context=11)
    assert (model.training, model.first.training, model.frozen.training) == (training, training, not training)


def test_no_graph_is_built(llama, ids):
    grads = []
    handle = llama.lm_head.register_forward_hook(lambda m, i, out: grads.append(out.requires_grad))
    perplexity(llama, ids, context=64, max_windows=1)
    handle.remove()
    assert grads == [False]


class Keyword(Running):
    def forward(self, input_ids):
        return super().forward(input_ids)


@pytest.mark.parametrize("by_name", [True, False])
def test_exported_graphs_take_ids_as_they_were_captured(by_name):
    ids = torch.arange(16) % 11
    example = ids.reshape(2, 8)
    arguments = ((), {"input_ids": example}) if by_name else ((example,), {})
    graph = torch.export.export(Keyword(), *arguments, strict=False).module()
    modes = [m.training for m in graph.modules()]
    result = perplexity(graph, ids, context=8, batch_size=2)
    assert result.nll_per_token == pytest.approx(perplexity(Keyword(), ids, context=8).nll_per_token, abs=1e-6)
    assert [m.training for m in graph.modules()] == modes


def test_models_that_take_anything_get_the_name(llama, ids):
    class Wrapper(nn.Module):
        def forward(self, *args, **kwargs):
            assert not args
            return llama(**kwargs)

    assert perplexity(Wrapper(), ids, context=32).nll_per_token == perplexity(llama, ids, context=32).nll_per_token


def test_no_key_value_cache_is_kept(llama, ids):
    outputs = []
    handle = llama.register_forward_hook(lambda m, i, out: outputs.append(out.past_key_values))
    perplexity(llama, ids, context=64, max_windows=1)
    handle.remove()
    assert outputs == [None]


# ------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.zeros(1, dtype=torch.long), {}, "1 tokens give nothing to score"),
        (torch.zeros(0, dtype=torch.long), {}, "0 tokens give nothing to score"),
        (torch.zeros(50), {}, r"LongTensor.*torch.float32 \[50\]"),
        (torch.zeros(2, 25, dtype=torch.long), {}, r"LongTensor.*\[2, 25\]"),
        ([1, 2, 3], {}, "LongTensor.*list"),
        (None, {"context": 1}, "context=1"),
        (None, {"context": 8, "stride": 9}, "stride=9"),
        (None, {"context": 8, "stride": 0}, "stride=0"),
        (None, {"batch_size": 0}, "batch_size=0"),
        (None, {"max_windows": 0}, "max_windows=0"),
        (None, {"context": 65}, "context=65 exceeds the model's 64 positions"),
        (torch.tensor([1, 97, 3]), {}, "from 1 to 97 do not fit the model's vocabulary of 97"),
        (torch.tensor([1, -100, 3]), {}, "from -100 to 3"),
    ],
)
def test_bad_input_is_one_sentence(llama, ids, tokens, options, message):
    with pytest.raises(SparseForgeError, match=message):
        perplexity(llama, ids if tokens is None else tokens, **{"context": 32, **options})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: torch.full((*x.shape, 11), math.nan), "loss on tokens 0 to 8 is nan"),
        (lambda x: torch.full((*x.shape, 11), -math.inf), "is nan"),
        (lambda x: 1e4 * torch.arange(11.0).expand(*x.shape, 11), "not finite"),
        (lambda x: torch.zeros(x.shape[0], 11), r"returned \[1, 11\] for ids \[1, 8\]"),
        (lambda x: {"hidden": x}, "returned dict"),
        (lambda x: SimpleNamespace(logits=None), "returned SimpleNamespace"),
    ],
)
def test_a_broken_model_is_never_a_number(model, message):
    with pytest.raises(SparseForgeError, match=message):
        perplexity(model, torch.arange(16) % 11, context=8)


# ------------------------------------------------------------------------------------------------- dense beside sparse
def test_compare_puts_dense_beside_sparse(llama, ids):
    worse = lambda x: llama(x).logits * 1.5  # noqa: E731
    report = compare(llama, worse, ids, context=32)
    dense, sparse = perplexity(llama, ids, context=32), perplexity(worse, ids, context=32)
    assert report["dense"]["perplexity"] == dense.perplexity and report["sparse"]["tokens_scored"] == 4 * 31
    assert report["ratio"] == pytest.approx(sparse.perplexity / dense.perplexity) != 1
    assert report["nll_increase"] == pytest.approx(sparse.nll_per_token - dense.nll_per_token)
    assert json.loads(json.dumps(report)) == report
    measured = compare(dense, sparse)
    assert measured["ratio"] == report["ratio"] and measured["dense"] == dataclasses.asdict(dense)


def test_compare_refuses_other_windows(llama, ids):
    dense = Perplexity(10.0, math.log(10.0), 31, 1, 32, 32, 0.1)
    with pytest.raises(SparseForgeError, match="differ in windows"):
        compare(dense, llama, ids, context=32)
    with pytest.raises(SparseForgeError, match="needs tokens"):
        compare(dense, llama)
    with pytest.raises(dataclasses.FrozenInstanceError):
        dense.perplexity = 1.0


def test_text_is_joined_whole_by_blank_lines(tmp_path):
    backend = Tokenizer(models.WordLevel({"<s>": 0, "<?>": 1, "a": 2, "b": 3, "c": 4, "\n\n": 5}, unk_token="<?>"))
    backend.pre_tokenizer = pre_tokenizers.Split("\n\n", "isolated")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", model_max_length=2)
    assert text_tokens(["a", "b", "c"], tokenizer).tolist() == [0, 2, 5, 3, 5, 4]
    assert not tokenizer.deprecation_warnings  # no complaint about its length
    # An empty row stays, as in WikiText, where it separates: "a" + 4 line breaks + "b".
    assert text_tokens(["a", "", "b"], tokenizer).tolist() == [0, 2, 5, 5, 3]
    for name, row in (("2.jsonl", "b"), ("1.jsonl", "a")):
        (tmp_path / name).write_text(json.dumps({"body": row}) + "\n" + json.dumps({"body": "c"}))
    one_after_the_other = [tmp_path / "2.jsonl", tmp_path / "1.jsonl"]
    assert text_tokens(one_after_the_other, tokenizer).tolist() == [0, 3, 5, 4, 5, 2, 5, 4]
    tokens = text_tokens(["a"], tokenizer)
    assert tokens.dtype == torch.long and tokens.ndim == 1
    with pytest.raises(SparseForgeError, match="holds no text"):
        text_tokens(["", " "], tokenizer)
