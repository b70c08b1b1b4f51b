"""The training loop: resuming to the same bits, refusing what is not finite, accumulation, masters, processes."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import BatchEncoding
from two_processes import run_two

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.cast import CastConfig
from sparseforge_fx.methods.learned import MaskLLMConfig, MaskProConfig
from sparseforge_fx.methods.presets import alps_kd_preset
from sparseforge_fx.methods.soft_mask import SparseForgeConfig
from sparseforge_fx.pattern import Pattern, check_pattern
from sparseforge_fx.training.checkpoint import load_state
from sparseforge_fx.training.distillation import Distillation
from sparseforge_fx.training.prepare import finalize, prepare
from sparseforge_fx.training.train import MasterWeights, Optimization, train, worth_compiling

QUIET = {"compile": False}
DENSE = SparseForgeConfig(steps=12, heat_end=0.3, quench_end=0.7, masked_decay=1e-3)
OBS = alps_kd_preset(12, start="sparsegpt", softness_start=0.6, heat_end=0.0, quench_end=0.5)


class Killed(BaseException):
    """What Python gets to see of a power cut: nothing catches it."""


class Batches:
    """The batch of every step, made from its number."""

    def __init__(self, found, rows=4):
        self.found, self.rows = found, rows

    def batch(self, step):
        return self.found.batch(seed=1000 + step, rows=self.rows)


def bfloat16_mlp():
    model = tiny_models.build("mlp").bfloat16()
    found = tiny_models.Tiny(model, torch.randn(4, 16), None, {k: v.clone() for k, v in model.state_dict().items()})
    found.program = tiny_models.capture(model, found.example.bfloat16())
    found.batch = lambda seed, rows=4: torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return found


def losses(curves):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in curves]


# -- resuming --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config", [DENSE, OBS], ids=["dense start", "obs start"])
@pytest.mark.parametrize("name", ["mlp", "mlp in bfloat16", "llama of one block"])
def test_a_killed_run_goes_on_to_the_same_bits(tiny, tmp_path, name, config):
    """Killed four times: before the first save, while heating or fading, in the quench, at the end."""
    found = bfloat16_mlp() if "bfloat16" in name else tiny(name)
    path = tmp_path / "state"

    def run(kill_after=None, **options):
        found.reset()
        sparse = found.sparse(config)
        if config.start != "dense" and not path.exists():
            sparse.calibrate([found.batch(seed) for seed in range(4)])

        def on_step(step, row):
            if step == kill_after:
                raise Killed

        try:
            curves = train(sparse, Batches(found), sparse.parameters(), Optimization(lr=1e-2), on_step=on_step, **QUIET, **options)
        except Killed:
            return None
        finalize(sparse)
        return losses(curves), {k: v.clone() for k, v in found.model.state_dict().items()}

    curves, weights = run()
    assert len(curves) == 12
    saved = {"state_path": path, "save_seconds": 0.0}
    for step in (0, 2, 7, 11):
        assert run(kill_after=step, **saved) is None
    resumed_curves, resumed_weights = run(**saved)
    assert resumed_curves == curves
    for fqn, value in weights.items():
        assert torch.equal(value, resumed_weights[fqn]), fqn
    again_curves, again_weights = run(**saved)  # nothing is left to do
    assert again_curves == curves
    assert all(torch.equal(value, again_weights[fqn]) for fqn, value in weights.items())


SCRIPT = """
import os, signal, sys, torch
import tiny_models
from pathlib import Path
from sparseforge_fx.training.train import Optimization, train
from test_train import Batches, DENSE, QUIET
torch.set_num_threads(1)
found = tiny_models._captured("mlp").reset()
sparse = found.sparse(DENSE)
kill = lambda step, row: step == 8 and os.kill(os.getpid(), signal.SIGKILL)
saved = {"state_path": Path(sys.argv[1]), "save_seconds": 0.0}
train(sparse, Batches(found), sparse.parameters(), Optimization(lr=1e-2), on_step=kill, **saved, **QUIET)
"""


def test_sigkill(tiny, tmp_path):
    """Another process is killed for good; this one ends its run."""
    path = tmp_path / "state"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = tiny("mlp")
    straight = found.sparse(DENSE)
    curves = train(straight, Batches(found), straight.parameters(), Optimization(lr=1e-2), **QUIET)
    expected = {k: v.clone() for k, v in found.model.state_dict().items()}
    found.reset()
    sparse = found.sparse(DENSE)
    steps = []
    resumed = train(
        sparse,
        Batches(found),
        sparse.parameters(),
        Optimization(lr=1e-2),
        state_path=path,
        on_step=lambda step, row: steps.append(step),
        **QUIET,
    )
    assert steps == [8, 9, 10, 11]
    assert losses(resumed) == losses(curves)
    assert all(torch.equal(v, expected[k]) for k, v in found.model.state_dict().items())


def saved_state(found, path, config=DENSE):
    sparse = found.sparse(config)
    train(sparse, Batches(found), sparse.parameters(), Optimization(lr=1e-2), state_path=path, save_seconds=0.0, **QUIET)
    found.reset()


@pytest.mark.parametrize("what", ["another model", "other sites", "other steps", "no state at all"])
def test_a_state_that_does_not_fit_changes_nothing(tiny, tmp_path, what):
    path = tmp_path / "state"
    found = tiny("mlp")
    saved_state(found, path)
    config, message = DENSE, "another model or another set of sites"
    if what == "another model":
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.LayerNorm(8))
        found = tiny_models.Tiny(model, torch.randn(4, 8), None, {k: v.clone() for k, v in model.state_dict().items()})
        found.program = tiny_models.capture(model, found.example)
    elif what == "other steps":
        config, message = (
            SparseForgeConfig(steps=13, heat_end=0.3, quench_end=0.7, masked_decay=1e-3),
            "steps 12 instead of 13",
        )
    elif what == "no state at all":
        path = tmp_path / "other"
        path.write_text("hello")
        message = "not a training state"
    sparse = found.sparse(config)
    if what == "other sites":
        sparse.method.weights.pop()
    with pytest.raises(SparseForgeError, match=message):
        train(sparse, Batches(found), sparse.parameters(), Optimization(lr=1e-2), state_path=path, **QUIET)
    assert all(torch.equal(v, found.first[k]) for k, v in found.model.state_dict().items())
    assert all((w.mask == 1).all() for w in sparse.method.weights)


def test_state_is_saved_as_often_as_asked(tiny, tmp_path):
    found = tiny("mlp")
    path = tmp_path / "state"
    sparse = found.sparse(DENSE)
    train(sparse, Batches(found), sparse.parameters(), Optimization(lr=1e-2), state_path=path, save_seconds=600.0, **QUIET)
    assert not path.exists()


# -- what is not finite ----------------------------------------------------------------------------------------------
class Poisoned(Batches):
    def batch(self, step):
        x = super().batch(step)
        return x if step < 5 else x * float("nan")


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path):
    found = tiny("mlp")
    path = tmp_path / "state"
    sparse = found.sparse(DENSE)
    seen = []

    def on_step(step, row):
        seen.append({k: v.clone() for k, v in found.model.state_dict().items()})

    with pytest.raises(SparseForgeError, match=r"loss is nan at step 5.*0\.01") as error:
        train(
            sparse,
            Poisoned(found),
            sparse.parameters(),
            Optimization(lr=1e-2),
            state_path=path,
            save_seconds=0.0,
            on_step=on_step,
            **QUIET,
        )
    assert "\n" not in str(error.value)
    assert len(seen) == 5
    assert all(torch.equal(v, seen[-1][k]) for k, v in found.model.state_dict().items())  # no step was taken with it
    assert load_state(path)["step"] == 5
    assert all(torch.isfinite(m).all() for m in load_state(path)["masters"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_run(tiny, bad):
    found = tiny("mlp")
    sparse = found.sparse(DENSE)
    hook = found.model[2].bias.register_hook(lambda g: g * bad)
    with pytest.raises(SparseForgeError, match="gradient is not finite at step 0"):
        train(sparse, Batches(found), sparse.parameters(), Optimization(lr=1e-2), **QUIET)
    hook.remove()
    assert all(torch.equal(v, found.first[k]) for k, v in found.model.state_dict().items())


def test_nothing_to_learn_from(tiny):
    found = tiny("mlp")
    sparse = found.sparse(DENSE, Distillation(kl=0.0))
    with pytest.raises(SparseForgeError, match="nothing to learn from"):
        train(sparse, Batches(found), sparse.parameters(), Optimization(lr=1e-2), **QUIET)


# -- steps and curves ------------------------------------------------------------------------------------------------
def test_accumulated_micro_batches_equal_one_large_batch(tiny):
    config = SparseForgeConfig(steps=4, score="magnitude", heat_end=0.3, quench_end=0.9, mask_rate=0.5)
    results = []
    for rows, accumulate in ((8, 1), (4, 2), (2, 4)):
        found = tiny("llama")
        whole = {step: found.batch(seed=step, rows=8)["input_ids"] for step in range(4)}

        class Parts:
            def batch(self, index, rows=rows, accumulate=accumulate, whole=whole):
                step, micro = divmod(index, accumulate)
                return {"input_ids": whole[step][micro * rows : (micro + 1) * rows]}

        sparse = found.sparse(config)
        curves = train(sparse, Parts(), sparse.parameters(), Optimization(lr=1e-3, accumulate=accumulate), **QUIET)
        results.append((curves, {k: v.clone() for k, v in found.model.state_dict().items()}))
    for curves, weights in results[1:]:
        for row, expected in zip(curves, results[0][0], strict=True):
            for name in ("loss", "task", "kl", "grad_norm"):
                assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5)
            assert row["tokens"] == expected["tokens"]
        for k, v in weights.items():
            torch.testing.assert_close(
                v, results[0][1][k], rtol=0, atol=2e-4
            )  # Adam turns rounding into lr-sized steps
    moved = max((v - found.first[k]).abs().max() for k, v in results[0][1].items())
    assert moved > 1.5e-3


def test_curves_and_callbacks(tiny):
    found = tiny("llama")
    sparse = found.sparse(SparseForgeConfig(steps=20))
    seen = []
    curves = train(
        sparse, Batches(found, rows=2), sparse.parameters(), Optimization(lr=1e-3, warmup=0.2, accumulate=2),
        on_step=lambda step, row: seen.append((step, row)), **QUIET,
    )  # fmt: skip
    assert [(step, row) for step, row in enumerate(curves)] == seen
    assert [row["step"] for row in curves] == list(range(1, 21))
    assert [row["tokens"] for row in curves] == [48 * k for k in range(1, 21)]  # 2 x 2 x 12
    rates = [row["lr"] for row in curves]
    assert 0 < rates[0] < rates[1] < max(rates) <= 1e-3 and rates.index(max(rates)) in (3, 4)
    assert rates[-1] == min(rates[5:]) and 1e-4 <= rates[-1] < 1.1e-4
    assert curves[-1]["lambda"] == 0 and curves[-1]["density"] == 0.5
    for row in curves:
        assert row["loss"] == pytest.approx(row["task"] + row["kl"], rel=1e-5)
    json.dumps(curves, allow_nan=False)


def test_training_lowers_the_loss(tiny):
    found = tiny("llama")

    class One:
        def batch(self, step):
            return found.batch(seed=0, rows=4)

    sparse = found.sparse(SparseForgeConfig(steps=30))
    curves = train(sparse, One(), sparse.parameters(), Optimization(lr=5e-3), **QUIET)
    assert curves[-1]["loss"] < curves[0]["loss"] - 0.5
    finalize(sparse)
    for w in sparse.method.weights:
        assert check_pattern(w.weight, Pattern(2, 4), w.dim)


def test_clipping_bounds_the_gradient_of_all_parameters_together(tiny, monkeypatch):
    found = tiny("mlp")
    norms = []
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([g.square().sum() for g in grads]).sum().sqrt().item())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    sparse = found.sparse(DENSE)
    curves = train(sparse, Batches(found), sparse.parameters(), Optimization(lr=1e-2, clip=0.01), **QUIET)
    assert max(row["grad_norm"] for row in curves) > 0.02
    for row, norm in zip(curves, norms, strict=True):
        assert norm == pytest.approx(min(row["grad_norm"], 0.01), rel=1e-3, abs=1e-7)


def test_only_what_is_given_trains(tiny):
    found = tiny("mlp")
    sparse = found.sparse(DENSE)
    train(sparse, Batches(found), [found.model[0].bias], Optimization(lr=1e-2), **QUIET)
    moved = {k for k, v in found.model.state_dict().items() if not torch.equal(v, found.first[k])}
    assert "0.bias" in moved
    assert moved <= {"0.bias", "0.weight", "2.weight"}  # masked_decay acts on sites


def test_batches_of_a_tokenizer(tiny):
    """BatchEncoding is a mapping, but not a dict."""
    found = tiny("llama")

    class Encoded:
        def batch(self, step):
            return BatchEncoding(dict(found.batch(step)))

    sparse = found.sparse(SparseForgeConfig(steps=2))
    curves = train(sparse, Encoded(), sparse.parameters(), Optimization(lr=1e-3), **QUIET)
    assert curves[-1]["tokens"] == 48


def test_compiling_has_to_pay():
    assert not worth_compiling(step_seconds=0.01, steps_left=100)
    assert worth_compiling(step_seconds=10.0, steps_left=1000)


# -- float32 masters -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_updates_are_not_lost(dtype):
    """500 updates of 1e-5: each of them rounds to nothing in half precision."""
    p, alone = (nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(2))
    master = MasterWeights([p])
    optimizers = torch.optim.SGD(master.masters, lr=1e-5), torch.optim.SGD([alone], lr=1e-5)
    for _ in range(500):
        p.grad, alone.grad = torch.ones(3, dtype=dtype), torch.ones(3, dtype=dtype)
        master.take_gradients()
        for optimizer in optimizers:
            optimizer.step()
        master.write_back()
    assert (alone == 1).all()
    torch.testing.assert_close(p.detach().float(), torch.full((3,), 0.995), rtol=2**-8, atol=0)
    assert p.dtype == dtype and (p < 1).all()


def test_masters_keep_the_memory_of_their_gradients_between_steps_on_a_cpu():
    p, unused = nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    master = MasterWeights([p, unused])
    p.grad = torch.ones_like(p)
    master.take_gradients()
    memory = master.masters[0].grad.data_ptr()
    master.drop_gradients()
    assert p.grad is None
    p.grad = torch.full_like(p, 2.0)
    master.take_gradients()
    assert master.masters[0].grad.data_ptr() == memory and master.masters[0].grad.tolist() == [2.0] * 3
    assert master.masters[1].grad is None
    master.drop_gradients()
    master.take_gradients()  # of a step that does not reach it
    assert master.masters[0].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_masked_weights_are_written_with_their_masks(dtype):
    p, other = (nn.Parameter(torch.ones(4, dtype=dtype)) for _ in range(2))
    master = MasterWeights([p, other])
    master.write_masked([(p, torch.tensor([1, 0, 0, 1], dtype=dtype))])
    with torch.no_grad():
        for m in master.masters:
            m.add_(1)
    master.write_back()
    assert p.tolist() == [2, 0, 0, 2] and other.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("name", ["mlp", "mlp in bfloat16", "llama", "gpt2"])
@pytest.mark.parametrize("moving", [False, True])
def test_final_masks_are_multiplied_where_weights_are_written(tiny, monkeypatch, name, moving):
    """The same bits as the graph that multiplies at every reading; masks that move stay in the graph."""
    case = bfloat16_mlp() if "bfloat16" in name else tiny(name)
    config = SparseForgeConfig(steps=4) if moving else alps_kd_preset(4, start="magnitude")
    found = {}
    for settled in (True, False):
        case.reset()
        sparse = case.sparse(config)
        if not moving:
            sparse.calibrate([case.batch(0)])
        with monkeypatch.context() as patch:
            if not settled:
                patch.setattr(type(sparse), "settle", lambda self: [])
            curves = train(sparse, Batches(case), sparse.parameters(), Optimization(lr=1e-2), **QUIET)
        ran = {str(n.target) for n in sparse._run["graph"].graph.nodes if n.op == "call_function"}
        assert ("sparseforge.soft_masked_linear.default" in ran) == (moving or not settled)
        finalize(sparse)
        rows = [(row["loss"], row["grad_norm"]) for row in curves]
        found[settled] = rows, {key: value.clone() for key, value in case.model.state_dict().items()}
    assert found[True][0] == found[False][0]
    assert all(torch.equal(value, found[False][1][key]) for key, value in found[True][1].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wider_parameters_are_their_own_masters(dtype):
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    master = MasterWeights([p])
    assert master.masters[0] is p


def test_a_bfloat16_model_moves_as_a_float32_model_does():
    config = SparseForgeConfig(steps=60, score="magnitude", heat_end=1.0, quench_end=1.0, update_every=1000)
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = tiny_models.build("mlp")
        x = torch.randn(32, 16)
        model.to(dtype)
        first = model[2].weight.detach().clone()
        sparse = prepare(model, x.to(dtype), config)
        for w in sparse.method.weights:
            w.mask.fill_(0.7)  # something to learn

        class One:
            def batch(self, step, x=x, dtype=dtype):
                return x.to(dtype)

        train(sparse, One(), [p for p in sparse.parameters() if p.dim() == 2], Optimization(lr=5e-5), **QUIET)
        moved[dtype] = (model[2].weight.detach() - first).float().abs().mean().item()
    # 60 steps of at most 5e-5; weights of 0.1 are 5e-4 apart
    assert moved[torch.float32] > 1e-3
    assert moved[torch.bfloat16] == pytest.approx(moved[torch.float32], rel=0.2)


def test_decay_of_masked_weights_is_not_lost_in_bfloat16():
    """0.999 is 1 in bfloat16; 49 times (the last step fixes masks) it is 0.952."""
    config = SparseForgeConfig(
        steps=50, score="magnitude", heat_end=1.0, quench_end=1.0, update_every=1000, masked_decay=1e-3
    )
    found = bfloat16_mlp()
    sparse = found.sparse(config)
    weight = sparse.method.weights[0]
    weight.mask[:, ::2] = 0
    train(sparse, Batches(found), sparse.parameters(), Optimization(lr=0.0), **QUIET)
    first, last = found.first["0.weight"].float(), found.model[0].weight.detach().float()
    torch.testing.assert_close(last[:, 1::2], first[:, 1::2], rtol=0, atol=0)
    torch.testing.assert_close(last[:, ::2], first[:, ::2] * 0.999**49, rtol=2**-8, atol=0)


# -- several processes -----------------------------------------------------------------------------------------------
RANKS = """
import sys, torch
from test_train import RUNS, ran
torch.set_num_threads(1)
result = {name: ran(name) for name in RUNS}
torch.save(result, f"{sys.argv[1]}/{torch.distributed.get_rank()}.pt")
torch.distributed.destroy_process_group()
"""
#: model, config and micro-batches of a step over all processes
RUNS = {
    "soft masks": ("llama of one block", SparseForgeConfig(steps=6, heat_end=0.8, quench_end=1.0, mask_rate=0.3), 4),
    "gpt2": ("gpt2", SparseForgeConfig(steps=4, heat_end=0.8, quench_end=1.0, mask_rate=0.3), 4),
    "moe": ("moe", SparseForgeConfig(steps=3, heat_end=0.8, quench_end=1.0, mask_rate=0.3), 2),
    "mixed precision": ("gemma3", SparseForgeConfig(steps=3, heat_end=0.8, quench_end=1.0, mask_rate=0.3), 2),
    "half of it": ("half", SparseForgeConfig(steps=4, heat_end=0.8, quench_end=1.0, mask_rate=0.3), 2),
    "maskllm": ("mlp", MaskLLMConfig(steps=4), 2),
    "maskpro": ("mlp", MaskProConfig(steps=4, logit_lr=5.0), 2),
    "cast": ("mlp", CastConfig(steps=4, update_every=2), 2),
}


class Half(nn.Module):
    """One of two layers has no part in what is compared."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace()
        self.used, self.idle = (nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)) for _ in range(2))

    def forward(self, x):
        return {"logits": self.used(x), "pooled": self.idle(x)}


