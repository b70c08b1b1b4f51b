"""Lowered mixtures of experts: packed stacks in the graph, the model's answers, and files that say why not."""

import pytest
import torch

import sparseforge_fx as sf
from sparseforge_fx.kernels.sparse_experts import PACKED_EXPERTS_OP
from sparseforge_fx.passes import find_linears
from sparseforge_fx.passes.lower_sparse_linears import keep_dense


@pytest.fixture(params=["moe", "gpt_oss"])
def pruned(tiny, request):
    found = tiny(request.param)
    sf.sparsify(found.model, method="magnitude", show_progress=False)
    return found


def test_stacks_are_packed(pruned):
    batch = pruned.batch(3, rows=3, length=7)
    with torch.no_grad():
        expected = pruned.model(**batch).logits
    fast = sf.lower(pruned.model, gate=False)
    assert len(fast.graph.find_nodes(op="call_function", target=PACKED_EXPERTS_OP)) == 2
    with torch.no_grad():
        torch.testing.assert_close(fast(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    stacks = {n: p for n, p in pruned.model.named_parameters() if p.dim() == 3}
    assert stacks and not any(n in dict(fast.named_parameters()) for n in stacks)
    sites = {s["name"]: s for s in fast.report["sites"] if "experts" in s}
    assert sites.keys() == stacks.keys()
    for name, site in sites.items():
        assert site["experts"] == 4 and site["bytes"] == stacks[name].nbytes * (1 / 2 + 1 / 32)
    assert fast.report["lowered_bytes"] < 0.6 * fast.report["dense_bytes"]


def test_where_stacks_are_not_packed_they_have_a_reason(pruned, tmp_path):
    reasons = {s.fqn: s.reason for s in keep_dense(pruned.program, find_linears(pruned.program)) if s.experts}
    assert set(reasons.values()) == {"experts stay dense here: only sf.lower packs them"}
    path = tmp_path / "model.pt2"
    report = sf.export(pruned.model, path, pruned.example)
    skipped = {s["name"]: s["reason"] for s in report["skipped"]}
    assert all("experts stay dense here" in skipped[name] for name in reasons)


def test_a_stack_that_is_not_two_of_four_stays(tiny):
    found = tiny("moe")
    sf.sparsify(found.model, method="magnitude", exclude=["*.experts.down_proj"], show_progress=False)
    fast = sf.lower(found.model, gate=False)
    assert len(fast.graph.find_nodes(op="call_function", target=PACKED_EXPERTS_OP)) == 1
    skipped = {s["name"]: s["reason"] for s in fast.report["skipped"]}
    assert any(n.endswith("down_proj") and "not 2:4" in r for n, r in skipped.items())
