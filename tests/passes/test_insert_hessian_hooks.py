"""Probes: values stay to the bit, their gradient is the curvature of section 3, summed over users and micro-batches."""

import io
from functools import partial

import pytest
import torch
from rounding import same_products
from torch.export.graph_signature import InputKind

from sparseforge_fx.graph.capture import capture
from sparseforge_fx.kernels.soft_masked_linear import OP
from sparseforge_fx.passes import find_linears, insert_hessian_hooks, run_passes, train_passes
from sparseforge_fx.passes.insert_hessian_hooks import probe_name
from sparseforge_fx.passes.insert_soft_masks import mask_name

SITES = {"up.weight", "down.weight", "twice.weight", "to_six.weight"}


@pytest.fixture
def masked(program):
    masked = run_passes(program, train_passes(find_linears(program)))[0]
    for site in SITES:
        masked.tensor(mask_name(site)).uniform_()
    return masked


@pytest.fixture
def probed(masked):
    return run_passes(masked, [insert_hessian_hooks])[0]


def test_operator_counts_and_probes(masked, probed, net):
    assert probed.op_counts() == masked.op_counts(), "a probe is an argument, not a node"
    assert all(n.args[4] is not None for n in probed.graph.find_nodes(op="call_function", target=OP))
    probes = {fqn: v for _, fqn, v in probed.lifted(InputKind.PARAMETER) if fqn.endswith("_probe")}
    assert set(probes) == {probe_name(s) for s in SITES}, "one per weight, ties once"
    for site in SITES:
        probe = probes[probe_name(site)]
        assert probe.shape == net.get_parameter(site).shape and probe.requires_grad and not probe.any()
        assert probe.untyped_storage().nbytes() == 4, "it takes the memory of one element"


def test_values_and_weight_gradients_stay(masked, probed, net, x):
    one, other = masked.module()(x), probed.module()(x)
    assert same_products(one, other)
    weights = list(net.parameters())
    expected = torch.autograd.grad(one.pow(3).sum(), weights)  # of squares it is constant after a norm
    assert all(map(same_products, torch.autograd.grad(other.pow(3).sum(), weights), expected))


def tokens_of(masked, x):
    """(input, output gradient) of every masked linear, by hooks on the unflattened reference: x and g per weight."""
    seen = {}
    recorder = torch.fx.Interpreter(masked.module())
    run_node = recorder.run_node

    def record(node):
        value = run_node(node)
        if node.target == OP:
            value.retain_grad()
            seen.setdefault(str(node.args[1].target), []).append((recorder.env[node.args[0]].detach(), value))
        return value

    recorder.run_node = record
    recorder.run(x).square().sum().backward()
    return seen


def test_a_probes_gradient_is_the_curvature_summed_over_users(masked, probed, x):
    module = probed.module()
    module(x).square().sum().backward()
    got = {n: p.grad for n, p in module.named_parameters() if n.endswith("_probe")}
    module.zero_grad()
    seen = tokens_of(masked, x)
    assert len(seen["twice.weight"]) == 3
    for site in SITES:
        expected = 0
        for inputs, output in seen[site]:
            for one, grad in zip(inputs.flatten(0, -2), output.grad.flatten(0, -2), strict=True):
                expected = expected + torch.outer(grad, one).square()
        expected = expected.t() if site == "down.weight" else expected
        torch.testing.assert_close(got[probe_name(site)], expected)


def test_the_activation_estimator_sums_squared_inputs(masked, x):
    probed = insert_hessian_hooks(masked.copy(), "activation").program
    probed.validate()
    module = probed.module()
    for part in x:  # micro-batches
        module(part[None]).sum().backward()
    for site, inputs in tokens_of(masked, x).items():
        probe = module.get_parameter(probe_name(site))
        assert probe.shape == inputs[0][0].shape[-1:]
        expected = sum(i.flatten(0, -2).square().sum(0) for i, _ in inputs)
        torch.testing.assert_close(probe.grad, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # rows as [batch, positions] and flattened
def test_the_activation_estimator_gets_the_mask_of_padding(tiny, name):
    found = tiny(name)
    ids = found.batch()["input_ids"]
    with_mask = capture(found.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for program, count in ((with_mask, 1), (found.program, 0)):
        masked = run_passes(program, train_passes(find_linears(program)))[0]
        for estimator, expected in (("activation", count), ("gauss_newton", 0)):
            probed, _ = run_passes(masked, [partial(insert_hessian_hooks, estimator=estimator)])
            for node in probed.graph.find_nodes(op="call_function", target=OP):
                assert [str(a) for a in node.args[6:]] == ["attention_mask"] * expected
    again = run_passes(probed, [insert_hessian_hooks])[1]
    assert all(record.modified == 0 for record in again)


def test_curvature_of_a_half_precision_model_does_not_underflow(net, x):
    for dtype, wanted in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.bfloat16)):
        program = capture(net.to(dtype), x.to(dtype))
        probed = run_passes(program, [*train_passes(find_linears(program)), insert_hessian_hooks])[0]
        assert probed.tensor(probe_name("up.weight")).dtype == wanted


def test_nothing_matches_nothing_changes(program):
    other = program.copy()
    code = other.exported.graph_module.code
    assert insert_hessian_hooks(other).modified == 0
    assert other.exported.graph_module.code == code


def test_a_second_run_changes_nothing(probed):
    code, state = probed.exported.graph_module.code, dict(probed.state)
    assert insert_hessian_hooks(probed).modified == 0
    probed.validate()
    assert probed.exported.graph_module.code == code and probed.state == state


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_save_reload_and_unflatten(probed, x):
    file = io.BytesIO()
    torch.export.save(probed.exported, file)
    file.seek(0)
    expected = probed.module()(x)
    assert same_products(torch.export.load(file).module()(x), expected)
    assert same_products(torch.export.unflatten(probed.exported)(x), expected)