def ran(name):
    """Masks, weights and curves of a run, on however many processes this is one of."""
    kind, config, micro_batches = RUNS[name]
    if kind == "half":
        torch.manual_seed(0)
        model, x = Half().eval(), torch.randn(4, 16)
        found = tiny_models.Tiny(model, x, tiny_models.capture(model, x), {k: v.clone() for k, v in model.state_dict().items()})
    else:
        found = tiny_models._captured(kind).reset()
    sparse = found.sparse(config)
    with torch.no_grad():
        for w in sparse.method.weights:
            w.weight.mul_(0.9)  # away from the teacher: there is something to learn from the start
    how = Optimization(lr=1e-3, accumulate=micro_batches // dist_size())
    mixed = set()
    sparse.register_forward_pre_hook(lambda *_: mixed.add(torch.is_autocast_enabled("cpu")))
    AcceleratorState._reset_state()
    by = Accelerator(cpu=True, mixed_precision="bf16" if name == "mixed precision" else "no")
    curves = train(sparse, Batches(found, rows=2), sparse.trainable(), how, accelerator=by, **QUIET)
    return {
        "weights": {k: v.clone() for k, v in found.model.state_dict().items()},
        "masks": {w.fqn: w.mask.clone() for w in sparse.method.weights},
        "curves": losses(curves),
        "mixed": mixed,
    }


def dist_size():
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def test_two_processes_do_what_one_does_with_all_their_batches(tmp_path):
    """Bit for bit alike on both; as one process up to the order of sums, which Adam makes steps of."""
    first, second = run_two(RANKS, tmp_path)
    for name in RUNS:
        for kind in ("weights", "masks"):
            for fqn, value in first[name][kind].items():
                assert torch.equal(value, second[name][kind][fqn]), (name, kind, fqn)
        assert first[name]["curves"] == second[name]["curves"]
        alone = ran(name)
        mixed = name == "mixed precision"
        near = 2e-2 if mixed else 1e-3
        assert first[name]["mixed"] == alone["mixed"] == {mixed}
        for row, expected in zip(first[name]["curves"], alone["curves"], strict=True):
            assert row["tokens"] == expected["tokens"]
            assert row == pytest.approx(expected, rel=near, abs=near if mixed else 1e-4), name
        differ = sum(int((first[name]["masks"][k] != v).sum()) for k, v in alone["masks"].items())
        if not mixed:
            assert differ <= 1e-3 * sum(v.numel() for v in alone["masks"].values()), (name, differ)
        for k, v in alone["weights"].items():
            torch.testing.assert_close(first[name]["weights"][k], v, rtol=0, atol=1e-2 if mixed else 1e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_see_different_batches_and_none_twice(tiny, monkeypatch, accumulate):
    """Two processes one after the other, each with a stand-in for accelerate: together they read 0, 1, 2, ..."""
    seen = []
    monkeypatch.setattr("sparseforge_fx.training.train.replicated", lambda module, trained, accelerator: module)
    for rank in range(2):
        found = tiny("mlp")

        class Data(Batches):
            def batch(self, step, rank=rank):
                seen.append((step, rank))
                return super().batch(step)

        alone = SimpleNamespace(
            num_processes=2, process_index=rank, is_main_process=False, mixed_precision="no", device=torch.device("cpu"),
            reduce=lambda value, reduction="sum": value, no_sync=lambda module: nullcontext(),
        )  # fmt: skip
        sparse = found.sparse(SparseForgeConfig(steps=3))
        train(sparse, Data(found), sparse.parameters(), Optimization(lr=1e-3, accumulate=accumulate), accelerator=alone, **QUIET)
    assert sorted(step for step, _ in seen) == list(range(6 * accumulate))
    assert sorted(step // 2 // accumulate for step, rank in seen if rank) == sorted([0, 1, 2] * accumulate)
