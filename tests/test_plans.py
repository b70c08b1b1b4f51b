"""A plan as data: through a file and by hand, its totals, and files that lie."""

import json
import math

import pytest

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import DENSE, parse_format
from sparseforge_fx.plans import Plan, PlannedWeight, Price
from sparseforge_fx.report import environment

SPARSE, INT8 = parse_format("2:4"), parse_format("dense int8")


def made(machine=None):
    prices = {
        DENSE: Price(0.0, 4000.0, {1: 10.0, 8: 20.0}),
        SPARSE: Price(0.5, 2250.0, {1: 5.0, 8: 16.0}),
        INT8: Price(0.1, 1000.0, {1: 4.0, 8: 20.0}),
    }
    names = ("a.0.up.weight", "a.1.up.weight", "head.weight")
    forms = (SPARSE, SPARSE, INT8)
    weights = [PlannedWeight(n, (32, 32), f, dict(prices)) for n, f in zip(names, forms, strict=True)]
    return Plan(weights, (1, 8), {"speedup": 1.5}, machine, 2, {"torch": "2"}, {"router": "router"}, ["a note"])


def test_totals():
    plan = made()
    assert plan.speedups == {1: 30 / 14, 8: 60 / 52}
    assert plan.speedup == pytest.approx(math.sqrt(30 / 14 * 60 / 52))
    assert plan.bytes == 5500 / 12000 and plan.loss == pytest.approx(1.1)
    assert plan.formats == {"a.0.up.weight": SPARSE, "a.1.up.weight": SPARSE, "head.weight": INT8}


def test_printed_as_a_table():
    lines = str(made()).splitlines()
    assert lines[1].split() == ["a.*.up.weight", "32", "x", "32", "2:4", "2", "1.0000", "0.00", "10", "32"]
    assert lines[3] == "linears: 2.14x at 1, 1.15x at 8 tokens; 45.8% of the dense bytes; loss +1.1000 nats predicted"
    assert lines[4] == "a note"


def test_through_a_file_and_changed_by_hand(tmp_path):
    path = tmp_path / "plan.json"
    made().save(path)
    assert Plan.read(path) == made()
    content = json.loads(path.read_text())
    content["weights"][2]["format"] = "dense"
    path.write_text(json.dumps(content))
    edited = Plan.read(path)
    assert edited.speedups[1] == 30 / 20 and edited.loss == 1.0  # the prices of dense stand beside it
    content["weights"][2]["format"] = "2:4 int4"
    path.write_text(json.dumps(content))
    unpriced = Plan.read(path)
    assert str(unpriced.formats["head.weight"]) == "2:4 int4/32"
    assert math.isnan(unpriced.speedup) and math.isnan(unpriced.bytes) and math.isnan(unpriced.loss)
    assert "nan" in str(unpriced)


def test_another_machine_is_refused_and_named():
    made().check_machine()
    made(environment()["device"]).check_machine()
    with pytest.raises(
        SparseForgeError, match=r"the plan was measured on Z80 and this is .*: plan again here, or set its"
    ):
        made("Z80").check_machine()


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda p: p.update(version=9), "a plan is a mapping with version 1"),
     (lambda p: p.pop("tokens"), "lacks or garbles an entry: KeyError 'tokens'"),
     (lambda p: p.update(weights=[]), "a plan has weights"),
     (lambda p: p.update(machine=3), "as machine a text or null"),
     (lambda p: p["weights"][1].update(name="a.0.up.weight"), "names a.0.up.weight twice"),
     (lambda p: p["weights"][1].update(group=5), "name and group are names of weights"),
     (lambda p: p["weights"][0].update(format="3:4"), "a.0.up.weight: '3:4' is no format"),
     (lambda p: p["weights"][0].update(shape=[32, 30]), "a.0.up.weight of the plan cannot be 2:4: 30 inputs"),
     (lambda p: p["weights"][0].update(shape=[32]), "a.0.up.weight of the plan: its shape is out and in, of a stack"),
     (lambda p: p["weights"][0].update(shape=[2, 2, 8, 8]), "a.0.up.weight of the plan: its shape is out and in"),
     (lambda p: p["weights"][0].update(shape=[0, 8, 8]), "a.0.up.weight of the plan: its shape is out and in"),
     (lambda p: p["weights"][0].update(shape=7), "a.0.up.weight of the plan: TypeError"),
     (lambda p: p["weights"][0].update(shape=[4, 32, 30]), "a.0.up.weight of the plan cannot be 2:4: 30 inputs"),
     (lambda p: p["weights"][0]["prices"].pop("dense"), "a.0.up.weight of the plan has no price as dense"),
     (lambda p: p["weights"][0]["prices"]["2:4"].update(loss=-1), "a.0.up.weight of the plan: ValueError '-1'"),
     (lambda p: p["weights"][0]["prices"]["2:4"]["us"].pop("8"), "a.0.up.weight of the plan: KeyError '8'")],
)  # fmt: skip
def test_files_that_lie(tmp_path, change, message):
    content = json.loads(json.dumps(made().describe()))
    change(content)
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(SparseForgeError, match=message) as caught:
        Plan.read(tmp_path / "plan.json")
    assert "\n" not in str(caught.value)


def stacks(chosen):
    plan = made()
    plan.weights = [PlannedWeight(w.name, (4, 32, 32), w.format, w.prices, w.group, chosen) for w in plan.weights]
    return plan


def test_how_many_experts_a_token_goes_to(tmp_path):
    """It stands with a stack; a matrix has no such entry, nor have the stacks of older files."""
    for plan in (stacks(2), stacks(None)):
        plan.save(tmp_path / "plan.json")
        assert Plan.read(tmp_path / "plan.json") == plan
    assert [w.get("chosen") for w in stacks(2).describe()["weights"]] == [2, 2, 2]
    assert not any("chosen" in w for w in made().describe()["weights"])


@pytest.mark.parametrize("chosen", [0, 5, "2", 1.5, True])
def test_what_is_no_number_of_experts(chosen):
    with pytest.raises(SparseForgeError, match="weight of the plan: chosen is a number of experts, of a stack"):
        Plan.from_plain(stacks(chosen).describe())
    matrix = made().describe()
    matrix["weights"][0]["chosen"] = 1
    with pytest.raises(SparseForgeError, match="weight of the plan: chosen is a number of experts, of a stack"):
        Plan.from_plain(matrix)


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000])
def test_files_that_are_no_plan(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(SparseForgeError, match=r"plan\.json"):
        Plan.read(tmp_path / "plan.json")
    with pytest.raises(SparseForgeError, match="cannot be read: No such file"):
        Plan.read(tmp_path / "none.json")
