"""A saved state goes on in the run that wrote it and in no other, and what is wrong with it is seen before anything
changes."""

import copy
import shutil

import pytest
import torch

import sparseforge_fx as sf
from sparseforge_fx.errors import AS_IT_WAS, SparseForgeError
from sparseforge_fx.methods.soft_mask import SparseForgeConfig
from sparseforge_fx.models import low_rank
from sparseforge_fx.training import saved_run
from sparseforge_fx.training.checkpoint import load_state, save_state
from sparseforge_fx.training.distillation import Distillation
from sparseforge_fx.training.train import Optimization, train

QUIET = {"steps": 6, "batch_size": 2, "length": 12, "compile": False, "show_progress": False, "save_seconds": 0.0}


class Stop(Exception):
    pass


def stop(step, row):
    if step == 3:
        raise Stop


SAVED: dict = {}  # of each model once for all tests


def stopped_run(found, data, block, tmp_path, tmp_path_factory):
    """The state of a run that was stopped in its fourth step; the model is as it was."""
    path, key = tmp_path / "state", type(found.model)
    if key not in SAVED:
        with pytest.raises(Stop):
            sf.sparsify(found.model, data, method="gmp", slorb_block=block, state_path=path, on_step=stop, **QUIET)
        assert load_state(path)["step"] == 3
        SAVED[key] = shutil.copytree(path, tmp_path_factory.mktemp("saved") / "state")
        found.reset()
        shutil.rmtree(path)
    shutil.copytree(SAVED[key], path)
    return path


@pytest.fixture
def stopped(captured_once, tmp_path, tmp_path_factory):
    """A model, ids, and the state of its run."""
    found = captured_once("llama")
    ids = torch.randint(3, 97, (16, 12), generator=torch.Generator().manual_seed(0))
    return found, ids, stopped_run(found, ids, 16, tmp_path, tmp_path_factory)


@pytest.fixture
def stopped_mlp(captured_once, tmp_path, tmp_path_factory):
    """The same of the least model."""
    found = captured_once("mlp")
    data = [found.batch(seed) for seed in range(8)]
    return found, data, stopped_run(found, data, 8, tmp_path, tmp_path_factory)


def resume(found, ids, path, **changes):
    return sf.sparsify(found.model, ids, **QUIET | {"method": "gmp", "slorb_block": 16, "state_path": path} | changes)


def untouched(found):
    return all(torch.equal(v, found.first[k]) for k, v in found.model.state_dict().items())


# -- another run -----------------------------------------------------------------------------------------------------
OTHER = {
    "lr": ({"lr": 1e-2}, r"lr 0\.01 instead of 0\.0005"),
    "seed": ({"seed": 1}, "seed 1 instead of 0"),
    "cross-entropy": ({"objective": Distillation(task=0.5)}, r"task 0\.5 instead of 1\.0"),
    "divergence": ({"objective": Distillation(divergence="reverse_kl")}, "divergence reverse_kl instead of kl"),
    "features": ({"objective": Distillation(features="squarehead")}, "features squarehead instead of None"),
    "batch": ({"batch_size": 4}, "batch_size 4 instead of 2.*other data"),
    "accumulate": ({"accumulate": 2}, "accumulate 2 instead of 1"),
    "branch": ({"slorb_block": 8}, "slorb_block 8 instead of 16"),
    "method": ({"method": "imp"}, "made with ramp cubic instead of rounds"),
    "steps": ({"steps": 7}, "made with steps 6 instead of 7"),
    "trainable": ({"trainable": "all"}, "trainable all instead of vectors"),
    "sites": ({"exclude": ["*up_proj*"]}, "another set of sites"),
}


@pytest.mark.parametrize("what", OTHER)
def test_other_options_are_named(stopped, what):
    changes, says = OTHER[what]
    with pytest.raises(SparseForgeError, match=says) as error:
        resume(*stopped, **changes)
    assert "\n" not in str(error.value) and AS_IT_WAS not in str(error.value)
    assert untouched(stopped[0])


