"""The lists that the product runs: which passes, in which order, by names that a log can print."""

import pytest
from rounding import same_products

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.passes import (
    deploy_passes,
    export_passes,
    find_linears,
    harden_passes,
    package_passes,
    run_passes,
    step_passes,
    train_passes,
)
from sparseforge_fx.passes.insert_hessian_hooks import probe_name
from sparseforge_fx.passes.insert_soft_masks import mask_name
from sparseforge_fx.pattern import TWO_FOUR


def none(sites):
    return {}


@pytest.mark.parametrize(
    ("passes", "names"),
    [
        (train_passes([]), ["insert_soft_masks"]),
        (train_passes([], slorb_block=4), ["insert_soft_masks", "insert_low_rank"]),
        (
            train_passes([], slorb_block=4, estimator="activation"),
            ["insert_soft_masks", "insert_low_rank", "insert_hessian_hooks"],
        ),
        (
            train_passes([], estimator="activation", counted=True),
            ["insert_soft_masks", "insert_hessian_hooks", "insert_expert_counters"],
        ),
        (train_passes([], counted=True), ["insert_soft_masks", "insert_expert_counters"]),
        (step_passes(), ["differentiate_attention"]),
        (harden_passes(TWO_FOUR), ["harden_masks"]),
        (
            deploy_passes(find_linears, none),
            ["merge_parallel_linears", "lower_sparse_linears", "fuse_epilogues"],
        ),
        (deploy_passes(find_linears, none, fuse=False), ["merge_parallel_linears", "lower_sparse_linears"]),
        (export_passes(), ["expand_sparse_linears"]),
        (package_passes("cpu"), ["lower_attention"]),
        (package_passes("cuda"), ["inline_kernels"]),
    ],
)
def test_orders(program, passes, names):
    assert [record.name for record in run_passes(program, passes)[1]] == names


def test_the_probed_twin_stands_over_the_same_masks_and_branches(program, x):
    sites = find_linears(program)
    masked, _ = run_passes(program, train_passes(sites, slorb_block=4))
    probed, records = run_passes(masked, train_passes(sites, slorb_block=4, estimator="gauss_newton"))
    assert [record.modified for record in records] == [0, 0, 6]
    assert all(probed.state[fqn] is value for fqn, value in masked.state.items())
    assert set(probed.state) - set(masked.state) == {probe_name(s.fqn) for s in sites if mask_name(s.fqn) in masked.state}
    assert same_products(probed.module()(x), masked.module()(x))


def test_sites_are_found_and_layouts_chosen_when_their_pass_runs(program):
    asked = []

    def find(graph):
        asked.append(("find", graph.op_counts()["aten.linear.default"]))
        return []

    def choose(sites):
        asked.append(("choose", sites))
        return {}

    passes = deploy_passes(find, choose)
    assert asked == []
    run_passes(program, passes)
    linears = program.op_counts()["aten.linear.default"]
    assert asked == [("find", linears), ("find", linears), ("choose", [])]


def test_an_estimator_without_probes_is_refused(program):
    with pytest.raises(SparseForgeError, match="no probe gives the estimator 'hutchinson': choose gauss_newton or act"):
        run_passes(program, train_passes([], estimator="hutchinson"))
