"""``sf.rotate``: the same answers, in a basis in which pruning loses less."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_checkpoint import write_checkpoint
from torch import nn
from typer.testing import CliRunner

import sparseforge_fx as sf
from sparseforge_fx import cli
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.methods.rotate import _orthogonal
from sparseforge_fx.passes.find_linears import find_linears
from sparseforge_fx.passes.find_rotations import find_rotations
from sparseforge_fx.pattern import Pattern
from sparseforge_fx.planning import rotate as home

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
}  # fmt: skip


def stirred(model, seed=0):
    """Norms that are no ones, and biases that are no zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


def llama(**changes):
    torch.manual_seed(0)
    config = {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True, "pad_token_id": None} | changes
    return stirred(tf.LlamaForCausalLM(tf.LlamaConfig(**config)))


def opt():
    config = tf.OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, word_embed_proj_dim=32,
        pad_token_id=None, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return stirred(tf.OPTForCausalLM(config))


def gpt2():
    return stirred(
        tf.GPT2LMHeadModel(
            tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, bos_token_id=0, eos_token_id=1)
        )
    )


def vit():
    config = {**SIZES, "image_size": 32, "patch_size": 8}
    config.pop("vocab_size")
    return stirred(tf.ViTForImageClassification(tf.ViTConfig(**config)))


def words(count=4, vocabulary=100):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, vocabulary, (2, 16), generator=generator)} for _ in range(count)]


def pictures(count=4):
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)} for _ in range(count)]


@pytest.mark.parametrize(("build", "data"), [(llama, words), (opt, words), (gpt2, words), (vit, pictures)])
def test_the_same_answers_and_less_to_lose(build, data):
    model, batches = build(), data()
    with torch.no_grad():
        before = model(**batches[0]).logits
    first = {name: p.clone() for name, p in model.named_parameters()}
    report = sf.rotate(model, batches, steps=25)
    with torch.no_grad():
        after = model(**batches[0]).logits
    assert torch.allclose(before, after, atol=1e-5) and report["error"] < 1e-5
    (space,) = report["spaces"]
    assert space["width"] == 32 and space["lost_after"] < 0.9 * space["lost_before"]
    changed = [name for name, p in model.named_parameters() if name in first and not torch.equal(p, first[name])]
    assert len(changed) > 10
    json.dumps(report)


def test_pruned_after_it_a_model_is_nearer_to_the_dense_one():
    plain, turned, batches = llama(), llama(), words(8)
    with torch.no_grad():
        dense = torch.cat([plain(**b).logits for b in batches])
    sf.rotate(turned, batches, steps=100)
    for model in (plain, turned):
        sf.sparsify(model, batches, method="sparsegpt", show_progress=False)
    with torch.no_grad():
        far, near = ((torch.cat([m(**b).logits for b in batches]) - dense).norm() for m in (plain, turned))
    assert near < 0.95 * far


def test_a_head_that_was_tied_gets_a_weight_of_its_own_and_keeps_it(tmp_path):
    model, batches = llama(), words()
    report = sf.rotate(model, batches, steps=5)
    assert model.lm_head.weight is not model.model.embed_tokens.weight and not model.config.tie_word_embeddings
    assert any("lm_head has a weight of its own now" in note for note in report["notes"])
    model.save_pretrained(tmp_path / "m")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(**batches[0]).logits, model(**batches[0]).logits)


def test_what_is_frozen_turns_and_is_named():
    model = llama()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    report = sf.rotate(model, words(), steps=2)
    assert "turned like the others, though frozen: model.layers.0.self_attn.q_proj.weight" in report["notes"]
    assert report["spaces"][0]["readers"] == 9 and not model.model.layers[0].self_attn.q_proj.weight.requires_grad


def test_whole_vectors_of_zeros_are_no_sparsity():
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:30] = 0  # tokens that are never met
        model.model.layers[0].mlp.up_proj.weight[:16] = 0
        model.model.layers[0].mlp.down_proj.weight[:, :16] = 0
    assert sf.rotate(model, words(), steps=2)["spaces"]
    assert not model.model.embed_tokens.weight[:30].any() and not model.model.layers[0].mlp.up_proj.weight[:16].any()


