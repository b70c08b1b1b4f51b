"""Two processes that share one model do what one process does with it: FSDP2, masks by the whole weight, states."""

import functools

import pytest
import tiny_models
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from transformers import LlamaConfig, LlamaForCausalLM
from two_processes import run_two

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.gradual import GradualConfig
from sparseforge_fx.methods.learned import MaskLLMConfig
from sparseforge_fx.methods.part import kth_smallest, local
from sparseforge_fx.methods.soft_mask import SparseForgeConfig
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.pattern import Pattern, Unstructured, check_pattern, hard_mask
from sparseforge_fx.training.distillation import Distillation
from sparseforge_fx.training.prepare import finalize
from sparseforge_fx.training.sparse_model import SparseModel
from sparseforge_fx.training.train import Optimization, train

ANNEALED = SparseForgeConfig(steps=6, heat_end=0.3, quench_end=0.9, mask_rate=0.3)
#: model, config, dtype; the mixture trains so slowly that no token changes its expert
RUNS = {
    "llama": ("llama of one block", ANNEALED, 1e-3),
    "gpt2 in bfloat16": ("gpt2", GradualConfig(steps=3), 1e-3),
    "gpt2, four micro-batches": ("gpt2", ANNEALED, 1e-3),
    "mixed precision": ("gemma3", SparseForgeConfig(steps=3, heat_end=0.3, quench_end=0.9, mask_rate=0.3), 1e-4),
    "pruned": ("llama", SparseForgeConfig(steps=3, start="magnitude", heat_end=0.0, quench_end=0.0), 1e-3),
    "moe": ("moe", SparseForgeConfig(steps=3, heat_end=0.3, quench_end=0.9, mask_rate=0.3), 1e-6),
    "checkpointed and compiled": ("llama", ANNEALED, 1e-3),
    "8 bits": ("wide", SparseForgeConfig(steps=6, start="magnitude", heat_end=0.0, quench_end=0.0), 1e-3),
}


class Stop(Exception):
    pass


