"""Which linears get which format: by a plan exactly its own, by names, and a copy of a tied head only where asked for."""

import copy

import pytest
import torch
from packed_models import IDS, sparse_model
from tiny_checkpoint import byte_tokenizer, tiny_llama
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import DENSE, parse_format
from sparseforge_fx.plans import Plan, PlannedWeight, Price

UP, DOWN, GATE, HEAD = (*(f"model.layers.0.mlp.{n}_proj" for n in ("up", "down", "gate")), "lm_head")
FORMATS = {f"{UP}.weight": "2:4 int8", f"{DOWN}.weight": "dense int4/32", f"{GATE}.weight": "2:4"}


def formats_of(report):
    return {s["name"]: s["format"] for s in report["sites"]}


def as_plan(machine=None):
    price = {DENSE: Price(0.0, 1.0, {1: 1.0})}
    shapes = {f"{UP}.weight": (64, 32), f"{DOWN}.weight": (32, 64), f"{GATE}.weight": (64, 32)}
    weights = [PlannedWeight(n, shapes[n], parse_format(f), price) for n, f in FORMATS.items()]
    return Plan(weights, (1,), {"speedup": 2.0}, machine, 1)


@pytest.mark.parametrize("kind", ["mapping", "plan", "path"])
def test_what_a_plan_says_and_nothing_else(tmp_path, kind):
    as_plan().save(tmp_path / "plan.json")
    model = sparse_model("llama")
    report = sf.quantize(model, plan={"mapping": FORMATS, "plan": as_plan(), "path": tmp_path / "plan.json"}[kind])
    assert formats_of(report) == {UP: "2:4 int8", DOWN: "dense int4/32"}  # the second is 2:4, and dense in the plan
    reasons = {s["name"]: s["reason"] for s in report["skipped"]}
    assert reasons[GATE] == "plan: 2:4" and reasons[HEAD] == reasons["model.layers.1.mlp.up_proj"] == "not in the plan"
    assert sf.quantize(model, plan={f"{HEAD}.weight": "int8", f"{UP}.weight": "2:4 int8"})["sites"][0]["name"] == HEAD


@pytest.mark.parametrize(
    ("options", "message"),
    [({"plan": {f"{UP}.weight": "2:4 int8"}}, r"makes .*up_proj.weight 2:4 int8, and it is not 2:4: run sf.sparsify"),
     ({"plan": {f"{GATE}.weight": "2:4", f"{UP}.weight": "int8"}}, r"makes .*gate_proj.weight 2:4, and it is not 2:4"),
     ({"plan": {f"{UP}.weight": "int4/128"}}, r"up_proj.weight of the plan cannot be dense int4/128: 32 inputs are no"),
     ({"plan": {"nowhere.weight": "int8"}}, "names nowhere.weight, which is no linear of the model"),
     ({"plan": {"model.embed_tokens.weight": "int8", "lm_head.weight": "int4"}}, "by its other name dense int8: keep"),
     ({"plan": {f"{UP}.weight": "dense"}}, "nothing to quantise: the plan keeps all values as floats"),
     ({"plan": as_plan("Z80")}, "the plan was measured on Z80"),
     ({"plan": 3}, "give a Plan, the path of one, or formats"),
     ({"plan": FORMATS, "values": "int8"}, "leave out values, dense, include and exclude"),
     ({"plan": FORMATS, "dense": False}, "leave out values, dense, include and exclude"),
     ({"plan": FORMATS, "include": "*"}, "leave out values, dense, include and exclude"),
     ({"steps": 3}, "quantize has no option steps; of data it takes calibration, length"),
     ({"include": "*.nothing"}, "nothing to quantise: .*: not among the included names"),
     ({"data": torch.zeros(2, 8, dtype=torch.int64), "calibration": 0}, "calibration is 0: give a whole number from 1")],
)  # fmt: skip
def test_refusals_leave_the_model_as_it_was(options, message):
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SparseForgeError, match=message):
        sf.quantize(model, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings


def test_what_is_packed_already_must_be_so_in_the_plan():
    model = sparse_model("llama")
    sf.quantize(model, plan=FORMATS)
    with pytest.raises(SparseForgeError, match=r"makes .*up_proj.weight dense int8, and it is packed in 2:4 int8"):
        sf.quantize(model, plan={f"{UP}.weight": "int8"})
    with pytest.raises(SparseForgeError, match="and it is no weight of a linear or of experts"):
        sf.quantize(nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8)), plan={"0.weight": "int8"})