def test_other_weights_and_other_data(stopped):
    found, ids, path = stopped
    with pytest.raises(SparseForgeError, match="has other data;"):
        resume(found, ids.flip(0), path)
    with torch.no_grad():
        found.model.model.norm.weight[5] += 0.5  # no site, and one entry of it
    with pytest.raises(SparseForgeError, match="has other weights;"):
        resume(found, ids, path)


def test_the_same_run_goes_on_with_its_branches(stopped):
    found, ids, path = stopped
    saved = load_state(path)["curves"]
    rest = resume(found, ids, path).report["curves"]
    assert len(rest) == 6 and rest[:3] == saved
    resumed = {k: v.clone() for k, v in found.model.state_dict().items()}
    for module in found.model.modules():
        low_rank.detach(module)
    found.reset()
    resume(found, ids, path.with_name("none"))
    whole = found.model.state_dict()
    assert any("slorb" in k for k in whole) and all(torch.equal(v, whole[k]) for k, v in resumed.items())
    for module in found.model.modules():
        low_rank.detach(module)


def test_the_time_of_earlier_processes_counts(stopped_mlp):
    found, data, path = stopped_mlp
    state = load_state(path)
    for row in state["curves"]:
        row["seconds"] = 1000.0
    save_state(path, 3, state)
    report = resume(found, data, path, slorb_block=8).report
    assert 3000 < report["seconds"] < 3900
    assert [row["seconds"] == 1000 for row in report["curves"]] == [True] * 3 + [False] * 3
    for module in found.model.modules():
        low_rank.detach(module)


def test_what_is_edited_below_goes_on_as_it_is(stopped_mlp):
    found, data, path = stopped_mlp
    assert len(resume(found, data, path, slorb_block=8).report["curves"]) == 6
    for module in found.model.modules():
        low_rank.detach(module)


# -- edits -----------------------------------------------------------------------------------------------------------
def _first(entries):
    return next(iter(entries))


def _replace(*way, by):
    """Put ``by(old)`` in the place of an entry; a name that is None is the first."""

    def edit(state):
        for step in way[:-1]:
            state = state[_first(state) if step is None else step]
        last = _first(state) if way[-1] is None else way[-1]
        state[last] = by(state[last])

    return edit


def _drop(*way):
    def edit(state):
        for step in way[:-1]:
            state = state[_first(state) if step is None else step]
        del state[_first(state) if way[-1] is None else way[-1]]

    return edit


EDITS = {f"no {key}": _drop(key) for key in ("run", "step", "masters", "masks", "optimizer", "method", "curves")}
EDITS |= {
    f"{key} is {kind}": _replace(key, by=lambda _, v=value: copy.deepcopy(v))
    for key in ("run", "step", "masters", "masks", "optimizer", "method", "handed_over", "start", "scales", "curves")
    for kind, value in {"none": None, "text": "x", "a list": [1]}.items()
}
EDITS |= {
    "foreign entry": lambda state: state.update(more=1),
    "negative step": _replace("step", by=lambda _: -1),
    "step beyond the end": _replace("step", by=lambda _: 7),
    "another step": _replace("step", by=lambda _: 2),
    "step is true": _replace("step", by=lambda _: True),
    "a master less": _drop("masters", 0),
    "a master's shape": _replace("masters", 0, by=lambda m: m[:1]),
    "a master's dtype": _replace("masters", 0, by=lambda m: m.double()),
    "a master is a number": _replace("masters", 0, by=lambda m: 1.0),
    "no mask of a weight": _drop("masks", None),
    "a mask's shape": _replace("masks", None, by=lambda m: m.t()[:3]),
    "a mask's dtype": _replace("masks", None, by=lambda m: m.half()),
    "no moments": _drop("optimizer", "state"),
    "a moment less": _drop("optimizer", "state", 0, "exp_avg"),
    "a moment's shape": _replace("optimizer", "state", 0, "exp_avg", by=lambda m: m[:1]),
    "second moment's shape": _replace("optimizer", "state", 0, "exp_avg_sq", by=lambda m: m.new_zeros(1)),
    "a moment's dtype": _replace("optimizer", "state", 0, "exp_avg", by=lambda m: m.half()),
    "a count is a vector": _replace("optimizer", "state", 0, "step", by=lambda m: torch.ones(4)),
    "moments of a stranger": _replace("optimizer", "state", by=lambda s: {**s, 999: copy.deepcopy(s[0])}),
    "no groups": _replace("optimizer", "param_groups", by=lambda g: []),
    "a group's parameters": _replace("optimizer", "param_groups", 0, "params", by=lambda p: p[1:]),
    "a group's betas": _replace("optimizer", "param_groups", 0, "betas", by=lambda b: (0.5,)),
    "a group's rate": _replace("optimizer", "param_groups", 0, "lr", by=lambda b: "x"),
    "no plain": _drop("method", "plain"),
    "fixed is a number": _replace("method", "plain", "fixed", by=lambda _: 1),
    "no config": _drop("method", "config"),
    "config of a stranger": _replace("method", "config", by=lambda _: "x"),
    "held is a list": _replace("method", "held", by=lambda _: []),
    "a start without seconds": _replace("start", by=lambda _: {"layer_notes": {}, "calibration_sequences": 3}),
    "a note of a number": _replace("start", by=lambda s: {**s, "layer_notes": {"w": 3}}),
    "a curve less": _drop("curves", 0),
    "a curve of text": _replace("curves", 0, by=lambda row: {**row, "loss": "x"}),
}