def wide():
    """A model of which half of a weight is large enough for moments in 8 bits."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, num_key_value_heads=1, initializer_range=0.2, **sizes))


@functools.cache
def captured(kind, dtype):
    """A model of weights of its own: what processes share, they take from it."""
    torch.manual_seed(0)
    model = (wide() if kind == "wide" else tiny_models.build(kind)).eval().to(dtype)
    program = tiny_models.capture(model, {"input_ids": torch.randint(3, 97, (2, 12))})
    return model, program, {name: p.detach().clone() for name, p in model.named_parameters()}


def ran(name, sharding=None, stop=None, **saved):
    """Curves, the model's weights, and how many entries of weights and masks were here, of a run of two micro-batches a
    step."""
    kind, config, lr = RUNS[name]
    model, program, first = captured(kind, torch.bfloat16 if "bfloat16" in name else torch.float32)
    for fqn, p in model.named_parameters():
        p.data = first[fqn].clone()
    sites, taught = tiny_models.find_linears(program), None
    if config.start != "dense":  # the model is pruned, and what it was teaches it
        taught = {fqn: p.clone() for fqn, p in first.items()}
        for site in eligible(sites):
            weight = model.get_parameter(site.fqn).data
            weight.mul_(hard_mask(weight.abs(), config.pattern, site.reduction_dim))
    sparse = SparseModel(program, sites, config, Distillation(), sharding=sharding, taught_by=taught)
    if config.start != "dense":
        sparse.calibrate([])
    if "compiled" in name:
        sparse.activation_checkpointing_enable()
        sparse.compile(backend="aot_eager")
    held = sum(local(t).numel() for t in (*sparse.graph.parameters(), *sparse.graph.buffers()) if 0 not in t.stride())

    mixed = set()
    sparse.register_forward_pre_hook(lambda *_: mixed.add(torch.is_autocast_enabled("cpu")))

    class Batches:
        def batch(self, index):
            return {"input_ids": torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(index))}

    def on_step(step, row):
        if step == stop:
            raise Stop

    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    micro = 4 if "four" in name else 2
    how = Optimization(lr=lr, accumulate=micro // ranks, optimizer="adamw8bit" if name == "8 bits" else "adamw")
    AcceleratorState._reset_state()
    saved["accelerator"] = Accelerator(cpu=True, mixed_precision="bf16" if name == "mixed precision" else "no")
    with pytest.MonkeyPatch.context() as patch:
        if name == "8 bits":  # torchao compiles its step, which takes longer than all that is tested here
            patch.setattr(torch, "compile", lambda function, **_: function)
        try:
            curves = train(sparse, Batches(), sparse.trainable(), how, compile=False, on_step=on_step, **saved)
        except Stop:
            return None
    tokens = {} if sparse.method.curvature is None else sparse.method.curvature.tokens
    finalize(sparse)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in curves]
    return {
        "curves": rows,
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "held": held,
        "mixed": mixed,
        "tokens": tokens,
    }


RANKS = """
import sys, torch
from pathlib import Path
from captures import share_captures
from sparseforge_fx.training import processes
from sparseforge_fx.training.sharded import sharding_of
from test_sharded import RUNS, decisions, ran
torch.set_num_threads(1)
share_captures()
folder, rank = Path(sys.argv[1]), sys.argv[2]
sharding = sharding_of(processes.accelerator(), [])
result = {name: ran(name, sharding) for name in RUNS}
saved = {"save_seconds": 0.0}
ran("llama", sharding, stop=3, state_path=folder / "by two", **saved)
result["resumed"] = ran("llama", sharding, state_path=folder / "by one", **saved)
ran("8 bits", sharding, stop=3, state_path=folder / "8 bits by two", **saved)
result["8 bits resumed"] = [
    ran("8 bits", sharding, state_path=folder / f"8 bits by {count}", **saved) for count in ("one", "two")
]
result["decisions"] = decisions(sharding)
torch.save(result, folder / f"{rank}.pt")
torch.distributed.destroy_process_group()
"""


def shapes():
    """Weights of random shapes, as they are stored, with their reduction dimension."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(6):
        rows, groups, experts = torch.randint(1, 9, (3,), generator=generator).tolist()
        yield (rows, 4 * groups), 1
        yield (4 * groups, 2 * rows), 0
        yield (8 * groups, 2 * rows + 1), 0  # uneven the other way
        yield (experts, rows, 4 * groups), 2
        yield (experts, 4 * groups, rows), 1