def test_a_plan_of_experts(tiny):
    model = copy.deepcopy(tiny("moe").model)
    first, last = (f"model.layers.0.mlp.experts.{leaf}" for leaf in ("gate_up_proj", "down_proj"))
    with pytest.raises(SparseForgeError, match=rf"makes {first} 2:4 int8, and it is not 2:4: run sf.sparsify"):
        sf.quantize(model, plan={first: "2:4 int8"})
    prices = {DENSE: Price(0.0, 1.0, {1: 1.0})}
    plan = Plan([PlannedWeight(first, (64, 32), parse_format("int8"), prices)], (1,), {"bytes": 1.0}, None, 1)
    with pytest.raises(SparseForgeError, match=rf"{first} is 64 x 32 in the plan and 4 x 64 x 32 in the model"):
        sf.quantize(model, plan=plan)
    report = sf.quantize(model, plan={first: "int8", last: "dense"})
    assert formats_of(report) == {first: "dense int8"} and model.get_experts_implementation()[""] == "sparseforge"
    with pytest.raises(SparseForgeError, match=rf"makes {first} dense int4/32, and it is packed in dense int8"):
        sf.quantize(model, plan={first: "int4"})
    assert formats_of(sf.quantize(model, plan={first: "int8", last: "int8"})) == {last: "dense int8"}


def test_a_linear_that_cannot_be_replaced():
    class Other(nn.Linear):
        pass

    model = nn.Sequential(Other(32, 8), nn.Linear(8, 8))
    with pytest.raises(SparseForgeError, match=r"0.weight dense int8, which it cannot be: Other with a weight of type"):
        sf.quantize(model, plan={"0.weight": "int8"})


def test_by_name():
    model = tiny_llama()
    report = sf.quantize(model, "int8", include=["*.mlp.*"], exclude="*.down_proj", length=4)
    assert {n.rpartition(".")[2] for n in formats_of(report)} == {"up_proj", "gate_proj"}
    reasons = {s["name"]: s["reason"] for s in report["skipped"]}
    assert reasons[DOWN] == "excluded by name" and reasons["model.layers.0.self_attn.q_proj"].startswith("not among")
    assert reasons[HEAD] == "its weight is an embedding's, too: include it by name, and the embedding with it or not"
    assert report["notes"] == ["length is given and not used: there is no data"]
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight


# -- a head that is tied to an embedding -------------------------------------------------------------------------------
ONE = "lm_head and model.embed_tokens stay one weight, in dense int8"
APART = "lm_head: a copy of its own, in dense int8, beside the weight of model.embed_tokens (only the linear is named)"


@pytest.mark.parametrize("data", [None, torch.arange(96).view(4, 24)])
@pytest.mark.parametrize(
    ("how", "told"),
    [({"values": "int8", "include": "*"}, ONE), ({"plan": {"model.embed_tokens.weight": "int8"}}, ONE),
     ({"values": "int8", "include": ["lm_head", "model.embed_tokens"]}, ONE),
     ({"values": "int8", "include": ["*.mlp.*", "lm_head"]}, APART), ({"plan": {"lm_head.weight": "int8"}}, APART)],
)  # fmt: skip
def test_a_tied_head_takes_its_embedding_with_it_or_gets_a_copy(how, told, data):
    model = tiny_llama(initializer_range=0.2)
    table, model.get_input_embeddings().weight.requires_grad = model.model.embed_tokens.weight.detach().clone(), True
    report = sf.quantize(model, data=data, **how)
    assert formats_of(report)[HEAD] == "dense int8" and told in report["notes"]
    head, rows = model.lm_head.weight, model.model.embed_tokens.weight
    assert 0 < (head - table).norm() < 0.02 * table.norm()
    assert torch.equal(rows, head if told == ONE else table) and isinstance(rows, nn.Parameter) == (told == APART)
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, head) and torch.equal(model.model.embed_tokens.weight, rows)


