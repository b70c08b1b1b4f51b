"""Which weights are sites, and that every other one has the right reason."""

import pytest
import torch
import torch.nn.functional as F
from rounding import same_products
from torch import nn

from sparseforge_fx.graph.capture import capture
from sparseforge_fx.passes import find_linears, run_passes, train_passes
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.uses import LinearUse
from sparseforge_fx.pattern import Pattern


class Model(nn.Module):
    """A function of x and of named tensors: parameters, or buffers if they are not nn.Parameter."""

    def __init__(self, function, **tensors):
        super().__init__()
        self.function = function
        for name, value in tensors.items():
            if isinstance(value, nn.Parameter | nn.Module):
                setattr(self, name, value)
            else:
                self.register_buffer(name, value)

    def forward(self, x):
        return torch.sin(self.function(self, x))  # sin: no output layer


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter(torch.randn(*shape).to(dtype), requires_grad=dtype.is_floating_point)


def reasons(model, x, *args, **kwargs):
    sites = find_linears(capture(model, x), *args, **kwargs)
    return {s.fqn: s.reason for s in sites}


def test_tiny_net(program):
    sites = {s.fqn: s for s in find_linears(program)}
    assert [s.fqn for s in sites.values()] == [
        "up.weight", "down.weight", "twice.weight", "to_six.weight", "from_six.weight",
    ]  # fmt: skip
    assert sites["from_six.weight"].reason == "reduction dimension 6 is not a multiple of 4"
    assert len(eligible(list(sites.values()))) == 4
    twice = sites["twice.weight"]
    assert twice.ties == ("tied.weight",) and len(twice.uses) == 3
    down = sites["down.weight"]
    assert down.transposed and down.shape == (16, 8) and down.reduction_dim == 0
    assert (down.in_features, down.out_features, down.numel) == (16, 8, 128)
    assert sites["up.weight"].uses == [LinearUse("linear", swapped=False)] and not sites["up.weight"].transposed


def test_finding_changes_nothing(program):
    code, state = program.exported.graph_module.code, dict(program.state)
    assert find_linears(program) == find_linears(program.copy())
    assert program.exported.graph_module.code == code and program.state == state


def weight_norm(m, x):
    return F.linear(x, m.g * m.v / m.v.norm(dim=1, keepdim=True))


