"""Two processes that read a checkpoint in parts write what one process makes of the whole of it."""

import json
import shutil

import pytest
import torch
import transformers
from launched import finish, kill_one, start, wait_for
from safetensors.torch import load_file
from tiny_checkpoint import byte_tokenizer, write_checkpoint, write_text
from two_processes import run_two

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.models.dense import load_dense
from sparseforge_fx.models.streamed import StreamedModel
from sparseforge_fx.pattern import Pattern, check_pattern, hard_mask
from sparseforge_fx.training.from_disk import sparsify_on_disk
from sparseforge_fx.training.in_parts import copy_checkpoint
from sparseforge_fx.training.sparsify import sparsify

SIZES = {"vocab_size": 260, "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 64}
SIZES |= {"intermediate_size": 64, "initializer_range": 0.2}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_hidden_layers=4, tie_word_embeddings=True),
    "mixtral": lambda: transformers.MixtralConfig(
        **SIZES, num_hidden_layers=2, num_key_value_heads=1, num_local_experts=2
    ),
}
COMMON = {"length": 16, "batch_size": 2, "steps": 3}
#: name -> folder of the model, of its teacher, options
RUNS = {
    "annealed": ("llama", None, {"preset": "annealed", "heat_end": 0.3, "quench_end": 0.9, "lr": 1e-3}),
    "healed": ("pruned", "llama", {"start": "magnitude", "lr": 1e-3, "reconstruct": 0, "reorder": False}),
    "experts in bfloat16 files": ("mixtral", None, {"method": "gmp", "lr": 1e-6}),
    "the default preset": ("llama", None, {"lr": 1e-3, "calibration": 6}),
    "the paper's preset": ("llama", None, {"preset": "paper", "curvature": "gauss_newton", "lr": 1e-3}),
}
IN_MEMORY = {"length": 16, "batch_size": 2, "tokens": 192, "calibration": 6, "reconstruct": 1, "lr": 1e-3}


def write_models(folder):
    """A model of each kind in several files, and one that is 2:4."""
    for kind, config in CONFIGS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config())
        if kind == "mixtral":
            model = model.to(torch.bfloat16)
        model.save_pretrained(folder / kind, max_shard_size="60KB")
        byte_tokenizer().save_pretrained(folder / kind)
    model, tokenizer = load_dense(folder / "llama")
    for name, p in model.named_parameters():
        if ".layers." in name and p.dim() == 2:
            p.data.mul_(hard_mask(p.data.abs(), Pattern(2, 4)))
    model.save_pretrained(folder / "pruned")
    tokenizer.save_pretrained(folder / "pruned")
    write_text(folder / "text.txt", 20)


def in_parts(folder, name, **how):
    model, teacher, options = RUNS[name]
    source = StreamedModel(folder / model)
    source.compute_in(torch.float32)
    teacher = {} if teacher is None else {"teacher": folder / teacher}
    how |= {"activation_checkpointing": name == "healed"}
    if name == "the default preset":
        how = {"state_path": folder / "state", "save_seconds": 0.0} | how
    return sparsify(source, str(folder / "text.txt"), **COMMON, **options, **teacher, **how, accumulate=1)


