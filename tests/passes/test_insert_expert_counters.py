"""Counters: values stay to the bit, their gradient is how many rows each expert got."""

import pytest
import torch

from sparseforge_fx.kernels.soft_masked_experts import EXPERTS_OP
from sparseforge_fx.passes import find_linears, insert_expert_counters, run_passes, train_passes
from sparseforge_fx.passes.insert_expert_counters import PLACE, counter_name, counters_of
from sparseforge_fx.pattern import TWO_FOUR


def stacks(model):
    return [n for n, p in model.named_parameters() if p.dim() == 3]


@pytest.fixture
def masked(tiny):
    found = tiny("moe")
    return found, run_passes(found.program, train_passes(find_linears(found.program)))[0]


def test_one_counter_for_each_stack(masked):
    found, program = masked
    twin, (record,) = run_passes(program, [insert_expert_counters])
    assert twin.op_counts() == program.op_counts(), "a counter is an argument, not a node"
    module = twin.module()
    counters = counters_of(module, stacks(found.model))
    assert set(counters) == set(stacks(found.model)) and record.modified == len(counters)
    assert all(p.shape == (4,) and p.untyped_storage().nbytes() == 4 for p in counters.values())
    assert not any(counter_name(fqn) in program.state for fqn in counters), "the program before it is untouched"
    batch = found.batch()
    assert torch.equal(module(**batch)[0], program.module()(**batch)[0])
    module(**batch)[0].sum().backward()
    tokens = batch["input_ids"].numel()
    for counter in counters.values():
        assert counter.grad.sum() == 2 * tokens and counter.grad.min() >= 0  # two experts for each token
    assert len({tuple(c.grad.tolist()) for c in counters.values()}) == 1  # both stacks of the layer see the same rows


def test_a_second_time_nothing_happens(masked):
    _, program = masked
    once, _ = run_passes(program, [insert_expert_counters])
    again, (record,) = run_passes(once, [insert_expert_counters])
    assert record.modified == 0 and again.op_counts() == once.op_counts()
    nodes = [n for n in again.graph.nodes if n.target == EXPERTS_OP]
    assert nodes and all(len(n.args) == PLACE + 1 for n in nodes)


def test_beside_probes_each_hears_its_own(masked):
    found, _ = masked
    sites = find_linears(found.program)
    twin, _ = run_passes(found.program, train_passes(sites, estimator="gauss_newton", counted=True))
    alone, _ = run_passes(found.program, train_passes(sites, estimator="gauss_newton"))
    batch, grads = found.batch(), []
    for program in (twin, alone):
        module = program.module()
        module(**batch)[0].square().sum().backward()
        grads.append({n: p.grad for n, p in module.named_parameters() if n.endswith("_probe")})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0] if grads[0][n] is not None)


def test_without_experts_there_is_nothing_to_count(tiny):
    program = tiny("llama").program
    masked, _ = run_passes(program, train_passes(find_linears(program, TWO_FOUR)))
    assert run_passes(masked, [insert_expert_counters])[1][0].modified == 0