REFUSED = {
    "a convolution": (
        lambda m, x: m.conv(x.mT), {"conv": nn.Conv1d(8, 4, 3)},
        {"conv.weight": "3-D weight, read by aten.conv1d.default"},
    ),
    "an embedding tied to a linear": (
        lambda m, x: F.linear(F.embedding(x.argmax(-1), m.w), m.w), {"w": parameter(12, 8)},
        {"w": "also read by aten.embedding.default"},
    ),
    "experts' bias": (
        lambda m, x: torch.baddbmm(m.b, x, m.w), {"w": parameter(2, 8, 4), "b": parameter(2, 1, 4)},
        {"w": None, "b": "3-D weight, read by aten.baddbmm.default"},
    ),
    "experts that each see all tokens": (
        lambda m, x: x[None] @ m.w.mT[:, None], {"w": parameter(3, 4, 8)},
        {"w": "3-D weight, read by aten.matmul.default through aten.unsqueeze.default"},
    ),
    "einsum": (
        lambda m, x: torch.einsum("bti,oi->bto", x, m.w), {"w": parameter(4, 8)},
        {"w": "read by aten.einsum.default"},
    ),
    "a cast weight": (
        lambda m, x: F.linear(x.double(), m.w.double()), {"w": parameter(4, 8)},
        {"w": "read by aten.linear.default through aten.to.dtype"},
    ),
    "a weight that the graph computes": (
        weight_norm, {"g": parameter(4, 1), "v": parameter(4, 8)},
        {"g": "read by aten.mul.Tensor", "v": "read by aten.linalg_vector_norm.default, aten.mul.Tensor"},
    ),
    "a dequantised int8 buffer": (
        lambda m, x: F.linear(x, m.q.float() * m.scale),
        {"q": torch.randint(-9, 9, (4, 8), dtype=torch.int8), "scale": torch.tensor(0.1)},
        {"linear": "its weight is computed in the graph by aten.mul.Tensor"},
    ),
    "a dequantised int8 buffer, matmul": (
        lambda m, x: x @ (m.q * m.scale).t(),
        {"q": torch.randint(-9, 9, (4, 8), dtype=torch.int8), "scale": torch.tensor(0.1)},
        {"matmul": "its weight is computed in the graph by aten.mul.Tensor"},
    ),
    "a weight computed from the input": (
        lambda m, x: F.linear(x, F.linear(x[0], m.w).t() @ x[0]), {"w": parameter(8, 8)},
        {"w": None, "linear_1": "its weight is computed in the graph by aten.matmul.default"},
    ),
    "a product of activations": (lambda m, x: (x @ x.mT) @ F.linear(x, m.w), {"w": parameter(4, 8)}, {"w": None}),
    "int weights": (
        lambda m, x: torch.mm(x[0].int(), m.w), {"w": parameter(8, 4, dtype=torch.int32)},
        {"w": "dtype torch.int32 is not float16, bfloat16, float32 or float64"},
    ),
    "both orientations": (
        lambda m, x: (x @ m.w) @ m.w.t(), {"w": parameter(8, 4)}, {"w": "used along both of its dimensions (W and W^T)"},
    ),
    "a buffer": (lambda m, x: F.linear(x, m.w), {"w": torch.randn(4, 8)}, {"w": "a buffer, not a parameter"}),
    "not read": (
        lambda m, x: F.linear(x, m.w), {"w": parameter(4, 8), "unused": parameter(4, 8)},
        {"w": None, "unused": "not read by the program"},
    ),
    "returned too": (
        lambda m, x: torch.cat([F.linear(x[0], m.w), m.w[:, :4]]), {"w": parameter(4, 8)},
        {"w": "also read by aten.cat.default through aten.slice.Tensor"},
    ),
    "scaled addmm": (
        lambda m, x: torch.addmm(m.b, x[0], m.w, alpha=2.0), {"w": parameter(8, 4), "b": parameter(4)},
        {"w": "read by aten.addmm.default"},
    ),
    "addmm onto a matrix": (
        lambda m, x: torch.addmm(m.r, x[0], m.w), {"w": parameter(8, 4), "r": parameter(3, 4)},
        {"w": "read by aten.addmm.default", "r": "read by aten.addmm.default"},
    ),
    "a recurrent cell": (
        lambda m, x: m.rnn(x)[0], {"rnn": nn.GRU(8, 4)},
        {"rnn.weight_ih_l0": "read by aten.gru.input", "rnn.weight_hh_l0": "read by aten.gru.input"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_every_matrix_that_is_no_site_has_a_reason(case, x):
    function, tensors, expected = REFUSED[case]
    model = Model(function, **tensors)
    program = capture(model, x)
    sites = find_linears(program)
    assert {s.fqn: s.reason for s in sites} == expected
    masked, _ = run_passes(program, train_passes(sites))
    assert same_products(masked.module()(x), model(x))


def test_rotary_tables_are_not_weights(x):
    def rotate(m, x):
        angles = (m.frequencies[:, None] @ torch.arange(3.0)[None]).mT
        return F.linear(x, m.w) * angles.cos()

    assert reasons(Model(rotate, frequencies=torch.rand(4), w=parameter(4, 8)), x) == {"w": None}


class TestMemory:
    def test_slices_of_one_storage_that_do_not_meet_are_sites(self, x):
        flat = torch.randn(64)
        a, b = nn.Parameter(flat[:32].view(4, 8)), nn.Parameter(flat[32:].view(4, 8))
        assert reasons(Model(lambda m, x: F.linear(x, m.a) + F.linear(x, m.b), a=a, b=b), x) == {"a": None, "b": None}

    def test_overlapping_weights_are_refused(self, x):
        flat = torch.randn(64)
        a, b, c = (nn.Parameter(flat[i : i + 32].view(4, 8)) for i in (0, 16, 32))
        model = Model(lambda m, x: F.linear(x, m.a) + F.linear(x, m.b) + F.linear(x, m.c), a=a, b=b, c=c)
        shared = "shares memory with another tensor or with itself"
        assert reasons(model, x) == {"a": shared, "b": shared, "c": shared}

    def test_a_vector_inside_a_weight_is_noticed(self, x):
        a = parameter(4, 8)
        model = Model(lambda m, x: F.linear(x, m.a, m.b), a=a, b=nn.Parameter(a.detach()[0, :4]))
        assert reasons(model, x)["a"] == "shares memory with another tensor or with itself"

    def test_an_expanded_weight_is_refused(self, x):
        model = Model(lambda m, x: F.linear(x, m.a), a=nn.Parameter(torch.randn(1, 8).expand(4, 8)))
        assert reasons(model, x)["a"] == "shares memory with another tensor or with itself"

    def test_a_transposed_view_of_a_weight_is_no_tie(self, x):
        a = parameter(8, 8)
        model = Model(lambda m, x: F.linear(F.linear(x, m.a), m.b), a=a, b=nn.Parameter(a.detach().t()))
        assert set(reasons(model, x).values()) == {"shares memory with another tensor or with itself"}

    def test_two_parameters_over_one_storage_are_a_tie(self, x):
        a = parameter(8, 8)
        model = Model(lambda m, x: F.linear(F.linear(x, m.a), m.b), a=a, b=nn.Parameter(a.detach()))
        program = capture(model, x)
        (site,) = find_linears(program)
        assert site.fqn == "a" and site.ties == ("b",) and len(site.uses) == 2 and site.reason is None
        masked, _ = run_passes(program, train_passes([site]))
        assert list(masked.exported.graph_signature.buffers) == ["a_mask"]
        assert same_products(masked.module()(x), model(x))


class Classifier(nn.Module):
    def __init__(self, tail):
        super().__init__()
        self.emb = nn.Embedding(12, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 12)
        self.bias = nn.Parameter(torch.randn(12))
        self.tail = tail

    def forward(self, ids):
        h = self.emb(ids)
        return self.tail(self, self.head(h + self.body(h)))


TAILS = {
    "plain": lambda m, y: y,
    "cast and cut": lambda m, y: y.double()[:, -1].reshape(-1, 3, 4),
    "soft-capped": lambda m, y: 30 * torch.tanh(y / 30),
    "biased": lambda m, y: y + m.bias,
    "log-probabilities": lambda m, y: F.log_softmax(y, -1),
    "two outputs": lambda m, y: (y.sigmoid(), y.argmax(-1)),
}


@pytest.mark.parametrize("tail", TAILS)
def test_the_output_layer_stays_dense_unless_named(tail):
    ids = torch.randint(0, 12, (2, 3))
    program = capture(Classifier(TAILS[tail]), ids)
    by_name = {s.fqn: s.reason for s in find_linears(program)}
    assert by_name["head.weight"] == "output layer (head); include it by name to prune it"
    assert by_name["emb.weight"] == "read by aten.embedding.default"
    assert by_name["body.0.weight"] is None and by_name["body.2.weight"] is None
    named = {s.fqn for s in eligible(find_linears(program, include=["head", "emb", "body.*"]))}
    assert named == {"head.weight", "body.0.weight", "body.2.weight"}, "an embedding cannot be included"


def test_include_and_exclude():
    program = capture(Classifier(TAILS["plain"]), torch.randint(0, 12, (2, 3)))

    def by_name(**globs):
        return {s.fqn: s.reason for s in find_linears(program, **globs)}

    assert by_name(include=["body.0"])["body.2.weight"] == "not among the included names"
    assert by_name(include=["body.0"])["body.0.weight"] is None
    assert by_name(exclude=["*.2"])["body.2.weight"] == "excluded by name"
    assert by_name(exclude=["body.*.weight"])["body.0.weight"] == "excluded by name"
    assert by_name(include=["body*"], exclude=["body.0*"]) == {
        "emb.weight": "read by aten.embedding.default",
        "body.0.weight": "excluded by name",
        "body.2.weight": None,
        "head.weight": "not among the included names",
    }


def test_a_tie_is_named_by_any_of_its_names(program):
    assert {s.fqn for s in eligible(find_linears(program, include=["tied"]))} == {"twice.weight"}
    assert "twice.weight" not in {s.fqn for s in eligible(find_linears(program, exclude=["tied"]))}


def test_the_pattern_decides_what_divides(program):
    assert len(eligible(find_linears(program, Pattern(1, 2)))) == 5
    assert {s.fqn for s in eligible(find_linears(program, Pattern(8, 16)))} == {"down.weight"}


def test_a_router_stays_dense_unless_named(x):
    def route(m, x):
        weight, chosen = torch.softmax(F.linear(x, m.router).float(), -1).topk(2, -1)
        return F.linear(x, m.w) * weight.sum(-1, keepdim=True) + chosen.sum()

    model = Model(route, router=parameter(4, 8), w=parameter(4, 8))
    assert reasons(model, x) == {
        "router": "router (topk chooses by its output); include it by name to prune it",
        "w": None,
    }
    assert reasons(model, x, include=["router"])["router"] is None


def test_frozen_weights_stay_dense_unless_all_are(x):
    model = Model(lambda m, x: F.linear(F.linear(x, m.a), m.b), a=parameter(8, 8), b=parameter(8, 8))
    model.a.requires_grad_(False)
    frozen = "frozen (requires_grad is False); include it by name to prune it"
    assert reasons(model, x) == {"a": frozen, "b": None}
    assert reasons(model, x, include=["a"])["a"] is None
    model.b.requires_grad_(False)  # a model for inference
    assert reasons(model, x) == {"a": None, "b": None}


def test_a_linear_inside_a_no_grad_block_is_reported(x):
    def forward(m, x):
        with torch.no_grad():
            y = F.linear(x, m.a)
        return F.linear(y, m.b)

    model = Model(forward, a=parameter(8, 8), b=parameter(8, 8))
    assert reasons(model, x) == {"a": "read by wrap_with_set_grad_enabled", "b": None}


def test_meta_tensors_are_told_apart(x):
    with torch.device("meta"):
        model = Model(lambda m, x: F.linear(F.linear(x, m.a), m.b), a=parameter(8, 8), b=parameter(8, 8))
        assert reasons(model, torch.empty(2, 8)) == {"a": None, "b": None}


def test_one_glob_need_not_be_a_list(captured_once):
    program = captured_once("llama").program
    by_text, by_list = (
        [(s.fqn, s.reason) for s in find_linears(program, include=globs, exclude="*layers.1*")]
        for globs in ("*mlp*", ["*mlp*"])
    )
    assert by_text == by_list and any(reason is None for _, reason in by_text)