class Scaled(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * torch.tensor(8.0).to(self.weight.dtype)


class Normed(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) / self.weight.norm()


@pytest.mark.parametrize("kind", [Normed, "hook", "max_norm"])
def test_an_embedding_that_does_more_than_to_take_rows_stays(kind):
    model = tiny_llama()
    table = model.model.embed_tokens
    if kind == "hook":
        table.register_forward_hook(lambda *_: None)
    elif kind == "max_norm":
        table.max_norm = 1.0
    else:
        table.__class__ = kind
    weight = table.weight
    report = sf.quantize(model, "int8", include="*")
    told = f"({type(table).__name__} does more with it than to take rows, or is seen by hooks)"
    assert any("a copy of its own" in n and n.endswith(told) for n in report["notes"])
    assert model.model.embed_tokens is table and table.weight is weight and formats_of(report)[HEAD] == "dense int8"


def test_what_an_embedding_does_with_its_rows_it_goes_on_doing():
    model = tiny_llama().eval()
    model.model.embed_tokens.__class__ = Scaled
    with torch.no_grad():
        want = model.model.embed_tokens(IDS)
        assert ONE in sf.quantize(model, "int8", include="*")["notes"]
        got, table = model.model.embed_tokens(IDS), model.model.embed_tokens
        assert 0 < (got - want).norm() < 0.02 * want.norm() and torch.equal(got, 8 * table.weight[IDS])
        text = model.generate(IDS, max_new_tokens=4, do_sample=False)
        model.dequantize()
        assert type(model.model.embed_tokens) is Scaled and torch.equal(model.model.embed_tokens(IDS), got)
        assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), text)


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("include", ["*", ["*proj", "lm_head"]])
def test_files_of_a_tied_head(tmp_path, include, values):
    model = tiny_llama(initializer_range=0.2).eval()
    sf.quantize(model, values, include=include)
    sf.save_packed(model, byte_tokenizer(), tmp_path / "packed")
    with torch.no_grad():
        want = model(IDS).logits
        loaded, tokenizer = sf.load(tmp_path / "packed")
        assert torch.equal(loaded(IDS).logits, want) and loaded.lm_head.format.values == values
    loaded.save_pretrained(tmp_path / "again")
    assert len({(tmp_path / n / "model.safetensors").read_bytes() for n in ("packed", "again")}) == 1
    head, table = loaded.lm_head.weight, loaded.model.embed_tokens.weight
    loaded.dequantize().save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    dense, _ = sf.load(tmp_path / "dense")
    assert torch.equal(dense.lm_head.weight, head) and torch.equal(dense.model.embed_tokens.weight, table)
    assert torch.equal(head, table) == (dense.lm_head.weight is dense.model.embed_tokens.weight) == (include == "*")


@pytest.mark.parametrize("include", ["*", "lm_head"])
def test_a_tie_that_fails_half_way_is_taken_back(monkeypatch, include):
    from sparseforge_fx.deploy.lowering import quantize

    def fails(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "part", fails)
    model = tiny_llama()
    before, table = copy.deepcopy(model.state_dict()), model.model.embed_tokens
    with pytest.raises(KeyboardInterrupt):
        sf.quantize(model, "int8", torch.arange(96).view(4, 24), include=include)
    assert model.model.embed_tokens is table and model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
