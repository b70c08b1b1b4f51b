"""Edits of an ExportedProgram: graph, signature and state stay in step whatever is added, dropped or replaced."""

import io

import pytest
import torch
from rounding import same_products
from torch import nn
from torch.export.graph_signature import InputKind

from sparseforge_fx.graph.capture import capture
from sparseforge_fx.graph.exported import Exported

aten = torch.ops.aten


def kinds(program):
    return [s.kind for s in program.signature.input_specs]


def test_its_tensors_are_the_models(program, net):
    parameters = {fqn: value for _, fqn, value in program.lifted(InputKind.PARAMETER)}
    assert all(parameters[n] is p for n, p in net.named_parameters(remove_duplicate=False))
    module = program.module()
    assert all(p is net.get_parameter(n) for n, p in module.named_parameters())
    assert program.source is net and program.tensor("up.weight") is net.up.weight


def test_lifted_gives_each_kind_in_graph_order():
    class Buffers(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(2))
            self.register_buffer("kept", torch.randn(2))
            self.register_buffer("temporary", torch.randn(2), persistent=False)

        def forward(self, x):
            return x * self.w + self.kept * self.temporary + torch.tensor([1.0, 2.0])

    model = Buffers()
    program = capture(model, torch.randn(3, 2))
    assert [f for _, f, _ in program.lifted(InputKind.PARAMETER)] == ["w"]
    assert [f for _, f, _ in program.lifted(InputKind.BUFFER)] == ["kept", "temporary"]
    assert len(list(program.lifted(InputKind.CONSTANT_TENSOR))) == 1
    assert torch.equal(program.tensor("temporary"), model.temporary)
    twin, x = program.copy(), torch.randn(5, 2)
    assert same_products(twin.module()(x), model(x))


def test_a_copy_has_its_own_graph_over_the_same_tensors(program, x):
    twin = program.copy()
    assert twin.graph is not program.graph and all(twin.state[k] is v for k, v in program.state.items())
    twin.add_buffer("extra", torch.ones(1))
    twin.validate()
    assert "extra" not in program.state and len(kinds(program)) + 1 == len(kinds(twin))
    assert program.op_counts() == twin.op_counts() and twin.source is program.source
    assert same_products(twin.module()(x), program.module()(x))


def test_added_tensors_stand_in_the_order_that_export_wants(program, net, x):
    expected = net(x)
    for name in ("a", "b"):
        program.add_buffer(f"up.mask_{name}", torch.ones(2))
        program.add_parameter(f"up.probe_{name}", torch.zeros(3), requires_grad=name == "a")
    program.validate()
    order = [InputKind.PARAMETER, InputKind.BUFFER, InputKind.USER_INPUT]
    assert kinds(program) == sorted(kinds(program), key=order.index)
    placeholders = [n.name for n in program.graph.find_nodes(op="placeholder")]
    assert placeholders == [s.arg.name for s in program.signature.input_specs]
    module = program.module()
    assert same_products(module(x), expected)
    assert module.up.probe_a.requires_grad and not module.up.probe_b.requires_grad
    assert module.up.mask_a is program.state["up.mask_a"]


def test_names_that_look_alike_do_not_collide(x):
    model = nn.Module()
    model.a = nn.ModuleDict({"b": nn.Linear(8, 8)})
    model.a_b = nn.Linear(8, 8)
    model.forward = lambda x: model.a_b(model.a["b"](x))
    program = capture(model, x)
    program.add_buffer("a.b.mask", torch.ones(1))
    program.add_buffer("a_b.mask", torch.zeros(1))
    program.validate()
    module = program.module()
    assert same_products(module(x), model(x)) and module.a.b.mask == 1 and module.a_b.mask == 0


def test_a_name_is_added_once(program):
    with pytest.raises(ValueError, match=r"already has a tensor named up\.weight"):
        program.add_parameter("up.weight", torch.zeros(1))


def test_dropping_undoes_adding(program, x):
    state, specs, code = dict(program.state), list(program.signature.input_specs), program.exported.graph_module.code
    node = program.add_parameter("up.extra", torch.zeros(1))
    program.drop(node)
    program.validate()
    assert (dict(program.state), program.signature.input_specs) == (state, specs)
    assert program.exported.graph_module.code == code
    with pytest.raises(AssertionError, match="still read"):
        program.drop(program.graph.find_nodes(op="placeholder")[0])


def test_replacing_the_node_that_is_returned(x):
    class Tanh(nn.Module):
        def forward(self, x):
            y = torch.tanh(x)
            return y, y + 1

    program = capture(Tanh(), x)
    (old,) = program.graph.find_nodes(op="call_function", target=aten.tanh.default)
    old.meta["mark"] = 1
    with program.graph.inserting_before(old):
        new = program.graph.call_function(aten.sin.default, old.args)
    new.meta["val"] = old.meta["val"]
    program.replace(old, new)
    program.validate()
    assert new.meta["mark"] == 1 and program.op_counts() == {"aten.sin.default": 1, "aten.add.Tensor": 1}
    assert torch.equal(program.module()(x)[0], torch.sin(x))
    assert torch.equal(torch.export.unflatten(program.exported)(x)[1], torch.sin(x) + 1)


def test_an_edited_program_saves_and_loads(program, x):
    twin = program.copy()
    twin.add_parameter("up.p", torch.zeros(2))
    twin.add_buffer("up.b", torch.ones(2))
    file = io.BytesIO()
    torch.export.save(twin.exported, file)
    file.seek(0)
    loaded = Exported(torch.export.load(file))
    assert same_products(loaded.module()(x), twin.module()(x)) and torch.equal(loaded.tensor("up.b"), torch.ones(2))
    loaded.copy().validate()


def test_sizes_of_the_branch_not_taken_are_refused():
    """The trace took one branch; running it on a size of the other would compute something else than the model."""

    class EvenOdd(nn.Module):
        def __init__(self):
            super().__init__()
            self.even, self.odd = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.even(x) if x.shape[1] % 2 == 0 else self.odd(x)

    model = EvenOdd()
    program = capture(model, torch.randn(2, 4, 8)).copy()
    program.validate()
    module, x = program.module(), torch.randn(3, 6, 8)
    assert same_products(module(x), model(x))
    with pytest.raises(AssertionError, match="% 2"):
        module(torch.randn(2, 5, 8))


def test_spec_of(program):
    first = program.graph.find_nodes(op="placeholder")[0]
    assert program.spec_of(first).target == "up.weight"
    assert program.spec_of(program.graph.output_node()) is None