def decisions(sharding=None):
    """Masks after three updates of two methods, with curvatures that are not alike; and values by rank."""
    found = {}
    for number, (shape, dim) in enumerate(shapes()):
        generator = torch.Generator().manual_seed(number)
        weight = torch.randn(shape, generator=generator)
        curvature = torch.rand(shape, generator=generator) ** 4
        ours = lambda t: t  # noqa: E731
        part = None
        if sharding is not None:
            from torch.distributed.tensor import distribute_tensor

            from sparseforge_fx.methods.part import Part

            place = sharding.placement(shape, dim, Pattern(2, 4), "w")
            ours = lambda t, place=place: distribute_tensor(t, sharding.mesh, [place]).to_local().clone()  # noqa: E731
            part = Part.of(distribute_tensor(weight, sharding.mesh, [place]))
        for config in (
            ANNEALED,
            GradualConfig(steps=6),
            SparseForgeConfig(steps=6, heat_end=0.3, quench_end=0.9, gate="pattern"),
        ):
            w = MaskedWeight("w", ours(weight), torch.ones_like(ours(weight)), dim, part)
            method = config.build([w])
            for step in range(4):
                if method.curvature is not None:
                    method.curvature.fold("w", ours(curvature) * (step + 1))
                method.after_step(step)
            mask = w.whole(w.mask)
            key = (number, type(config).__name__, getattr(config, "gate", ""))
            found[key] = mask.clone() if part is None else mask.full_tensor()
            found[(*key, "flips")] = torch.tensor([method.flip_rate, *method.metrics().values()])
            method.fix()
            mask = w.whole(w.mask)
            found[(*key, "hard")] = mask.clone() if part is None else mask.full_tensor()
        if len(shape) == 2:
            found[number, "kth"] = torch.stack(
                [kth_smallest(ours(weight).flatten(), k, part) for k in (1, 2, weight.numel() // 2 + 1, weight.numel())]
            )
    return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What two processes made; the state that they left, and the one that they went on from."""
    folder = tmp_path_factory.mktemp("sharded")
    ran("llama", stop=3, state_path=folder / "by one", save_seconds=0.0)
    ran("8 bits", stop=3, state_path=folder / "8 bits by one", save_seconds=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        patch.setenv("FSDP_VERSION", "2")
        return folder, *run_two(RANKS, folder)


def test_curves_and_weights_are_those_of_one_process(shared):
    _, first, second = shared
    for name in RUNS:
        alone = ran(name)
        assert first[name]["curves"] == second[name]["curves"]
        assert first[name]["tokens"] == second[name]["tokens"] == alone["tokens"] and bool(alone["tokens"]) == (
            name == "moe"
        )
        half, rounded = "bfloat16" in name, name == "8 bits"  # whose blocks are those of a part
        mixed = name == "mixed precision"
        assert first[name]["mixed"] == alone["mixed"] == {mixed}
        near = 2e-2 if half or mixed else 1e-2 if rounded else 1e-5
        for row, expected in zip(first[name]["curves"], alone["curves"], strict=True):
            assert row == pytest.approx(expected, rel=near, abs=0.1 if half else near), name
        for fqn, value in alone["weights"].items():
            got = first[name]["weights"][fqn]
            if not half and not mixed:
                assert torch.equal(got != 0, value != 0), (name, fqn)
            torch.testing.assert_close(got, value, rtol=0, atol=0.5 if half or mixed else 2e-3 if rounded else 5e-4)
            assert second[name]["weights"][fqn].numel() == 0, fqn
        assert max(first[name]["held"], second[name]["held"]) <= 0.55 * alone["held"], name


def test_a_state_goes_on_on_another_number_of_processes(shared):
    folder, first, _ = shared
    whole = ran("llama")
    for resumed in (first["resumed"], ran("llama", state_path=folder / "by two", save_seconds=0.0)):
        for row, expected in zip(resumed["curves"], whole["curves"], strict=True):
            assert row == pytest.approx(expected, rel=1e-5, abs=1e-5)
        for fqn, value in whole["weights"].items():
            torch.testing.assert_close(resumed["weights"][fqn], value, rtol=0, atol=1e-6)


def test_moments_in_8_bits_go_on_on_another_number_of_processes(shared):
    """Rounded once more, in the blocks of other parts: near, not equal."""
    folder, first, second = shared
    whole = ran("8 bits")
    alone = ran("8 bits", state_path=folder / "8 bits by two", save_seconds=0.0)
    assert [r["curves"] for r in first["8 bits resumed"]] == [r["curves"] for r in second["8 bits resumed"]]
    for resumed in (*first["8 bits resumed"], alone):
        for row, expected in zip(resumed["curves"], whole["curves"], strict=True):
            assert row == pytest.approx(expected, rel=1e-2, abs=1e-2)
        for fqn, value in whole["weights"].items():
            torch.testing.assert_close(resumed["weights"][fqn], value, rtol=0, atol=2e-3)


def test_masks_are_decided_by_the_whole_weight(shared):
    """For random shapes and ways to cut them: the same masks, bit for bit, the same curves."""
    _, first, second = shared
    alone = decisions()
    assert set(alone) == set(first["decisions"])
    for key, value in alone.items():
        assert torch.equal(first["decisions"][key], second["decisions"][key]), key
        if key[-1] == "flips":  # of large weights a sample
            torch.testing.assert_close(first["decisions"][key], value, msg=str(key))
        elif key[-1] in ("kth", "hard"):
            assert torch.equal(first["decisions"][key], value), key
        else:
            torch.testing.assert_close(first["decisions"][key], value, rtol=0, atol=1e-5, msg=str(key))
        if key[-1] == "hard":
            number = key[0]
            assert check_pattern(value, Pattern(2, 4), list(shapes())[number][1])


class TwoProcesses:
    """A sharding that needs no second process, to ask."""

    class mesh:
        @staticmethod
        def size():
            return 2


@pytest.mark.parametrize(
    ("config", "others", "says"),
    [
        (MaskLLMConfig(steps=4), {}, "optimizer of whole weights; take sparseforge, gmp or imp"),
        (
            SparseForgeConfig(steps=4, start="alps", softness_start=0.5),
            {},
            "start 'alps' is for masks that are final from then on",
        ),
        (
            SparseForgeConfig(steps=4, start="magnitude", heat_end=0.0, quench_end=0.0, reconstruct=1),
            {},
            "reconstruct=0",
        ),
        (SparseForgeConfig(steps=4, curvature="hutchinson"), {}, "curvature hutchinson is not gathered in parts"),
        (SparseForgeConfig(steps=4, pattern=Unstructured(0.5)), {}, "50% has no groups; take N:M"),
        (ANNEALED, {"slorb_block": True}, "slorb block is for whole models"),
    ],
)
def test_what_cannot_be_shared_is_refused(tiny, config, others, says):
    from sparseforge_fx.training.sharded import Sharding

    sharding = Sharding.__new__(Sharding)
    sharding.mesh = TwoProcesses.mesh
    with pytest.raises(SparseForgeError, match=f"under FSDP.*{says}") as error:
        sharding.check(config, tiny("mlp").sites, **others)
    assert "\n" not in str(error.value)


def test_a_weight_that_would_be_cut_through_groups_is_named():
    from sparseforge_fx.training.sharded import Sharding

    sharding = Sharding.__new__(Sharding)
    sharding.mesh = TwoProcesses.mesh
    assert sharding.placement((8, 3), 0, Pattern(2, 4), "w").dim == 0
    assert sharding.placement((12, 4), 0, Pattern(2, 4), "w").dim == 1
    with pytest.raises(SparseForgeError, match=r"w \[12, 3\] cannot be cut into 2 parts without cutting groups of 4"):
        sharding.placement((12, 3), 0, Pattern(2, 4), "w")


def test_one_process_says_that_there_is_nothing_to_share(monkeypatch):
    from sparseforge_fx.training import processes
    from sparseforge_fx.training.sharded import sharding_of

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    notes = []
    assert sharding_of(processes.accelerator(), notes) is None
    assert len(notes) == 1 and "FSDP was asked for and does nothing" in notes[0]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cpu_offload": True}, "offload_params leaves masks .* leave it out"),
        ({"mixed_precision_policy": "bf16"}, "mixed_precision_policy gives .* take mixed_precision='bf16'"),
        ({"ignored_modules": [torch.nn.Linear(1, 1)]}, "ignored_modules name modules .* use exclude="),
    ],
)
def test_what_of_fsdp_masks_do_not_go_with_is_refused(given, says):
    from sparseforge_fx.training.sharded import _check_plugin

    with pytest.raises(SparseForgeError, match=says):
        _check_plugin(FullyShardedDataParallelPlugin(fsdp_version=2, **given), "no")


def test_what_accelerate_makes_of_a_mixed_precision_is_none_of_the_users():
    from sparseforge_fx.training.sharded import _check_plugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, activation_checkpointing=True)
    _check_plugin(plugin, "no")
    plugin.set_mixed_precision("bf16")
    _check_plugin(plugin, "bf16")


@pytest.mark.parametrize("asked", [False, True])
def test_the_plugins_activation_checkpointing_counts(monkeypatch, asked):
    from sparseforge_fx.training import sharded

    monkeypatch.setattr(sharded.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(sharded, "init_device_mesh", lambda *_: None)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, activation_checkpointing=asked)
    assert sharded.Sharding(plugin, torch.device("cpu")).computes_again is asked
