"""Which vectors of a graph may be rotated: found by structure, on every kind of model that norms before its blocks."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from sparseforge_fx.graph.capture import capture
from sparseforge_fx.passes.find_linears import find_linears
from sparseforge_fx.passes.find_rotations import find_rotations
from sparseforge_fx.passes.spaces import Axis
from sparseforge_fx.pattern import Pattern

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
}  # fmt: skip


def found(model, example=None):
    program = capture(model.eval(), example)
    before = str(program.graph)
    rotations, reasons = find_rotations(program, find_linears(program, Pattern(1, 1), "*"))
    assert str(program.graph) == before
    return rotations, reasons


def test_all_that_reads_and_writes_the_stream_of_a_llama():
    config = tf.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False)
    (stream,), reasons = found(tf.LlamaForCausalLM(config))
    assert reasons == [] and stream.width == 32 and not stream.centred
    assert {axis.fqn for axis in stream.readers.values()} == {
        "lm_head.weight",
        *(f"model.layers.{i}.self_attn.{n}_proj.weight" for i in range(2) for n in "qkv"),
        *(f"model.layers.{i}.mlp.{n}_proj.weight" for i in range(2) for n in ("gate", "up")),
    }
    written = {
        ("model.embed_tokens.weight", 1),
        *((f"model.layers.{i}.{n}_proj.weight", 0) for i in range(2) for n in ("self_attn.o", "mlp.down")),
    }
    assert {tuple(axis) for axis in stream.axes} == written | {tuple(axis) for axis in stream.readers.values()}
    assert len(stream.norms) == 5 and all(norm.offset == 0 and norm.shift is None for norm in stream.norms)
    final = next(norm for norm in stream.norms if norm.scale == "model.norm.weight")
    assert final.readers == (Axis("lm_head.weight", 1),)


@pytest.mark.parametrize(
    ("build", "readers", "norms", "centred"),
    [
        (
            lambda: tf.GemmaForCausalLM(
                tf.GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)
            ),
            11,
            5,
            False,
        ),
        (
            lambda: tf.Qwen3ForCausalLM(
                tf.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)
            ),
            11,
            5,
            False,
        ),
        (
            lambda: tf.OPTForCausalLM(
                tf.OPTConfig(
                    hidden_size=32,
                    ffn_dim=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    vocab_size=100,
                    word_embed_proj_dim=32,
                    tie_word_embeddings=False,
                )
            ),
            9,
            5,
            True,
        ),
        (
            lambda: tf.GPT2LMHeadModel(
                tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, tie_word_embeddings=False)
            ),
            5,
            5,
            True,
        ),
        (
            lambda: tf.ViTForImageClassification(
                tf.ViTConfig(**{k: v for k, v in SIZES.items() if k != "vocab_size"}, image_size=32, patch_size=8)
            ),
            9,
            5,
            True,
        ),
    ],
    ids=["gemma", "qwen3", "opt", "gpt2", "vit"],
)
def test_other_norms_positions_and_patches(build, readers, norms, centred):
    (stream,), reasons = found(build())
    assert reasons == []
    assert (len(stream.readers), len(stream.norms), stream.centred) == (readers, norms, centred)


def test_a_scale_plus_one():
    config = tf.GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)
    (stream,), _ = found(tf.GemmaForCausalLM(config))
    assert {norm.offset for norm in stream.norms} == {1.0}


@pytest.mark.parametrize("kind", ["tied", "after", "returned"])
def test_what_cannot_turn(kind):
    if kind == "tied":  # the embedding is read by the head, through another scale
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True))
    elif kind == "after":  # a norm behind the blocks
        model = tf.Gemma2ForCausalLM(
            tf.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)
        )
    else:
        model = tf.LlamaModel(tf.LlamaConfig(**SIZES, num_key_value_heads=2))
    rotations, reasons = found(model)
    assert rotations == [] and reasons


class Plain(nn.Module):
    def __init__(self, between=lambda x: x):
        super().__init__()
        self.write, self.read, self.between = nn.Linear(8, 16), nn.Linear(16, 8), between

    def forward(self, x):
        return self.read(self.between(self.write(x)))


@pytest.mark.parametrize(
    ("between", "expected", "centred"),
    [
        (lambda x: x, 1, False),
        (lambda x: x * 3, 1, False),
        (lambda x: x / x.pow(2).mean(-1, keepdim=True).sqrt(), 1, False),
        (lambda x: x - x.mean(-1, keepdim=True), 1, True),
        (lambda x: x[:, -1:], 1, False),
        (lambda x: x.flip(-1), 0, False),
        (lambda x: x.relu(), 0, False),
        (lambda x: x + 1, 0, False),
        (lambda x: x * x, 0, False),
        (lambda x: x * x.pow(2).mean(0, keepdim=True), 0, False),
        (lambda x: x.view(-1, 4, 8, 2).flatten(-2), 0, False),
        (lambda x: x.view(-1, 4, 8, 2).mT.flatten(-2), 0, False),
        (lambda x: torch.nn.functional.layer_norm(x, (16,)), 1, True),
        (lambda x: torch.nn.functional.layer_norm(x, (4, 16)), 0, False),
    ],
)
def test_between_a_linear_and_the_next(between, expected, centred):
    rotations, _ = found(Plain(between), torch.randn(2, 4, 8))
    assert len(rotations) == expected
    assert [r.centred for r in rotations] == [centred] * expected


def test_a_scale_of_two_norms_turns_nothing():
    """One tensor under two names: folded into what reads the first norm, it would be missing in the second."""

    class Twice(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.write, self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 8)
            self.first, self.second = nn.RMSNorm(16), nn.RMSNorm(16)
            if shared:
                self.second.weight = self.first.weight

        def forward(self, x):
            x = self.write(x)
            return self.one(self.first(x)) + self.two(self.second(x))

    assert len(found(Twice(False), torch.randn(4, 8))[0]) == 1
    rotations, reasons = found(Twice(True), torch.randn(4, 8))
    assert rotations == [] and len(reasons) <= 1
