"""Two processes that read a checkpoint in parts write what one process makes of the whole of it."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_checkpoint import byte_tokenizer, write_text
from two_processes import run_two

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.models.dense import load_dense
from sparseforge_fx.models.shards import Shards
from sparseforge_fx.models.streamed import StreamedModel
from sparseforge_fx.pattern import Pattern, check_pattern, hard_mask
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
}


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


def in_parts(folder, name):
    model, teacher, options = RUNS[name]
    source = StreamedModel(folder / model)
    source.compute_in(torch.float32)
    teacher = {} if teacher is None else {"teacher": folder / teacher}
    return sparsify(source, str(folder / "text.txt"), **COMMON, **options, **teacher, accumulate=1)


RANKS = """
import sys, torch
from pathlib import Path
from torch.multiprocessing.reductions import StorageWeakRef
from sparseforge_fx.models.streamed import StreamedModel
from test_in_parts import RUNS, in_parts
torch.set_num_threads(1)
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
    density = result.report["density"]
    found[name] = {"most": most, "here": here, "density": density, "curves": result.report["curves"]}
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


@pytest.mark.parametrize("name", RUNS)
def test_no_process_holds_the_whole_model(ran, name):
    folder, *both = ran
    whole = sum(p.numel() for p in load_dense(folder / RUNS[name][0])[0].parameters())
    for rank in both:
        assert rank[name]["here"] <= 0.51 * whole
        assert rank[name]["most"] <= (0.3 if name != "experts in bfloat16 files" else 0.55) * whole


def test_one_process_alone_does_not_train_from_disk(ran):
    with pytest.raises(SparseForgeError, match="stays on disk is trained by several processes"):
        in_parts(ran[0], "annealed")


def test_teachers_are_where_the_model_is(ran, tiny):
    folder, text = ran[0], str(ran[0] / "text.txt")
    with pytest.raises(SparseForgeError, match="a model on disk has no teacher in memory"):
        sparsify(StreamedModel(folder / "llama"), text, teacher=tiny("llama").model, **COMMON)
    with pytest.raises(SparseForgeError, match="a model in memory has no teacher on disk"):
        sparsify(tiny("llama").model, text, teacher=StreamedModel(folder / "llama"), **COMMON)
    with pytest.raises(SparseForgeError, match="the teacher has"):
        sparsify(StreamedModel(folder / "llama"), text, teacher=folder / "mixtral", **COMMON, preset="annealed")


def test_shards_are_a_mapping_of_what_is_in_the_files(ran):
    shards = Shards(ran[0] / "llama")
    written = tensors(ran[0] / "llama")
    assert len(shards.files) > 1 and set(shards) == set(written) and len(shards) == len(written)
    assert all(torch.equal(shards[name], value) for name, value in written.items())
