"""Experts in few bits: stacks are packed under their modules, answer, go to files and come back."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparseforge_fx as sf
from sparseforge_fx.deploy.lowering.modules import replace
from sparseforge_fx.deploy.lowering.sparse_modules import PackedWeight, SparseExperts, packed_weights
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.packed import unpack

IDS = torch.randint(0, 64, (48, 24), generator=torch.Generator().manual_seed(3))


def fresh(tiny, kind="moe"):
    found = tiny(kind)
    return SimpleNamespace(model=copy.deepcopy(found.model), batch=found.batch)


@pytest.fixture(params=["moe", "gpt_oss"])
def found(tiny, request):
    return fresh(tiny, request.param)


def stacks_of(model):
    return {n: m for n, m in packed_weights(model).items() if isinstance(m, SparseExperts)}


def answers(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def reference(model):
    """The same model with the values that its codes stand for, dense."""
    dense = copy.deepcopy(model)
    for name, module in packed_weights(dense).items():
        replace(dense, name, module.to_dense())
    return dense


@pytest.mark.parametrize("values", ["int8", "int4", "int4/16"])
def test_every_stack_is_packed_and_answers_as_its_values_do(found, values):
    weights = {n: p.detach().clone() for n, p in found.model.named_parameters() if p.dim() == 3}
    report = sf.quantize(found.model, values)
    assert stacks_of(found.model).keys() == weights.keys()
    sites = {s["name"]: s for s in report["sites"]}
    for name, module in stacks_of(found.model).items():
        packed = module.packed()
        dense = unpack(packed).mT if module.transposed else unpack(packed)
        largest = weights[name].abs().max()
        assert dense.shape == weights[name].shape and (dense - weights[name]).abs().max() < largest / 7
        assert sites[name]["experts"] == 4 and sites[name]["format"].startswith(f"dense {values}")
    batch = found.batch(3, rows=3, length=7)
    dense = reference(found.model)
    assert not stacks_of(dense) and "sparseforge" not in dense.get_experts_implementation().values()
    want, got = answers(dense, batch), answers(found.model, batch)
    errors = (got - want).norm(dim=-1) / want.norm(dim=-1)
    assert float(errors.median()) < 0.05  # x in 8 bits; a token may go to another expert for it


def test_data_make_better_codes(tiny):
    found = fresh(tiny)
    batch = found.batch(5, rows=4, length=11)
    want = answers(found.model, batch)
    plain, walked = copy.deepcopy(found.model), found.model
    sf.quantize(plain, "int4")
    report = sf.quantize(walked, "int4", IDS, calibration=48)
    errors = [float((answers(m, batch) - want).norm()) for m in (plain, walked)]
    assert errors[1] < 0.9 * errors[0], errors
    assert not any("nearest" in note for note in report["notes"])


def test_experts_that_saw_too_few_tokens_are_named(found):
    report = sf.quantize(found.model, "int8", IDS[:1, :4], calibration=1, length=4)
    assert any("saw fewer than 32 calibration tokens: its own nearest values" in note for note in report["notes"])


def test_sparse_stacks_stay_sparse(found):
    sf.sparsify(found.model, method="magnitude", show_progress=False)
    sf.quantize(found.model, "int4")
    for module in stacks_of(found.model).values():
        assert str(module.format) == "2:4 int4/32"
        assert int((unpack(module.packed()) != 0).view(-1, 4).sum(1).max()) <= 2


def test_half_of_a_module_may_stay_dense(tiny):
    found = fresh(tiny)
    batch = found.batch(1)
    want = answers(found.model, batch)
    report = sf.quantize(found.model, "int8", include=["*.experts.down_proj"])
    assert [s["name"].rsplit(".", 1)[1] for s in report["sites"]] == ["down_proj"]
    got = answers(found.model, batch)
    assert 0 < float((got - want).norm() / want.norm()) < 0.05


def test_files_and_graphs(found, tmp_path):
    sf.quantize(found.model, "int4")
    batch = found.batch(2, rows=2, length=6)
    want = answers(found.model, batch)
    sf.save_packed(found.model, None, tmp_path / "packed")
    again, _ = sf.load(tmp_path / "packed")
    assert torch.equal(answers(again, batch), want)
    sf.save_packed(again, None, tmp_path / "again")
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("packed", "again")]
    assert files[0] == files[1]
    assert {str(m.format) for m in stacks_of(again).values()} == {"dense int4/32"}
    sf.export(again, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    other = found.batch(7, rows=3, length=9)
    torch.testing.assert_close(program(**other)["logits"], answers(again, other), rtol=1e-4, atol=1e-4)
    with pytest.raises(SparseForgeError, match="leave portable out"):
        sf.export(again, tmp_path / "other.pt2", portable=True)
    assert not (tmp_path / "other.pt2").exists()


def test_packages_of_aoti_have_packed_experts(tiny, tmp_path):
    found = fresh(tiny, "gpt_oss")  # with biases; compiling takes a while
    sf.quantize(found.model, "int4")
    sf.export(found.model, tmp_path / "package.pt2", format="aoti")
    package, other = torch._inductor.aoti_load_package(tmp_path / "package.pt2"), found.batch(7, rows=3, length=9)
    torch.testing.assert_close(package(**other)["logits"], answers(found.model, other), rtol=1e-4, atol=1e-4)


def test_two_of_four_stacks_run_under_their_modules(found):
    sf.sparsify(found.model, method="magnitude", show_progress=False)
    batch = found.batch(2)
    want = answers(found.model, batch)
    report = sf.lower_modules(found.model, gate=False)
    assert {s["name"] for s in report["sites"] if "experts" in s} == stacks_of(found.model).keys() != set()
    torch.testing.assert_close(answers(found.model, batch), want, rtol=1e-5, atol=1e-5)
    half = copy.deepcopy(found.model).bfloat16()
    assert answers(half, batch).dtype == torch.bfloat16
    torch.testing.assert_close(answers(half, batch).float(), want, rtol=0.1, atol=0.2)


def test_gradients_reach_what_is_around(tiny):
    found = fresh(tiny)
    sf.quantize(found.model, "int8", exclude=["*.embed_tokens*"])
    out = found.model(**found.batch(2)).logits
    out.square().mean().backward()
    assert found.model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_nothing_changes_if_it_fails(tiny, monkeypatch):
    found = fresh(tiny)
    before = {n: p.detach().clone() for n, p in found.model.named_parameters()}
    last = list(sf.quantize(copy.deepcopy(found.model), "int8")["sites"])[-1]["name"]

    def fail_at_the_last(model, name, module):
        return replace(model, name, module) if name != last or not isinstance(module, PackedWeight) else 1 / 0

    monkeypatch.setattr("sparseforge_fx.deploy.lowering.quantize.replace", fail_at_the_last)
    with pytest.raises(ZeroDivisionError):
        sf.quantize(found.model, "int8", IDS, calibration=8)
    assert not packed_weights(found.model)
    assert before.keys() == dict(found.model.named_parameters()).keys()
    for name, parameter in found.model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert "sparseforge" not in found.model.get_experts_implementation().values()


@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_other_implementations_say_what_computes_packed_experts(found, way):
    sf.quantize(found.model, "int8")
    found.model.set_experts_implementation(way)
    with pytest.raises((SparseForgeError, AttributeError), match="set_experts_implementation\\('sparseforge'\\)"):
        found.model(**found.batch(1))


def test_twice(tiny):
    found = fresh(tiny)
    sf.quantize(found.model, "int8")
    with pytest.raises(SparseForgeError, match="packed already"):
        sf.quantize(found.model, "int4")


def test_experts_alone_go_to_files_and_back(found, tmp_path):
    report = sf.quantize(found.model, "int8", include=["*.experts.*"])
    assert {s["name"] for s in report["sites"]} == packed_weights(found.model).keys() == stacks_of(found.model).keys()
    batch = found.batch(2)
    want = answers(found.model, batch)
    sf.save_packed(found.model, None, tmp_path / "packed")
    found.model.save_pretrained(tmp_path / "saved")
    for folder in ("packed", "saved"):
        for load in (lambda path: sf.load(path)[0], AutoModelForCausalLM.from_pretrained):
            assert torch.equal(answers(load(tmp_path / folder), batch), want)


@pytest.mark.parametrize("values", ["int8", "int4", "int4/16"])
def test_another_dtype_leaves_codes_and_scales(tiny, tmp_path, values):
    found = fresh(tiny)
    sf.quantize(found.model, values)
    sf.save_packed(found.model, None, tmp_path / "packed")
    again, _ = sf.load(tmp_path / "packed", dtype="bfloat16")
    for name, module in stacks_of(again).items():
        want, got = stacks_of(found.model)[name].packed(), module.packed()
        assert torch.equal(got.scales, want.scales) and torch.equal(got.values, want.values)
        assert module.dtype == torch.bfloat16
