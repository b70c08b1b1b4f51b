"""Blocks that learn to hand on what the dense ones do: against a loop over the model's own layers, masks kept, what is
not theirs untouched."""

import copy

import pytest
import torch
from tiny_models import build, seq2seq, t5
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods import schedule
from sparseforge_fx.pattern import TWO_FOUR, check_pattern

HOW = {"batch_size": 2, "show_progress": False}


def text(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 97, (2, 12), generator=generator)} for _ in range(count)]


def model(name="llama"):
    """With two layers, so that there is something that repeats."""
    config = copy.deepcopy((built := build(name)).config)
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = 2 * config.layer_types[:1]
    torch.manual_seed(0)
    return type(built)(config).eval()


def by_hand(dense, sparse, batches, epochs, lr):
    """The same over Hugging Face's own layers; gradients of pruned weights are not taken at all."""
    rotary = LlamaRotaryEmbedding(dense.config)
    inputs = [dense.model.embed_tokens(b["input_ids"]).detach() for b in batches]
    aims, positions = list(inputs), torch.arange(12)[None]
    for layer, other in zip(sparse.model.layers, dense.model.layers, strict=True):
        how = {"position_embeddings": rotary(inputs[0], positions), "attention_mask": None}
        aims = [other(x, **how).detach() for x in aims]
        kept = {p: p.detach() != 0 for p in layer.parameters()}
        optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        steps = epochs * len(batches)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * schedule.learning_rate((step + 1) / (steps + 1), 0.05, 0.0)
            k = step % len(batches)
            ((layer(inputs[k], **how) - aims[k]).square().sum() / aims[k].square().sum()).backward()
            for p, mask in kept.items():
                p.grad *= mask
            optimizer.step()
            optimizer.zero_grad()
        inputs = [layer(x, **how).detach() for x in inputs]


def test_as_by_hand_over_the_models_own_layers():
    dense, sparse, ours = model(), model(), model()
    sf.sparsify(sparse, text(), method="wanda", calibration=8, **HOW)
    by_hand(dense, sparse, text(), 3, 1e-3)
    options = {"reconstruct": 3, "reconstruct_lr": 1e-3}
    report = sf.sparsify(ours, text(), method="wanda", calibration=8, **options, **HOW).report
    for (name, found), expected in zip(ours.named_parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=name)
    assert [b["block"] for b in report["reconstruction"]] == ["model.layers.0", "model.layers.1"]
    assert all(b["after"] < b["before"] for b in report["reconstruction"])


@pytest.mark.parametrize("name", ["opt", "gpt2", "moe", "gpt_oss", "bert"])
def test_every_shape_of_block_comes_nearer_and_stays_sparse(name):
    net = model(name)
    outside = {n: p.clone() for n, p in net.named_parameters() if "embed" in n or "wte" in n or "head" in n}
    result = sf.sparsify(net, text(), method="sparsegpt", calibration=8, reconstruct=3, **HOW)
    assert result.report["reconstruction"]
    assert all(b["after"] < b["before"] for b in result.report["reconstruction"])
    parameters = dict(net.named_parameters())
    for site in result.report["sites"]:
        weight = parameters[site["name"]]
        assert any(check_pattern(weight, TWO_FOUR, dim) for dim in (-1, -2))
    assert all(torch.equal(parameters[n], before) for n, before in outside.items())


