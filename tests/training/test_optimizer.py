"""AdamW with moments in 8 bits: near to AdamW, in fewer bytes, resumed to the same bits; refused where it cannot be."""

import pytest
import torch
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.training import optimizer as module
from sparseforge_fx.training.checkpoint import load_state, save_state
from sparseforge_fx.training.train import Optimization

pytest.importorskip("torchao")

HOW = {"preset": "annealed", "steps": 8, "lr": 3e-3, "compile": False, "show_progress": False}


@pytest.fixture(autouse=True)
def _eager(monkeypatch):
    """torchao compiles its step, which takes longer than all that is tested here."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))


def data():
    torch.manual_seed(1)
    return [torch.randn(16, 64) for _ in range(8)]


def losses(result):
    return [row["loss"] for row in result.report["curves"]]


def test_near_to_adamw_and_remembered_by_the_recipe():
    exact, rounded = (sf.sparsify(model(), data(), optimizer=name, **HOW) for name in ("adamw", "adamw8bit"))
    assert losses(exact)[:1] == losses(rounded)[:1] and losses(exact) != losses(rounded)
    assert losses(rounded) == pytest.approx(losses(exact), rel=0.05)
    assert rounded.report["recipe"]["optimizer"] == "adamw8bit"
    again = sf.Recipe.from_plain(rounded.report["recipe"])
    assert losses(sf.sparsify(model(), data(), again, compile=False, show_progress=False)) == losses(rounded)


def test_moments_take_a_byte_and_come_back_from_a_file(tmp_path):
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((64, 128), (128,), (63, 65))]
    optimizers = [module.adamw_8bit(parameters, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1) for _ in range(2)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizers[0].step()
    state = module.plain_state(optimizers[0])
    large, odd, vector = (state["state"][i]["exp_avg"] for i in range(3))  # matrices go first
    assert large["codes"].dtype is torch.uint8 and large["scale"].shape == (32,)
    assert vector.dtype is odd.dtype is torch.float32  # too small, no multiple of 256
    groups = {g["weight_decay"]: [state["state"][i]["exp_avg"] for i in g["params"]] for g in state["param_groups"]}
    assert any(value is vector for value in groups[0.0]) and not any(value is vector for value in groups[0.1])
    save_state(tmp_path, 1, state)
    module.load_plain_state(optimizers[1], load_state(tmp_path))
    for p in parameters:
        p.grad = torch.randn_like(p)
    before = [p.detach().clone() for p in parameters]
    for optimizer in optimizers:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
        optimizer.step()
        found = [p.detach().clone() for p in parameters]
        if optimizer is optimizers[0]:
            first = found
    assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    class Stop(Exception):
        pass

    def stop(step, row):
        if step == 3:
            raise Stop

    saved = {"state_path": tmp_path / "s", "save_seconds": 0.0, "optimizer": "adamw8bit"}
    with pytest.raises(Stop):
        sf.sparsify(model(), data(), **HOW, **saved, on_step=stop)
    with pytest.raises(SparseForgeError, match="optimizer adamw instead of adamw8bit"):
        sf.sparsify(model(), data(), **HOW, **saved | {"optimizer": "adamw"})
    net, whole = model(), model()
    sf.sparsify(net, data(), **HOW, **saved)
    sf.sparsify(whole, data(), **HOW, optimizer="adamw8bit")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "choose one of adamw, adamw8bit"),
        ({"optimizer": "adamw8bit", "method": "ast", "preset": None}, "method ast has one of its own: leave out"),
        ({"optimizer": "adamw8bit", "method": "maskpro", "preset": None}, "method maskpro has one of its own"),
    ],
)
def test_what_cannot_be(changes, message):
    net = model()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(SparseForgeError, match=message):
        sf.sparsify(net, data(), **HOW | changes)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_where_torchao_is_missing_it_says_so(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(SparseForgeError, match="needs torchao: pip install torchao"):
        Optimization(lr=1.0, optimizer="adamw8bit")
    assert Optimization(lr=1.0).optimizer == "adamw"


def test_what_does_not_train_names_it():
    report = sf.sparsify(model(), data(), method="wanda", optimizer="adamw8bit").report
    assert any(note.startswith("optimizer is given and not used") for note in report["notes"])
