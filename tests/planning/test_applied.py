"""What a plan says is what the files hold: plan, sparsify, quantize, save_packed, load."""

import copy

import pytest
import torch
from packed_models import GREEDY, IDS
from plan_tables import table_of_shares

import sparseforge_fx as sf
from sparseforge_fx.deploy.lowering.cost import formats_of
from sparseforge_fx.deploy.lowering.sparse_modules import packed_weights
from sparseforge_fx.formats import DENSE, Format
from sparseforge_fx.models.expert_stacks import find_expert_stacks
from sparseforge_fx.models.ties import tied_heads

TWO_FOUR = Format("2:4")
SHARES = {"2:4": 0.6, "dense int8": 0.5, "2:4 int8": 0.4, "dense int4/32": 0.45, "2:4 int4/32": 0.35}
SHARES |= {"dense int4/16": 0.46, "2:4 int4/16": 0.36}
SHARES |= {"dense int4/128": 0.44, "2:4 int4/128": 0.34}  # too wide for these models


def by_weight(model, formats):
    """A plan's formats by the linear that has the weight, or the stack's name."""
    owners = {id(p): n for n, p in model.named_parameters()}
    modules = {n: m for n, m in model.named_modules() if hasattr(m, "weight") and not isinstance(m, torch.nn.Embedding)}
    stacks = {n: formats[n] for n in find_expert_stacks(model)[0] if n in formats}
    linears = {n: owners[id(m.weight)] for n, m in modules.items() if owners.get(id(m.weight)) in formats}
    return stacks | {n: formats[weight] for n, weight in linears.items()}


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "vit", "moe", "gpt_oss"])
def test_a_plan_is_applied_and_loaded(captured_once, tmp_path, name):
    found = captured_once(name)
    assert {str(f) for f in formats_of(torch.device("cpu"))} == set(SHARES)
    data = [found.batch(seed) for seed in range(3)] if name != "vit" else [torch.randn(4, 3, 8, 8) for _ in range(3)]
    plan = sf.plan(found.model, data, speedup=2.4, table=table_of_shares(found.program, SHARES), calibration=6)
    sparse = [w for w in plan.weights if w.format.is_sparse]
    sparse[0].format, sparse[-1].format = TWO_FOUR, DENSE  # as an editor would
    assert {TWO_FOUR, DENSE} < set(plan.formats.values())
    model = copy.deepcopy(found.model)
    wanted = {n: f for n, f in by_weight(model, plan.formats).items() if f != DENSE}
    tied = tied_heads(model)
    result = sf.sparsify(model, data, method="sparsegpt", plan=plan, calibration=6)
    assert any("sf.quantize(model, plan=plan, data=data)" in n for n in result.report["notes"])
    report = sf.quantize(model, plan=plan, data=data, calibration=6)
    assert {s["name"]: s["format"] for s in report["sites"]} == {n: str(f) for n, f in wanted.items() if f.is_quantized}
    written = sf.save_packed(model, None, tmp_path / "packed")
    assert {s["name"]: s["format"] for s in written["sites"]} == {n: str(f) for n, f in wanted.items()}
    loaded, _ = sf.load(tmp_path / "packed")
    heads = {embedding: head for head, embedding in tied.items()}
    assert {heads.get(n, n): m.format for n, m in packed_weights(loaded).items()} == wanted
    assert not getattr(loaded.config, "tie_word_embeddings", False) or not wanted.keys() & tied.keys()
    inputs = data[0] if name == "vit" else IDS
    with torch.no_grad():
        want, got = model(inputs)[0], loaded(inputs)[0]
    assert (got - want).norm() < 0.01 * want.norm()  # packed floats are summed in another order
    if name != "vit":
        assert loaded.generate(IDS, **GREEDY).shape[1] == IDS.shape[1] + GREEDY["max_new_tokens"]
