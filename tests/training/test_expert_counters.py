"""What each expert's curvature is of: counted as the model routes, over micro-batches and processes."""

import pytest
import torch
import transformers
from tiny_models import build, capture, find_linears, own_loop
from two_processes import run_two

import sparseforge_fx as sf
from sparseforge_fx.graph.compile import count_blocks
from sparseforge_fx.methods.curvature import Curvature
from sparseforge_fx.training.distillation import Distillation
from sparseforge_fx.training.expert_counters import ExpertCounters
from sparseforge_fx.training.sparse_model import SparseModel


def stacks(model):
    return [n for n, p in model.named_parameters() if p.dim() == 3]


def routed(model, batches):
    """Tokens of each expert, from the model's own router."""
    counts = torch.zeros(4, dtype=torch.int64)
    experts = next(m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "num_experts"))

    def see(module, args, kwargs):
        chosen = [*args, *kwargs.values()][1]
        counts.add_(torch.bincount(chosen.flatten(), minlength=4))

    handle = experts.register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return counts.tolist()


def labelled(found, seeds, rows=2):
    return [{**found.batch(seed, rows=rows), "labels": found.batch(seed, rows=rows)["input_ids"]} for seed in seeds]


MOE = ["gauss_newton", "fisher", "activation", "squared_gradient"]


@pytest.mark.parametrize(("name", "estimator"), [*(("moe", e) for e in MOE), ("gpt_oss", "gauss_newton")])
def test_tokens_are_counted_as_the_model_routes_them(captured_once, name, estimator):
    found = captured_once(name)
    batches = labelled(found, range(2))
    wanted = routed(found.model, [found.batch(seed, rows=2) for seed in range(2)])
    sparse = sf.prepare(found.model, config=sf.annealed_preset(8, curvature=estimator)).train()
    for batch in batches:
        sparse(**batch).loss.backward()
    assert set(sparse.method.tokens) == set(stacks(found.model))
    sparse.step()
    assert all(seen == wanted for seen in sparse.method.tokens.values())
    sparse.half()  # counters stay exact
    sparse.float()
    sparse.eval()(**batches[0])
    own_loop(sparse, batches[:1], lr=0.0)
    more = sum(next(iter(sparse.method.tokens.values()))) - sum(wanted)
    assert more == sum(wanted) / 2 and sum(wanted) == 2 * 2 * 12 * 2  # batches, rows, tokens, experts of each token
    sparse.release()


@pytest.mark.parametrize("estimator", ["gauss_newton", "squared_gradient"])
def test_blocks_that_are_compiled_and_computed_again_count_once(estimator):
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1, "intermediate_size": 16}
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **experts)).eval()
    ids = torch.randint(3, 97, (2, 12))
    sparse = sf.prepare(model, {"input_ids": ids}, sf.annealed_preset(8, curvature=estimator)).train()
    assert count_blocks(sparse.probe.module) == count_blocks(sparse.graph) == [("model.layers", 3)]
    sparse.activation_checkpointing_enable()
    sparse.compile(backend="aot_eager")
    for _ in range(2):
        sparse(input_ids=ids, labels=ids).loss.backward()
    sparse.step()
    assert len(sparse.method.tokens) == 6
    assert all(sum(seen) == 2 * 2 * 12 * 2 for seen in sparse.method.tokens.values())
    sparse.release()


def test_steps_that_do_not_estimate_count_nothing(captured_once):
    found = captured_once("moe")
    sparse = sf.prepare(found.model, config=sf.annealed_preset(8, probe_every=4))
    own_loop(sparse, labelled(found, range(3)), lr=0.0)
    assert all(sum(seen) == 2 * 12 * 2 for seen in sparse.method.tokens.values())
    sparse.release()


def test_models_without_experts_have_no_counters(captured_once):
    sparse = sf.prepare(captured_once("llama").model, config=sf.annealed_preset(8))
    assert sparse.method.tokens == {}
    sparse.release()


def test_where_nothing_is_estimated_nothing_is_counted():
    """A state that such a run saves is the same with and without counters in the graph."""
    curvature = Curvature(0.9, None)
    assert ExpertCounters({"w": torch.nn.Parameter(torch.zeros(4))}, curvature).parameters == curvature.tokens == {}


# -- several processes -----------------------------------------------------------------------------------------------
RANKS = """
import sys, torch
from test_expert_counters import counted
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.save(counted([rank]), f"{sys.argv[1]}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def counted(seeds):
    """Tokens by stack, and scores, after a step on these batches."""
    torch.manual_seed(0)
    model = build("moe").eval()
    program = capture(model, {"input_ids": torch.randint(3, 97, (2, 12))})
    sparse = SparseModel(program, find_linears(program), sf.annealed_preset(8, curvature="activation"), Distillation())
    for seed in seeds:
        ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(seed))
        sparse.train()(input_ids=ids, labels=ids).loss.backward()
    sparse.step()
    return dict(sparse.method.tokens)


@pytest.mark.slow
def test_two_processes_count_what_one_does(tmp_path):
    assert run_two(RANKS, tmp_path) == (alone := counted([0, 1]), alone)
