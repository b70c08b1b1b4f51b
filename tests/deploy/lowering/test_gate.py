"""The gate: what it measures of the graph that it is asked about, what it gives, and the reasons that it leaves."""

import torch

from sparseforge_fx.deploy.lowering import cost_table
from sparseforge_fx.deploy.lowering.gate import Gate
from sparseforge_fx.kernels.layouts import PLANES, ROWS
from sparseforge_fx.passes import LinearSite


def sites():
    return [
        LinearSite("fast", (8, 16), torch.float32),
        LinearSite("slow", (16, 8), torch.float32),
        LinearSite("fast turned", (16, 8), torch.float32, transposed=True),
        LinearSite("head", (8, 16), torch.float32, reason="output layer (head)"),
    ]


def test_by_times():
    asked = []

    def measure(shapes):
        asked.extend(shapes)
        ratio = {8: 1.5, 16: 0.5}
        timing = lambda s: cost_table.Timing(s, "rows", 1, 10.0 * ratio[s.out_features], (9.0, 11.0), 10.0, (9.0, 11.0))  # noqa: E731
        return {s: {"rows": {1: timing(s)}} for s in shapes}

    gate, found = Gate([ROWS, PLANES], [1], measure), sites()
    assert gate(found) == {"fast": ROWS, "fast turned": ROWS}
    fast, slow = cost_table.Shape(8, 16, "float32"), cost_table.Shape(16, 8, "float32")
    assert asked == [fast, slow, fast] and set(gate.timings) == {fast, slow} and gate.sites == found
    assert [s.reason for s in found] == [
        None,
        "gate: slower than dense at 1 tokens (0.50x)",
        None,
        "output layer (head)",
    ]


def test_without_times_all_get_the_first_layout():
    gate, found = Gate([PLANES, ROWS], [1], None), sites()
    assert gate(found) == dict.fromkeys(("fast", "slow", "fast turned"), PLANES)
    assert gate.timings == {} and [s.fqn for s in gate.sites if s.reason] == ["head"]


def test_a_stack_is_asked_about_with_its_routing():
    asked = []
    measure = lambda shapes: asked.extend(shapes) or {}  # noqa: E731
    found = [LinearSite("stack", (4, 8, 16), torch.float32), LinearSite("matrix", (8, 16), torch.float32)]
    routing = cost_table.Routing(4, 2)
    gate = Gate([ROWS], [1], measure, {"stack": routing, "matrix": None})
    assert gate(found) == {} and {s.reason for s in found} == {"gate: not measured at 1 tokens"}
    matrix = cost_table.Shape(8, 16, "float32")
    assert asked == [matrix._replace(routing=routing), matrix]
