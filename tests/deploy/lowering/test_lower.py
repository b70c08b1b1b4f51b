"""lower: the graph that comes out computes what the 2:4 model computes, in fewer bytes, and says what it did."""

import copy
import json

import pytest
import torch
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.deploy.lowering import cost, cost_table
from sparseforge_fx.deploy.lowering.sparse_modules import SparseLinear
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.layouts import LAYOUTS, PLANES
from sparseforge_fx.kernels.packed import pack
from sparseforge_fx.kernels.sparse_linear import OP


def timing(out, width, tokens, ratio):
    shape = cost_table.Shape(out, width, "float32")
    return cost_table.Timing(shape, "rows", tokens, 10.0 * ratio, (9.0, 11.0), 10.0, (9.0, 11.0))


@pytest.fixture
def sparse_llama(captured_once):
    found = captured_once("llama")
    sf.sparsify(found.model)
    return found


def test_every_site_of_a_llama(sparse_llama):
    found = sparse_llama
    fast = sf.lower(found.model, found.example, gate=False)
    report = fast.report
    assert sorted(s["name"].split(".")[-2] for s in report["sites"]) == sorted(
        2 * ["q_proj_k_proj_v_proj", "o_proj", "gate_proj_up_proj", "down_proj"]
    )  # fmt: skip
    assert {s["name"] for s in report["skipped"]} == {"lm_head.weight", "model.embed_tokens.weight"}
    assert report["lowered_bytes"] <= 0.6 * report["dense_bytes"]
    assert report["scratch_bytes"] == 128 * 32 * 4  # gate/up: the largest
    assert json.loads(json.dumps(report)) == report
    for rows, length in ((1, 1), (3, 9)):
        batch = found.batch(rows=rows, length=length)
        want = found.model(**batch).logits
        torch.testing.assert_close(fast(**batch).logits, want, rtol=1e-4, atol=1e-5)


def test_the_model_given_is_left_alone(sparse_llama):
    found = sparse_llama
    before = {k: v.clone() for k, v in found.model.state_dict().items()}
    sf.lower(found.model, found.example, gate=False)
    assert all(torch.equal(v, before[k]) for k, v in found.model.state_dict().items())


def test_the_gate_decides_by_shape(sparse_llama):
    found = sparse_llama
    shapes = {(64, 32): 1.5, (32, 32): 0.8, (128, 32): 1.0}  # merged q/k/v, o, merged gate/up; down is not in the table
    table = cost_table.as_table(timing(*shape, t, r) for shape, r in shapes.items() for t in (1, 8))
    fast = sf.lower(found.model, found.example, table=table, tokens=[1, 8])
    reasons = {s["name"].split(".")[-2]: s["reason"] for s in fast.report["skipped"] if s["reason"].startswith("gate")}
    assert reasons == {
        "o_proj": "gate: slower than dense at 1 tokens (0.80x)",
        "gate_proj_up_proj": "gate: no faster than dense (at best 1.00x, at 1 tokens)",
        "down_proj": "gate: not measured at 1, 8 tokens",
    }
    assert len(fast.report["sites"]) == 2 and len(fast.report["table"]) == 6
    assert sum(n.target == OP for n in fast.graph.nodes) == 2
    batch = found.batch()
    torch.testing.assert_close(fast(**batch).logits, found.model(**batch).logits, rtol=1e-4, atol=1e-5)


def test_each_weight_gets_the_layout_that_gains_most(sparse_llama, monkeypatch, tmp_path):
    """A machine with three layouts, one of which takes only wide weights and belongs to no file."""
    found = sparse_llama
    only_wide = lambda out, *_: None if out == 128 else "too narrow"  # noqa: E731
    own = PLANES._replace(limits=only_wide, durable=False, kernels={"cpu": PLANES.elsewhere})
    monkeypatch.setitem(LAYOUTS, "planes", own)

    def measure(shapes, tokens, device, layouts):
        (shape,) = shapes
        gains = {o.name: 2.0 if o is own else 1.5 for o in layouts if not o.refuses(*shape[:3], device, shape.format)}
        rows = {n: {t: timing(*shape[:2], t, r)._replace(layout=n) for t in tokens} for n, r in gains.items()}
        return {shape: rows}

    monkeypatch.setattr(cost, "measure", measure)
    fast = sf.lower(found.model, found.example, tokens=[1])
    assert {s["name"].split(".")[-2]: s["layout"] for s in fast.report["sites"]} == {
        "q_proj_k_proj_v_proj": "rows", "o_proj": "rows", "gate_proj_up_proj": "planes", "down_proj": "rows",
    }  # fmt: skip
    batch = found.batch()
    torch.testing.assert_close(fast(**batch).logits, found.model(**batch).logits, rtol=1e-4, atol=1e-5)
    report = sf.export(found.model, tmp_path / "m.pt2", found.example, tokens=[1])
    assert {s["layout"] for s in report["sites"]} == {"rows"}
    modules = copy.deepcopy(found.model)
    up = modules.model.layers[0].mlp.up_proj
    modules.model.layers[0].mlp.up_proj = SparseLinear(pack(up.weight.detach()), None, own)
    with pytest.raises(SparseForgeError, match=r"no file may hold the layout planes of model\.layers\.0\.mlp\.up_proj"):
        sf.export(modules, tmp_path / "n.pt2", found.example, gate=False)
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


def test_measuring(sparse_llama, monkeypatch):
    found = sparse_llama
    measure = cost.measure
    monkeypatch.setattr(cost, "measure", lambda *a: measure(*a, rounds=2, seconds=1e-5))
    report = sf.lower(found.model, found.example, tokens=[1]).report
    assert len(report["table"]) == 4 and all(row["ratio"] > 0 for row in report["table"])
    assert len(report["sites"]) + sum(s["reason"].startswith("gate") for s in report["skipped"]) == 8


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "mlp"])
def test_other_models(captured_once, name):
    found = captured_once(name)
    sf.sparsify(found.model, example_inputs=found.example)
    fast = sf.lower(found.model, found.example, gate=False)
    batch = found.batch(rows=3)
    if isinstance(batch, dict):
        got, want = fast(**batch)[0], found.model(**batch)[0]
    else:
        got, want = fast(batch), found.model(batch)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_lowered_graph_compiles_in_one_piece(captured_once):
    found = captured_once("mlp")
    sf.sparsify(found.model, example_inputs=found.example)
    fast = sf.lower(found.model, found.example, gate=False)
    compiled = torch.compile(fast, fullgraph=True, dynamic=True)
    x = found.batch(rows=5)
    torch.testing.assert_close(compiled(x), found.model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to lower: 0.weight: not 2:4"),
        ({"tokens": []}, "token counts"),
        ({"target": "tpu"}, "unknown target"),
        ({"table": "no/such/file.json"}, "cannot be read: No such file"),
    ],
)
def test_what_is_refused(options, message):
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    if options:
        sf.sparsify(net, example_inputs=torch.randn(2, 8))
    with pytest.raises(SparseForgeError, match=message):
        sf.lower(net, torch.randn(2, 8), **options)
