"""The interface of programs, on each of its two backings."""

import pytest
import torch
from torch import nn
from torch.export.graph_signature import InputKind

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.graph.frame import Frame

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def frame_of(model, x):
    frames = []

    def backend(module, inputs):
        frames.append(Frame.from_dynamo(module, inputs))
        return module

    torch.compile(model, backend=backend)(x)
    torch._dynamo.reset()
    return frames[0]


def run(program, model, x):
    if isinstance(program, Frame):
        return program.module()(*_inputs(program, model, x), *program.extra_inputs())[0]
    return program.module()(x)


def _inputs(program, model, x):
    """What Dynamo calls the graph with: inputs in its order, parameters among them."""
    names = program.names(InputKind.PARAMETER)
    given = [n for n in program.graph.find_nodes(op="placeholder") if n not in program.added.values()]
    return [program.tensor(names[node]) if node in names else x for node in given]


@pytest.fixture(params=["exported", "frame"])
def case(request):
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(5, 8)
    return (capture(model, x) if request.param == "exported" else frame_of(model, x)), model, x


def tanh_of(program):
    (node,) = program.graph.find_nodes(op="call_function", target=aten.tanh.default)
    return node


def test_inputs_and_weights_are_told_apart(case):
    program, model, _ = case
    weights = list(program.lifted(InputKind.PARAMETER))
    assert {id(value) for _, _, value in weights} == {id(p) for p in model.parameters()}
    (user,) = program.user_inputs()
    assert user not in {node for node, _, _ in weights}
    assert program.names() == program.names(InputKind.PARAMETER) == {node: fqn for node, fqn, _ in weights}
    assert not list(program.lifted(InputKind.BUFFER))


def test_a_node_by_name_and_a_sentence_where_there_is_none(case):
    program, *_ = case
    node = tanh_of(program)
    assert program.node(node.name) is node
    with pytest.raises(SparseForgeError, match="no node 'lost': find the linears of this very program"):
        program.node("lost")


def test_calls_are_inserted_before_and_behind_a_node(case):
    program, model, x = case
    node = tanh_of(program)
    node.meta["mark"] = 1
    first = program.insert_before(node, aten.neg.default, node.args[0])
    node.args = (first,)
    last = program.insert_after(node, aten.mul.Tensor, node, 2.0)
    program.redirect(node, last)
    program.validate()
    order = list(program.graph.nodes)
    assert order[order.index(node) - 1] is first and order[order.index(node) + 1] is last
    assert last.args[0] is node and first.meta["mark"] == last.meta["mark"] == 1
    assert last.meta["val"].shape == node.meta["val"].shape and last.meta["val"] is not node.meta["val"]
    assert torch.equal(run(program, model, x), model.down(-2 * torch.tanh(model.up(x))))


def test_what_is_added_is_read_and_dropped_again(case):
    program, model, x = case
    before, node = list(program.names()), tanh_of(program)
    scale, shift = program.add_parameter("scale", torch.full((6,), 2.0)), program.add_buffer("shift", torch.ones(6))
    total = program.insert_after(node, aten.mul.Tensor, node, scale)
    total = program.insert_after(total, aten.add.Tensor, total, shift)
    program.redirect(node, total)
    total.args[0].args = (node, scale)
    program.validate()
    assert torch.equal(run(program, model, x), model.down(2 * torch.tanh(model.up(x)) + 1))
    assert program.names(InputKind.BUFFER) == {shift: "shift"} and program.names()[scale] == "scale"
    assert torch.equal(program.tensor("shift"), torch.ones(6)) and "scale" in program.state
    with pytest.raises(AssertionError, match="still read"):
        program.drop(shift)
    program.redirect(total, node)
    for spent in (total, total.args[0]):
        program.graph.erase_node(spent)
    for placeholder in (scale, shift):
        program.drop(placeholder)
    program.validate()
    assert list(program.names()) == before and not {"scale", "shift"} & set(program.state)
    assert torch.equal(run(program, model, x), model(x))


def test_a_copy_has_its_own_graph_over_the_same_tensors(case):
    program, model, x = case
    twin = program.copy()
    assert type(twin) is type(program) and (twin.source, twin.notes) == (program.source, program.notes)
    node = tanh_of(twin)
    twin.replace(node, twin.insert_before(node, aten.sin.default, node.args[0]))
    twin.validate()
    assert torch.equal(run(twin, model, x), model.down(torch.sin(model.up(x))))
    assert torch.equal(run(program, model, x), model(x))
    assert all(value is program.state[fqn] for fqn, value in twin.state.items())