RANKS = """
import sys, torch
from pathlib import Path
from captures import share_captures
from torch.multiprocessing.reductions import StorageWeakRef
from sparseforge_fx.models.streamed import StreamedModel
from test_in_parts import IN_MEMORY, RUNS, in_parts, load_dense, sparsify
torch.set_num_threads(1)
share_captures()
folder, rank = Path(sys.argv[1]), sys.argv[2]
alive, most = [], 0
fetch = StreamedModel.fetch

def watched(self, name, shards=None):
    global most
    value = fetch(self, name, shards)
    alive[:] = [(ref, size) for ref, size in alive if not ref.expired()]
    alive.append((StorageWeakRef(value.untyped_storage()), value.numel()))
    most = max(most, sum(size for _, size in alive))
    return value

StreamedModel.fetch = watched
found = {}
for name in RUNS:
    most = 0
    result = in_parts(folder, name)
    here = sum(p.to_local().numel() if hasattr(p, "to_local") else 0 for p in result.model.parameters())
    result.save(folder / "out" / name, result.in_parts.model.tokenizer)
    told = {n: result.report[n] for n in ("density", "curves", "notes")}
    found[name] = {"most": most, "here": here, **told}

def stop(step, row):
    if step == 1:
        raise InterruptedError

for name in ("annealed", "the default preset"):
    try:
        in_parts(folder, name, state_path=folder / f"stopped {name}", save_seconds=0.0, on_step=stop)
    except InterruptedError:
        pass
loaded, tokenizer = load_dense(folder / "llama", dtype="float32")
result = sparsify(loaded, str(folder / "text.txt"), **IN_MEMORY, tokenizer=tokenizer)
found["in memory"] = {"curves": result.report["curves"], "report": result.report, "weights": loaded.state_dict()}
torch.save(found, folder / f"{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    write_models(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        patch.setenv("FSDP_VERSION", "2")
        return folder, *run_two(RANKS, folder)


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("name", RUNS)
def test_the_files_are_those_of_a_run_in_memory(ran, tmp_path, name):
    folder, first, second = ran
    model, teacher, options = RUNS[name]
    if name == "the default preset":  # by hand: a start from disk, which is then healed
        start = {"method": "alps", "calibration": 6, "length": 16, "batch_size": 2, "dtype": "float32"}
        report = sparsify_on_disk(folder / model, str(folder / "text.txt"), output=tmp_path / "start", **start)
        model, teacher, options = tmp_path / "start", model, RUNS["healed"][2]
    elif name == "the paper's preset":
        assert any("slorb_block 64 is left out: the processes share the weights" in n for n in first[name]["notes"])
        options = options | {"slorb_block": 0}
    loaded, tokenizer = load_dense(folder / model, dtype="float32")
    options = options if teacher is None else options | {"teacher": folder / teacher}
    alone = sparsify(
        loaded, str(folder / "text.txt"), **COMMON, **options, tokenizer=tokenizer, accumulate=2, compile=False
    )
    assert first[name]["curves"][-1]["loss"] == second[name]["curves"][-1]["loss"]
    for row, expected in zip(first[name]["curves"], alone.report["curves"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["tokens"] == expected["tokens"]
    out, source = folder / "out" / name, folder / model
    assert {f.name for f in source.iterdir()} <= {f.name for f in out.iterdir()}
    before, after = tensors(source), tensors(out)
    assert {k: (v.dtype, v.shape) for k, v in before.items()} == {k: (v.dtype, v.shape) for k, v in after.items()}
    assert any(not torch.equal(before[k], after[k]) for k in before)
    again, _ = load_dense(out, dtype="float32")
    state = again.state_dict()
    for fqn, value in loaded.state_dict().items():
        torch.testing.assert_close(state[fqn], value, rtol=0.01 if "bfloat16" in name else 0, atol=5e-4, msg=fqn)
    sites = [s["name"] for s in alone.report["sites"]]
    assert sites and all(check_pattern(state[fqn], Pattern(2, 4), state[fqn].dim() - 1) for fqn in sites)
    assert first[name]["density"] == second[name]["density"] == dict.fromkeys(sites, 0.5)
    assert json.loads((out / "report.json").read_text())["tokens"] == alone.report["tokens"]
    assert (out / "report.html").is_file() and (out / "recipe.yaml").is_file()
    if name == "the default preset":
        told = json.loads((out / "report.json").read_text())
        assert any("the start alps was solved from disk, block by block, on the CPU, without the preset's reorder and reconstruct" in n for n in told["notes"])  # fmt: skip
        assert told["config"]["start"] == "alps" and not told["config"]["reorder"] and told["recipe"]["options"] == {}
        assert told["calibration_sequences"] == 6 and 0 < told["calibration_seconds"] < told["seconds"]
        assert {n: v["error"] for n, v in told["layers"].items()} == pytest.approx(report["layer_errors"], rel=1e-3)


@pytest.mark.parametrize("name", RUNS)
def test_no_process_holds_the_whole_model(ran, name):
    folder, *both = ran
    whole = sum(p.numel() for p in load_dense(folder / RUNS[name][0])[0].parameters())
    for rank in both:
        assert rank[name]["here"] <= 0.51 * whole
        assert rank[name]["most"] <= (0.4 if name != "experts in bfloat16 files" else 0.55) * whole


def test_a_start_that_is_not_this_runs_is_refused(ran):
    from sparseforge_fx.training.in_parts import InParts
    from sparseforge_fx.training.recipe import Recipe
    from sparseforge_fx.training.shared_start import SharedStart

    folder = ran[0]
    recipe = Recipe(**COMMON, calibration=5)
    start = SharedStart.of(recipe.config(True), recipe, True)
    source = StreamedModel(folder / "llama")
    with pytest.raises(SparseForgeError, match=r"state-start is the start of another run \(its calibration differ\)"):
        start.from_disk(InParts(source), "text", recipe, folder / "state", None)
    with pytest.raises(SparseForgeError, match="is written beside the training state: give state_path"):
        start.from_disk(InParts(source), "text", recipe, None, None)
    same = recipe.changed(calibration=6, every_token=True, expert_tokens=8)
    start = SharedStart.of(same.config(True), same, True)
    with pytest.raises(SparseForgeError, match=r"is the start of another run \(its options differ\)"):
        start.from_disk(InParts(source), "text", same, folder / "state", None)
    assert (start.trained.every_token, start.trained.expert_tokens) == (False, 32)
    with pytest.raises(SparseForgeError, match="reconstruct needs the whole model in memory, and this one stays"):
        SharedStart.of(recipe.config(True), recipe.changed(reconstruct=2), True)
    assert SharedStart.of(recipe.changed(preset="annealed").config(True), recipe, True) is None


def test_one_process_alone_does_not_train_from_disk(ran):
    with pytest.raises(SparseForgeError, match="stays on disk is trained by several processes"):
        in_parts(ran[0], "annealed")


def test_what_a_model_on_disk_cannot_have_is_refused(ran, tiny):
    folder, text = ran[0], str(ran[0] / "text.txt")
    with pytest.raises(SparseForgeError, match="a model on disk has no teacher in memory"):
        sparsify(StreamedModel(folder / "llama"), text, teacher=tiny("llama").model, **COMMON)
    with pytest.raises(SparseForgeError, match="a model in memory has no teacher on disk"):
        sparsify(tiny("llama").model, text, teacher=StreamedModel(folder / "llama"), **COMMON)
    with pytest.raises(SparseForgeError, match=r"does not train walks through a model on disk: sf.sparsify_on_disk"):
        sparsify(StreamedModel(folder / "llama"), text, method="wanda")
    with pytest.raises(SparseForgeError, match="draws no text"):
        sparsify(StreamedModel(folder / "llama"), "self", **COMMON)
    used = StreamedModel(folder / "llama")
    used.skeleton.lm_head.weight = torch.nn.Parameter(torch.zeros(260, 32))
    with pytest.raises(SparseForgeError, match="has been through a run"):
        sparsify(used, text, **COMMON)
    with pytest.raises(SparseForgeError, match="the teacher has"):
        sparsify(StreamedModel(folder / "llama"), text, teacher=folder / "mixtral", **COMMON, preset="annealed")


def test_a_model_in_memory_has_the_whole_start(ran):
    """Channels in another order, blocks that learn: as on one process, before the model is cut up."""
    folder, first, second = ran
    loaded, tokenizer = load_dense(folder / "llama", dtype="float32")
    alone = sparsify(
        loaded, str(folder / "text.txt"), **IN_MEMORY, tokenizer=tokenizer, accumulate=2, compile=False
    ).report
    told = first["in memory"]["report"]
    assert told["config"] == alone["config"] and told["config"]["reorder"] and told["config"]["reconstruct"] == 1
    assert told["reconstruction"] == alone["reconstruction"] and told["layer_notes"] == alone["layer_notes"]
    assert first["in memory"]["curves"][-1]["loss"] == second["in memory"]["curves"][-1]["loss"]
    for row, expected in zip(told["curves"], alone["curves"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    for fqn, value in loaded.state_dict().items():
        torch.testing.assert_close(first["in memory"]["weights"][fqn], value, rtol=0, atol=5e-4, msg=fqn)


@pytest.mark.parametrize("name", ["annealed", "the default preset"])
def test_what_two_began_in_parts_one_ends_in_memory(ran, tmp_path, name):
    folder, first, _ = ran
    loaded, tokenizer = load_dense(folder / "llama", dtype="float32")
    shutil.copytree(folder / f"stopped {name}", tmp_path / "state")
    options = RUNS[name][2] | {"state_path": tmp_path / "state", "tokenizer": tokenizer, "accumulate": 1}
    report = sparsify(loaded, str(folder / "text.txt"), **COMMON, **options, compile=False).report
    assert any("goes on on 1 processes, with 2 micro-batches" in note for note in report["notes"])
    assert any("the start alps was solved from disk" in n for n in report["notes"]) == (name != "annealed")
    for row, expected in zip(report["curves"], first[name]["curves"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)


ON_TWO = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def command(folder, out):
    short = ["--length", "16", "--batch-size", "2", "--tokens", "256", "--calibration", "6", "--save-seconds", "0"]
    return ["sparsify", str(folder / "llama"), "--device", "disk", "--data", str(folder / "text.txt"), *short, "--dtype", "float32", "-o", str(out)]  # fmt: skip


@pytest.mark.slow
def test_the_command_line_goes_on_after_a_kill_within_the_start(ran, tmp_path):
    """As accelerate launches it: the default preset, killed, and once more."""
    folder = ran[0]
    whole = start(command(folder, tmp_path / "whole"), tmp_path, **ON_TWO)
    code, said, errors = finish(whole)
    assert code == 0 and "without the preset's reorder and reconstruct" in said.replace("\n", " "), (said, errors)
    assert "every process loads the whole model" not in errors

    out = tmp_path / "killed"
    run = start(command(folder, out), tmp_path, **ON_TWO)
    begun = out / "training-state-start.unfinished" / "sparseforge-journal.json"
    wait_for(run, lambda: begun.is_file() and "border" in begun.read_text())
    kill_one(run, 0)
    assert finish(run)[0] != 0 and not (out / "config.json").exists()
    code, _, errors = finish(start(command(folder, out), tmp_path, **ON_TWO))
    assert code != 0 and "holds a run that was not finished: give --resume" in errors
    code, _, errors = finish(start([*command(folder, out), "--resume"], tmp_path, **ON_TWO))
    assert code == 0 and "starting anew" not in errors, errors
    assert {f.name for f in out.iterdir()} == {f.name for f in (tmp_path / "whole").iterdir()}
    mine, theirs = tensors(out), tensors(tmp_path / "whole")
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())


def test_a_copy_of_a_checkpoint_has_its_weights_in_one_format(tmp_path):
    source = StreamedModel(write_checkpoint(tmp_path / "in"))
    kept = {"bpe.codes", "spiece.model", "vocab.txt", "modeling_x.py", "model.safetensors.index.json"}
    kept |= {file.name for file in source.folder.iterdir()}
    others = {"pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5"}
    others |= {"flax_model.msgpack", "flax_model.msgpack.index.json", "rust_model.ot", "model.onnx", "model.onnx_data"}
    others |= {"MODEL.ONNX", "model.ckpt.index", "model.pt2", "optimizer.pt", "m.Q4_K.gguf", "adapter.safetensors"}
    for name in kept | others:
        (source.folder / name).touch()
    (tmp_path / "out").mkdir()
    copy_checkpoint(source, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == kept