@pytest.mark.parametrize("what", EDITS)
def test_edits_are_refused_before_anything_changes(stopped_mlp, what):
    """Written anew by this package, so that only the content is wrong."""
    found, data, path = stopped_mlp
    state = load_state(path)
    EDITS[what](state)
    save_state(path, 3, state)
    with pytest.raises(SparseForgeError) as error:
        resume(found, data, path, slorb_block=8)
    assert "\n" not in str(error.value) and AS_IT_WAS not in str(error.value), error.value
    assert untouched(found)
    assert all(p.requires_grad and p.grad is None for p in found.model.parameters())


@pytest.fixture
def masks_under_way(tiny, tmp_path):
    """A state with curvature and soft masks in it, and a fresh model for it."""
    found, path = tiny("mlp"), tmp_path / "state"
    config = SparseForgeConfig(steps=8, heat_end=0.1, quench_end=0.9)

    class Batches:
        def batch(self, step):
            return found.batch(seed=step)

    def run(**options):
        found.reset()
        sparse = found.sparse(config)
        options |= {"state_path": path, "save_seconds": 0.0, "compile": False}
        return train(sparse, Batches(), sparse.parameters(), Optimization(lr=1e-2), **options)

    with pytest.raises(Stop):
        run(on_step=stop)
    return found, path, run


@pytest.mark.parametrize("kind", ["curvature", "soft"])
@pytest.mark.parametrize("how", ["shape", "dtype", "no tensor", "of another weight", "whole kind"])
def test_edits_of_what_a_method_holds(masks_under_way, kind, how):
    found, path, run = masks_under_way
    state = load_state(path)
    held = state["method"]["held"][kind]
    fqn = _first(held)
    if how == "whole kind":
        del state["method"]["held"][kind]
    elif how == "of another weight":
        held["none.weight"] = held[fqn].clone()
    else:
        held[fqn] = {"shape": held[fqn][:3, :5], "dtype": held[fqn].double(), "no tensor": 1.0}[how]
    save_state(path, 3, state)
    with pytest.raises(SparseForgeError, match="damaged"):
        run()
    assert untouched(found)


def test_a_place_where_no_state_can_be_written_is_seen_first(captured_once, tmp_path):
    found = captured_once("mlp")
    (tmp_path / "file").write_text("")
    data = [torch.randn(2, 16)]
    with pytest.raises(SparseForgeError, match="is a file"):
        sf.sparsify(found.model, data, state_path=tmp_path / "file" / "state", **QUIET)
    assert untouched(found)


def test_all_that_a_layer_wise_start_reports_comes_back():
    numbers = {"calibration_sequences": 4, "calibration_seconds": 0.5}
    blocks = [{"block": "layers.0", "before": 0.2, "after": 0.1}]
    start = {"layer_notes": {"w": "a note"}, "layer_errors": {"w": 0.1}, "reconstruction": blocks, **numbers}
    assert saved_run._wrong_start(start) is None
    assert saved_run._wrong_start(start | {"layer_errors": {"w": "0.1"}}) == "start holds errors that are no numbers"