@pytest.mark.parametrize("lr", [30.0, 1e30])  # worse, and not a number
def test_a_block_that_comes_no_nearer_keeps_its_solution(lr):
    plain, net = model(), model()
    sf.sparsify(plain, text(), method="sparsegpt", calibration=8, **HOW)
    report = sf.sparsify(net, text(), method="sparsegpt", calibration=8, reconstruct=1, reconstruct_lr=lr, **HOW).report
    assert [b["after"] for b in report["reconstruction"]] == [b["before"] for b in report["reconstruction"]]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))
    assert any(note.startswith("2 of 2 blocks came no nearer") for note in report["notes"])


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # weights of either orientation
@pytest.mark.parametrize("values", ["int4", "int8"])
def test_rounded_weights_learn_on_their_grid(name, values):
    plain, net = model(name), model(name)
    how = {"method": "sparsegpt", "calibration": 8, "values": values, **HOW}
    first = sf.sparsify(plain, text(), **how)
    result = sf.sparsify(net, text(), reconstruct=3, **how)
    assert all(b["after"] < b["before"] for b in result.report["rounded_reconstruction"])
    assert set(result.scales) == set(first.scales)
    moved = 0
    for fqn, scale in result.scales.items():
        dim = 0 if name == "gpt2" else 1
        weight = net.get_parameter(fqn).detach().movedim(dim, -1)
        codes = weight / scale.float().repeat_interleave(weight.shape[1] // scale.shape[1], 1)
        assert (codes - codes.round()).abs().max() < 1e-3 and codes.abs().max() < (8.1 if values == "int4" else 127.1)
        assert check_pattern(weight, TWO_FOUR)
        moved += int((scale != first.scales[fqn]).sum())
    assert moved  # scales learn, too
    packed = copy.deepcopy(net)
    sf.quantize(packed, values, scales=result.scales, dense=False)
    for fqn in result.scales:
        module = packed.get_submodule(fqn.removesuffix(".weight"))
        assert torch.equal(module.weight, net.get_parameter(fqn).movedim(0 if name == "gpt2" else 1, -1))


def test_rounded_blocks_that_come_no_nearer_keep_codes_and_scales():
    plain, net = model(), model()
    how = {"method": "sparsegpt", "calibration": 8, "values": "int4", **HOW}
    first = sf.sparsify(plain, text(), **how)
    result = sf.sparsify(net, text(), reconstruct=1, reconstruct_lr=30.0, **how)
    assert all(b["after"] == b["before"] for b in result.report["rounded_reconstruction"])
    assert any(note.startswith("rounded: 2 of 2 blocks came no nearer") for note in result.report["notes"])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True))
    assert all(torch.equal(scale, first.scales[fqn]) for fqn, scale in result.scales.items())


def test_a_run_goes_on_from_what_rounded_blocks_learned():
    net, begun = model(), model()
    how = {"preset": "alps+kd", "reconstruct": 2, "values": "int4", "steps": 1, "calibration": 8, **HOW}
    result = sf.sparsify(net, text(), lr=1e-12, **how)
    assert all(b["after"] < b["before"] for b in result.report["rounded_reconstruction"])
    alone = sf.sparsify(begun, text(), method="alps", calibration=8, reconstruct=2, reorder=True, values="int4", **HOW)
    for fqn, scale in alone.scales.items():
        assert torch.equal(scale, result.scales[fqn])
        torch.testing.assert_close(net.get_parameter(fqn), begun.get_parameter(fqn), rtol=1e-4, atol=1e-5)


def test_before_training_it_is_part_of_the_start():
    net = model()
    result = sf.sparsify(net, text(), start="alps", reconstruct=2, reorder=True, steps=2, calibration=8, **HOW)
    assert len(result.report["reconstruction"]) == 2
    assert all(b["after"] < b["before"] for b in result.report["reconstruction"])


def test_what_is_frozen_stays():
    net = model()
    for layer in net.model.layers:
        frozen = layer.self_attn.q_proj.weight.requires_grad_(False)
    plain = copy.deepcopy(net)
    sf.sparsify(plain, text(), method="wanda", calibration=8, **HOW)
    sf.sparsify(net, text(), method="wanda", calibration=8, reconstruct=2, **HOW)
    assert torch.equal(frozen, plain.model.layers[1].self_attn.q_proj.weight)
    assert not torch.equal(net.model.layers[0].mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight)


def padded(token):
    batches = text()
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, 7:] = 0
        batch["input_ids"][0, 7:] = token
    return batches


def test_padding_has_no_part():
    found = []
    for token in (0, 50):
        net = model()
        sf.sparsify(net, padded(token), method="wanda", calibration=8, reconstruct=2, **HOW)
        found.append(net.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_an_encoder_and_a_decoder_have_masks_of_their_own():
    report = sf.sparsify(t5(), [seq2seq()], method="wanda", reconstruct=2, **HOW).report
    assert {b["block"].split(".")[0] for b in report["reconstruction"]} == {"encoder", "decoder"}
    assert all(b["after"] < b["before"] for b in report["reconstruction"])


def test_where_no_block_repeats_the_report_says_so():
    torch.manual_seed(0)
    net = build("mlp")
    report = sf.sparsify(net, [torch.randn(4, 16)], method="wanda", reconstruct=2, **HOW).report
    assert report["reconstruction"] == []
    assert any("reconstruct changes nothing" in note for note in report["notes"])


def test_masks_that_are_not_final_are_refused():
    with pytest.raises(SparseForgeError, match="masks that are final"):
        sf.sparsify(model(), text(), preset="annealed", reconstruct=1, steps=2, **HOW)
