"""A weight whose memory something else in the model sees is not to be changed in place."""

import copy

import pytest
import torch
from torch import nn

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.passes import find_linears
from sparseforge_fx.passes.aliases import Aliases, Elsewhere
from sparseforge_fx.training.prepare import check_sites


class Head(nn.Module):
    """Two linears and whatever a test hangs on them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.idle = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(self.a(x).relu()).sin()


def buffer(model, value, persistent=True):
    model.b.register_buffer("copy", value, persistent=persistent)


def other_parameter(model, value):
    model.idle.weight = nn.Parameter(value)


def table(value):
    embedding = nn.Embedding(8, 8)
    embedding.weight = value
    return embedding


SHARED = {
    "a buffer": (lambda m, w: buffer(m, w.detach()), "attribute copy of module b"),
    "a buffer that is not saved": (lambda m, w: buffer(m, w.data, persistent=False), "attribute copy of module b"),
    "an attribute": (lambda m, w: setattr(m, "w_copy", w.data), "attribute w_copy of the model"),
    "a view": (lambda m, w: setattr(m.a, "first_row", w.detach()[0]), "attribute first_row of module a"),
    "a transposed view": (lambda m, w: setattr(m, "w_t", w.detach().t()), "attribute w_t of the model"),
    "a list": (lambda m, w: setattr(m, "seen", [1, [w]]), "attribute seen.1.0 of the model"),
    "a dict": (lambda m, w: setattr(m, "seen", {"x": (w.detach(),)}), "attribute seen.x.0 of the model"),
    "a parameter outside the graph": (lambda m, w: other_parameter(m, w.detach()), "parameter weight of module idle"),
    "the parameter itself, in a table": (
        lambda m, w: setattr(m, "table", table(w)),
        "parameter weight of module table",
    ),
    "the parameter itself, by another name": (lambda m, w: setattr(m.idle, "old", w), "parameter old of module idle"),
    "a module in a list": (lambda m, w: setattr(m, "kept", [table(w)]), "parameter weight of module kept.0"),
    "a part of a parameter": (lambda m, w: other_parameter(m, w.detach()[:4]), "another tensor or with itself"),
}


@pytest.mark.parametrize("kind", SHARED)
def test_refused_with_what_shares(kind):
    share, expected = SHARED[kind]
    model = Head()
    share(model, model.a.weight)
    program = capture(model, torch.randn(2, 8))
    reasons = {s.fqn: s.reason for s in find_linears(program)}
    assert reasons["a.weight"] == f"shares memory with {expected}"
    assert reasons["b.weight"] is None
    only = find_linears(program, include=["a"])
    with pytest.raises(SparseForgeError, match=f"a.weight: shares memory with {expected}"):
        check_sites(program, only)


def test_copies_ties_and_neighbours_are_no_aliases():
    model = Head()
    model.w_copy = copy.deepcopy(model.a.weight.data)
    model.idle.weight = model.a.weight  # a tie: the same Parameter, listed as such
    model.again = model.a
    flat = torch.randn(2, 8, 8)  # neighbours in one storage
    model.b.weight, model.other = nn.Parameter(flat[0]), flat[1]
    sites = {s.fqn: s for s in find_linears(capture(model, torch.randn(2, 8)))}
    assert sites["a.weight"].reason is None and set(sites["a.weight"].ties) >= {"idle.weight"}
    assert sites["b.weight"].reason is None


def test_attributes_that_lead_to_each_other_and_to_registered_modules():
    model = Head()
    model.b.before, model.settings = [model.a], {"head": [model.b]}
    model.settings["me"] = model.settings
    aliases = Aliases(model, {"a.weight", "b.weight"})
    assert aliases.of(model.a.weight, "a.weight") is None and aliases.of(model.b.weight, "b.weight") is None
    model.settings["x"] = model.a.weight.data
    found = Aliases(model, {"a.weight"}).of(model.a.weight, "a.weight")
    assert found == "attribute settings.x of the model"


def test_tensors_without_one_storage_are_passed_over():
    model = Head()
    model.register_buffer("adjacency", torch.eye(4).to_sparse())
    model.links = nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False)
    assert Aliases(model, {"a.weight"}).of(model.a.weight, "a.weight") is None


def test_on_the_meta_device():
    with torch.device("meta"):
        model, x = Head(), torch.randn(2, 8)
    model.w_copy = model.a.weight.data
    reasons = {s.fqn: s.reason for s in find_linears(capture(model, x))}
    assert reasons["a.weight"] == "shares memory with attribute w_copy of the model" and reasons["b.weight"] is None


@pytest.mark.parametrize("held", ["module", "in a list", "attribute", "buffer", "flattened", "narrow", "integer"])
def test_what_the_graph_does_not_read_is_found_by_its_width(held):
    model = Head()
    del model.idle
    name = {"module": "other.weight", "in a list": "others.0.weight", "flattened": "other.weight"}.get(held, "other")
    if held in ("module", "flattened", "narrow"):
        model.other = nn.Linear({"module": 8, "flattened": 24, "narrow": 3}[held], 5, bias=False)
    elif held == "in a list":
        model.others = [nn.Linear(8, 5, bias=False)]
    elif held == "attribute":
        model.other = torch.ones(8)
    else:
        model.register_buffer("other", torch.ones(8) if held == "buffer" else torch.arange(8))
    program = capture(model, torch.randn(3, 8))
    told = Elsewhere(program).may_see(8)
    assert (told is None) == (held in ("narrow", "integer"))
    assert told is None or told.startswith(f"{name}, which the captured forward does not read")
    assert Elsewhere(program, ["other*"]).may_see(8) is None


def test_ties_and_copies_elsewhere():
    model = Head()
    model.idle.weight = model.a.weight  # a tie is no other weight
    program = capture(model, torch.randn(3, 8))
    assert set(Elsewhere(program).unread) == {"idle.bias"}
    assert Elsewhere(program).shares({"a.weight": model.a.weight}) is None
    model.copied = model.a.bias
    told = Elsewhere(program).shares({"b.bias": model.b.bias, "a.bias": model.a.bias})
    assert told == "a.bias shares memory with parameter copied of the model"
