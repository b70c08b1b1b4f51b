"""Backwards that a graph does not have are named."""

import torch
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.graph.capture import capture


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


class Rounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(Round.apply(Round.apply(self.a(x))))


def test_functions_and_hooks():
    model, x, apply = Rounded(), torch.randn(3, 8), torch.autograd.Function.__dict__["apply"]
    (note,) = capture(model, x).notes
    assert note.startswith("the backward of Round is not in the graph")
    assert torch.autograd.Function.__dict__["apply"] is apply
    model.b.register_full_backward_hook(lambda *_: None)
    model.register_full_backward_pre_hook(lambda *_: None)
    assert capture(model, x).notes[1] == "backward hooks are not in the graph, and not called: of the model and 1 more"
    assert capture(nn.Linear(8, 8), x).notes == ()


def test_a_report_has_them():
    found = sf.sparsify(Rounded(), [torch.randn(4, 8)] * 2, method="sr-ste", steps=2, show_progress=False)
    assert any("the backward of Round" in note for note in found.report["notes"])
    plan = sf.plan(Rounded(), [torch.randn(4, 8)] * 2, bytes=0.6, tokens=[1])
    assert any("the backward of Round" in note for note in plan.notes)
    assert "no gradient of the answers reaches a.weight: nothing is predicted to cost there" in plan.notes
