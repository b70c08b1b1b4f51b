"""The gate of stacks of experts: it decides by the product of a stack and of as many experts as a token goes to, in a
graph and under modules alike, and by nothing else."""

import pytest
import torch
import transformers

import sparseforge_fx as sf
from sparseforge_fx.deploy.lowering import cost, cost_table, routings
from sparseforge_fx.deploy.lowering.lower import lower_captured
from sparseforge_fx.deploy.lowering.sparse_modules import packed_weights
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.kernels.sparse_experts import PACKED_EXPERTS_OP
from sparseforge_fx.pattern import TWO_FOUR, hard_mask

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1,
    "max_position_embeddings": 64, "head_dim": 16,
}  # fmt: skip
#: experts, chosen, and the width of an expert
MIXTRAL, QWEN3 = (4, 2, 48), (8, 3, 16)


def build(kind):
    torch.manual_seed(0)
    if kind is MIXTRAL:
        config = transformers.MixtralConfig(**SIZES, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2)
        model = transformers.MixtralForCausalLM(config)
    else:
        config = transformers.Qwen3MoeConfig(
            **SIZES, intermediate_size=64, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=3
        )
        model = transformers.Qwen3MoeForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 3:
            parameter.data *= hard_mask(parameter.detach().abs(), TWO_FOUR)
    return model.eval()


@pytest.fixture(scope="module", params=[MIXTRAL, QWEN3], ids=["mixtral", "qwen3_moe"])
def captured(request):
    model = build(request.param)
    return request.param, model, capture(model)


@pytest.fixture
def lowered(captured, monkeypatch):
    """Lower the graph, and modules of the same weights, by rows of a table; both must say the same of the stacks."""
    kind, model, program = captured
    monkeypatch.setattr(routings, "capture", lambda *_, **__: program)

    def lower(rows, **options):
        table = cost_table.as_table(rows)
        _, report = lower_captured(program, table=table, tokens=[1, 8], **options)
        before = {n: p for n, p in model.named_parameters() if p.dim() == 3}
        how = model.get_experts_implementation()
        try:
            other = sf.lower_modules(model, table=table, tokens=[1, 8], **options)
        finally:
            for name, parameter in before.items():
                owner = model.get_submodule(name.rpartition(".")[0])
                owner._modules.pop(name.rpartition(".")[2], None)
                owner.register_parameter(name.rpartition(".")[2], parameter)
            model.set_experts_implementation(how)
        return decisions(report), decisions(other)

    return kind, lower


def decisions(report):
    """By the last part of a stack's name: that it is packed, or the reason."""
    found = {s["name"].rpartition(".")[2]: "packed" for s in report["sites"] if "experts" in s}
    return found | {s["name"].rpartition(".")[2]: s["reason"] for s in report["skipped"] if "proj" in s["name"]
                    and "experts" in s["name"]}  # fmt: skip


def rows(out, width, ratio, routing):
    shape = cost_table.Shape(out, width, "float32", routing=routing)
    timing = lambda t: cost_table.Timing(shape, "rows", t, 10 * ratio, (9.0, 11.0), 10.0, (9.0, 11.0))  # noqa: E731
    return [timing(t) for t in (1, 8)]


def test_by_the_stacks_own_rows(lowered):
    (experts, chosen, wide), lower = lowered
    routing = cost_table.Routing(experts, chosen)
    table = [*rows(2 * wide, 32, 2.0, routing), *rows(32, wide, 0.5, routing)]
    table += [*rows(2 * wide, 32, 0.5, None), *rows(32, wide, 2.0, None)]  # a matrix of the same sides says otherwise
    expected = {"gate_up_proj": "packed", "down_proj": "gate: slower than dense at 1 tokens (0.50x)"}
    assert lower(table) == (expected, expected)


@pytest.mark.parametrize("routing", [None, "one more expert", "one more chosen"])
def test_a_table_that_lacks_them(lowered, routing):
    """A matrix of the same sides, and a stack with another routing, are other products."""
    (experts, chosen, wide), lower = lowered
    if routing is not None:
        routing = cost_table.Routing(experts + (routing == "one more expert"), chosen + (routing == "one more chosen"))
    expected = dict.fromkeys(("gate_up_proj", "down_proj"), "gate: not measured at 1, 8 tokens")
    assert lower([*rows(2 * wide, 32, 2.0, routing), *rows(32, wide, 2.0, routing)]) == (expected, expected)


def test_what_is_measured(captured, monkeypatch):
    (experts, chosen, wide), model, program = captured
    monkeypatch.setattr(routings, "capture", lambda *_, **__: program)
    asked = []

    def measure(shapes, tokens, *_):
        asked.extend(shapes)
        timing = lambda s, t: cost_table.Timing(s, "rows", t, 1.0, (1.0, 1.0), 9.0, (9.0, 9.0))  # noqa: E731
        return {s: {"rows": {t: timing(s, t) for t in tokens}} for s in shapes}

    monkeypatch.setattr(cost, "measure", measure)
    of = lambda out, width: cost_table.Shape(out, width, "float32", routing=cost_table.Routing(experts, chosen))  # noqa: E731
    for lower in (lambda: lower_captured(program, tokens=[1])[1], lambda: sf.lower_modules(model, tokens=[1])):
        report = lower()
        assert {s for s in asked if s.routing} == {of(2 * wide, 32), of(32, wide)}
        again = cost_table.as_table(map(cost_table.read_row, report["table"]))
        assert set(again) == set(asked) and not report["sites"]
        asked.clear()


def test_the_graph_of_packed_stacks(captured):
    (experts, chosen, wide), _, program = captured
    routing = cost_table.Routing(experts, chosen)
    table = cost_table.as_table([*rows(2 * wide, 32, 2.0, routing), *rows(32, wide, 0.5, routing)])
    made, _ = lower_captured(program, table=table, tokens=[1, 8])
    counts = made.op_counts()
    assert counts[str(PACKED_EXPERTS_OP)] == 1
    assert sum(n for name, n in counts.items() if "grouped_mm" in name) == 1


def test_where_the_model_cannot_be_captured(captured, monkeypatch):
    _, model, _ = captured

    def refuse(*_, **__):
        raise SparseForgeError("torch.export cannot take it")

    monkeypatch.setattr(routings, "capture", refuse)
    monkeypatch.setattr(cost, "measure", None)
    report = sf.lower_modules(model, tokens=[1])
    assert not report["sites"] and report["lowered_bytes"] == report["dense_bytes"]
    assert set(decisions(report).values()) == {
        "gate: how many experts a token goes to is not known (torch.export cannot take it): gate=False packs it untimed"
    }


def test_models_without_stacks_are_not_captured(monkeypatch):
    monkeypatch.setattr(routings, "capture", None)
    assert routings.find_routings(torch.nn.Linear(4, 4), {}) == ({}, {})


def test_half_a_model_is_packed_already():
    """One of its two stacks: the graph has the other's product still."""
    model = build(MIXTRAL)
    name = next(n for n, p in model.named_parameters() if n.endswith("down_proj") and p.dim() == 3)
    dense = model.get_parameter(name).detach().clone()
    model.get_parameter(name).data.fill_(1.0)
    sf.lower_modules(model, gate=False)
    assert len(packed_weights(model)) == 1
    model.get_parameter(name).data.copy_(dense)
    assert routings.find_routings(model, [name]) == ({name: (4, 2)}, {})


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = build(QWEN3)
    names = [n for n, p in model.named_parameters() if p.dim() == 3]
    assert routings.find_routings(model, names) == (dict.fromkeys(names, (8, 3)), {})
