"""Experts in packed files: every matrix packed, the model's bits back, damage named."""

import json

import pytest
import torch

import sparseforge_fx as sf
from sparseforge_fx.deploy.checkpoints.packed_header import Header
from sparseforge_fx.deploy.lowering.sparse_modules import SparseExperts, packed_weights
from sparseforge_fx.errors import SparseForgeError


@pytest.fixture(params=["moe", "gpt_oss"])
def saved(tiny, request, tmp_path):
    found = tiny(request.param)
    sf.sparsify(found.model, method="magnitude", show_progress=False)
    report = sf.save_packed(found.model, None, tmp_path / "packed")
    return found, report, tmp_path / "packed"


def stacks(model):
    return {n: p for n, p in model.named_parameters() if p.dim() == 3}


def packed_stacks(model):
    return {n: m for n, m in packed_weights(model).items() if isinstance(m, SparseExperts)}


def test_the_bits_come_back(saved, tmp_path):
    found, report, folder = saved
    sites = {s["name"]: s for s in report["sites"] if "experts" in s}
    assert sites.keys() == stacks(found.model).keys()
    assert all(site["bytes"] == stacks(found.model)[n].nbytes * (1 / 2 + 1 / 32) for n, site in sites.items())
    assert report["lowered_bytes"] < 0.6 * report["dense_bytes"]
    again, _ = sf.load(folder)
    assert packed_stacks(again).keys() == sites.keys() and not stacks(again)
    for name, weight in stacks(found.model).items():
        assert torch.equal(packed_stacks(again)[name].to_dense(), weight)
    batch = found.batch(2)
    with torch.no_grad():
        expected = again(**batch).logits
        torch.testing.assert_close(expected, found.model(**batch).logits, rtol=1e-5, atol=1e-5)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    once_more, _ = sf.load(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(once_more(**batch).logits, expected)


def test_another_dtype(saved):
    found, _, folder = saved
    again, _ = sf.load(folder, dtype="bfloat16")
    for name, weight in stacks(found.model).items():
        assert torch.equal(packed_stacks(again)[name].to_dense(), weight.bfloat16())


def test_dense_again(saved):
    found, _, folder = saved
    again, _ = sf.load(folder)
    assert set(again.get_experts_implementation().values()) == {"sparseforge"}
    again.dequantize()
    assert not packed_stacks(again) and "sparseforge" not in again.get_experts_implementation().values()
    for name, weight in stacks(found.model).items():
        assert torch.equal(again.get_parameter(name), weight)
    batch = found.batch(2)
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, found.model(**batch).logits, rtol=1e-5, atol=1e-5)


def test_a_stack_of_an_unknown_module_is_dense_again(saved, monkeypatch):
    found, _, folder = saved
    monkeypatch.setattr("sparseforge_fx.deploy.checkpoints.packed_stacks.has_experts", lambda _: False)
    again, _ = sf.load(folder)
    for name, weight in stacks(found.model).items():
        assert torch.equal(again.get_parameter(name), weight) and again.get_parameter(name).requires_grad
    assert not any(n.endswith("proj_values") for n in again.state_dict())


def test_a_dense_stack_stays_and_says_so(tiny, tmp_path):
    found = tiny("moe")
    sf.sparsify(found.model, method="magnitude", exclude=["*.down_proj"], show_progress=False)
    report = sf.save_packed(found.model, None, tmp_path / "packed")
    reasons = {s["name"]: s["reason"] for s in report["skipped"]}
    (name,) = (n for n in stacks(found.model) if n.endswith("down_proj"))
    assert reasons[name].startswith("a stack of experts: not 2:4")
    assert torch.equal(sf.load(tmp_path / "packed")[0].get_parameter(name), found.model.get_parameter(name))


def test_files_without_stacks_keep_their_version(tiny, tmp_path):
    found = tiny("llama")
    sf.sparsify(found.model, method="magnitude", show_progress=False)
    sf.save_packed(found.model, None, tmp_path / "packed")
    header = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert header["format_version"] == 2 and "stacks" not in header


def change(of):
    """A change of one stack's entry."""

    def edit(header):
        name = min(header["stacks"])
        header["stacks"][name] |= of

    return edit


DAMAGE = {
    "no stacks": (lambda h: h.pop("stacks"), "lists no packed stacks"),
    "an older version": (lambda h: h.update(format_version=2), "unknown entry 'stacks'"),
    "stacks of no sense": (lambda h: h.update(stacks=[1]), "lists no packed stacks"),
    "an entry too many": (change({"more": 1}), "no shape, dtype, transposed"),
    "a shape of two": (change({"shape": [4, 8]}), "no shape, dtype, transposed"),
    "no experts": (change({"shape": [0, 64, 32]}), "no shape, dtype, transposed"),
    "a huge one": (change({"shape": [1 << 40, 64, 32]}), "but the header wants"),
    "six inputs": (change({"shape": [4, 6, 6]}), "no multiple of 4"),
    "a dtype": (change({"dtype": "int8"}), "has dtype 'int8'"),
    "an orientation": (change({"transposed": "yes"}), "is no parameter of a module"),
    "another name": (lambda h: h["stacks"].update({"a.b": h["stacks"].pop(min(h["stacks"]))}), "is missing from"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_headers(tiny, tmp_path, case):
    found = tiny("moe")
    sf.sparsify(found.model, method="magnitude", show_progress=False)
    folder = tmp_path / "packed"
    sf.save_packed(found.model, None, folder)
    config = json.loads((folder / "config.json").read_text())
    DAMAGE[case][0](config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparseForgeError, match=DAMAGE[case][1]):
        sf.load(folder)


def test_the_header_goes_through_json(saved):
    _, _, folder = saved
    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    header = Header.from_json(raw)
    assert header.to_json() == raw and len(header.stacks) == 2


def test_a_stack_the_other_way_round_is_refused(saved):
    """Its matrices may be square, so that shapes say nothing."""
    _, _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    for stack in config["quantization_config"]["stacks"].values():
        stack["transposed"] = not stack["transposed"]
        stack["shape"] = (
            [stack["shape"][0], *stack["shape"][:0:-1]] if stack["shape"][1] != stack["shape"][2] else stack["shape"]
        )
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparseForgeError, match="damaged"):
        sf.load(folder)