def test_weights_keep_their_size_and_norms_are_one_number():
    model = llama()
    with torch.no_grad():
        model.model.norm.weight.mul_(0.1)
        for layer in model.model.layers:
            layer.input_layernorm.weight.mul_(0.2)
            layer.post_attention_layernorm.weight.mul_(5)
    readers = [n for n, _ in model.named_parameters() if n.split(".")[-2][0] in "qkvgu"]  # projections that read
    size = {n: float(model.get_parameter(n).norm()) for n in readers}
    sf.rotate(model, words(), steps=5)
    for name in readers:
        assert float(model.get_parameter(name).norm()) == pytest.approx(size[name], rel=0.1)
    for name, p in model.named_parameters():
        if "norm" in name:
            assert torch.equal(p, p[:1].expand_as(p)) and 0.05 < float(p.detach()[0]) < 10


def test_the_whole_way_after_it():
    model, batches = llama(), words(8)
    sf.rotate(model, batches, steps=5)
    result = sf.sparsify(model, batches, steps=4, show_progress=False)
    assert len(result.report["sites"]) == 14 and sf.lower_modules(model, tokens=[1]) is not None


def test_half_precision_is_within_its_rounding():
    model, batches = llama().bfloat16(), words()
    assert 0 < sf.rotate(model, batches, steps=5)["error"] < 0.05


@pytest.mark.parametrize(
    "why",
    [
        "sparse",
        "other pattern",
        "no pattern",
        "left out",
        "frozen",
        "bert",
        "pattern",
        "no data",
        "option",
        "steps",
        "answers",
        "killed",
    ],
)
def test_refused_in_a_sentence_and_the_model_as_it_was(why, monkeypatch):
    model, batches, how = llama(), words(), {"steps": 3}
    expected: tuple = ({"pattern": "has none", "no data": "needs data", "steps": "steps",
        "option": "has no option lenght", "bert": "can be rotated", "answers": "answers otherwise"}.get(why, "zeros, which another basis fills"))  # fmt: skip
    if why in ("sparse", "other pattern", "no pattern"):
        sf.sparsify(model, method="magnitude", pattern={"sparse": "2:4", "no pattern": "30%"}.get(why, "12:16"))
    elif why in ("left out", "frozen"):  # some of it is sparse, and no site of this run
        sf.sparsify(model, method="magnitude", include="*mlp*")
        how |= {"exclude": "*mlp*"} if why == "left out" else {}
        for name, p in model.named_parameters() if why == "frozen" else ():
            p.requires_grad_("mlp" not in name)
    elif why == "bert":
        config = tf.BertConfig(**SIZES, tie_word_embeddings=False)
        model = tf.BertForMaskedLM(config).eval()
    elif why == "pattern":
        how["pattern"] = "50%"
    elif why == "no data":
        batches = None
    elif why == "option":
        how["lenght"] = 3
    elif why == "steps":
        how["steps"] = 0
    elif why == "answers":
        turn = home._rotate
        monkeypatch.setattr(home, "_rotate", lambda t, d, m: None if t.shape[0] == 100 else turn(t, d, m))
    else:

        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(home, "_rotate", interrupted)
    before, tied = copy.deepcopy(model.state_dict()), model.config.tie_word_embeddings
    error, told = (KeyboardInterrupt, None) if why == "killed" else (sf.SparseForgeError, expected)
    with pytest.raises(error, match=told):
        sf.rotate(model, batches, **how)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    if tied and why != "bert":
        assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
        assert model.all_tied_weights_keys


def test_any_module():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.RMSNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            return x + self.down(self.up(self.norm(x)).relu())

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), Block(), Block(), nn.RMSNorm(16), nn.Linear(16, 4)).eval()
    stirred(model)
    batches = [torch.randn(6, 8) for _ in range(3)]
    before = model(batches[0]).detach()
    report = sf.rotate(model, batches, steps=10)
    assert torch.allclose(model(batches[0]), before, atol=1e-5) and report["spaces"][0]["readers"] == 2


class Auxiliary(nn.Module):
    """A language model with something that forward does not call."""

    def __init__(self, kind):
        super().__init__()
        self.lm, self.kind = llama(), kind
        if kind == "weight":
            self.aux = nn.Linear(32, 5)
        elif kind == "token":
            self.aux = nn.Parameter(torch.randn(1, 1, 32))
        elif kind == "alias":
            self.aux = [self.lm.model.layers[1].mlp.up_proj.weight]
        else:
            self.aux = nn.Linear(24, 5)

    def forward(self, input_ids):
        return self.lm(input_ids).logits


@pytest.mark.parametrize("kind", ["weight", "token", "alias", "narrow"])
def test_what_the_batches_do_not_use_turns_nothing_or_is_excluded(kind):
    model, batches = Auxiliary(kind), words()
    before = copy.deepcopy(model.state_dict())
    if kind == "narrow":
        assert sf.rotate(model, batches, steps=2)["spaces"]
        return
    why = "shares memory with attribute aux.0 of the model" if kind == "alias" else "aux.*: give batches that use it"
    with pytest.raises(sf.SparseForgeError, match=why):
        sf.rotate(model, batches, steps=2)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    if kind != "alias":
        assert sf.rotate(model, batches, steps=2, exclude="aux")["spaces"]


def test_as_a_command(tmp_path):
    write_checkpoint(tmp_path / "dense", num_hidden_layers=1)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 200)
    text = ["--data", tmp_path / "text.txt", "--set", "calibration=4", "--set", "length=16", "--set", "steps=5"]
    said = CliRunner().invoke(cli.app, [str(a) for a in ("rotate", tmp_path / "dense", *text, "-o", tmp_path / "out")])
    assert said.exit_code == 0, said.output
    assert "next: sparseforge-fx sparsify" in " ".join(said.stdout.split())
    report = json.loads((tmp_path / "out" / "rotation.json").read_text())
    assert report["spaces"][0]["lost_after"] <= report["spaces"][0]["lost_before"]
    dense, turned = (tf.AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("dense", "out"))
    assert turned.dtype == dense.dtype
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.allclose(dense(ids).logits, turned(ids).logits, atol=1e-4)
    again = CliRunner().invoke(cli.app, [str(a) for a in ("rotate", tmp_path / "dense", *text, "-o", tmp_path / "out")])
    assert again.exit_code == 2 and "not empty" in again.stderr


class Residual(nn.Module):
    """x + f(norm(x)) for every block; what it is made of is drawn."""

    def __init__(self, kinds, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.kinds = kinds
        self.write, self.read = nn.Linear(6, 16), nn.Linear(16, 5)
        self.norms = nn.ModuleList(norm(16) for norm, _, _ in kinds)
        self.up = nn.ModuleList(nn.Linear(16, 12, bias=bias) for _, bias, _ in kinds)
        self.down = nn.ModuleList(nn.Linear(12, 16, bias=bias) for _, bias, _ in kinds)
        self.place = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, x):
        x = self.write(x) + self.place
        for norm, up, down, (_, _, between) in zip(self.norms, self.up, self.down, self.kinds, strict=True):
            x = between(x, down(up(norm(x)).tanh()))
        return self.read(x)


NORMS = [
    nn.LayerNorm,
    nn.RMSNorm,
    lambda width: nn.LayerNorm(width, elementwise_affine=False),
    lambda width: nn.LayerNorm(width, bias=False),
    lambda width: nn.RMSNorm(width, elementwise_affine=False),
    lambda width: nn.Identity(),
]
BETWEEN = [
    lambda x, y: x + y,
    lambda x, y: x - y,
    lambda x, y: 0.5 * x + y / 3,
    lambda x, y: (x + y)[:, 1:],
    lambda x, y: (x + y).transpose(0, 1).contiguous().transpose(0, 1),
    lambda x, y: torch.cat([x, y], 1),
    lambda x, y: x + y.abs(),  # does not turn
    lambda x, y: x + y.flip(-1),  # neither
    lambda x, y: x * y,
    lambda x, y: x + y + 1,
]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kinds=st.lists(st.tuples(st.sampled_from(NORMS), st.booleans(), st.sampled_from(BETWEEN)), min_size=1, max_size=3),
    seed=st.integers(0, 100),
)
def test_whatever_is_found_may_be_turned_by_any_matrix(kinds, seed):
    model = stirred(Residual(kinds, seed), seed)
    x = torch.randn(2, 7, 6)
    with torch.no_grad():
        before = model(x)
        program = capture(model, x)
        for space in find_rotations(program, find_linears(program, Pattern(1, 1), "*"))[0]:
            matrix = torch.linalg.qr(torch.randn(space.width, space.width).double())[0]
            if space.centred:
                ones = torch.full((space.width, 1), space.width**-0.5).double()
                matrix = _orthogonal(matrix, ones)
            for norm in space.norms:
                home._fold(program, norm)
            for axis in space.axes:
                home._rotate(program.tensor(axis.fqn), axis.dim, matrix)
        assert torch.allclose(model(x), before, atol=2e-5, rtol=1e-4)
