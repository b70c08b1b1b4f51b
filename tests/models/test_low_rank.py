"""SLoRB's branches: where they start in a run, where they may not stand, and that no file loses them."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoint import byte_tokenizer, tiny_llama
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.models import low_rank
from sparseforge_fx.models.dense import write_checkpoint
from sparseforge_fx.passes.insert_low_rank import branch_names

BLOCK = 8


def means(value, dim=1):
    """[out, in / BLOCK] of a weight."""
    return value.detach().movedim(dim, -1).float().unflatten(-1, (-1, BLOCK)).mean(-1)


def s_of(sparse, w):
    return sparse.program.tensor(branch_names(w.fqn)[1]).detach()


# -- where they start ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["ast", "sr-ste"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mlp"])
def test_masks_that_are_hard_from_the_start_hand_the_pruned_part_over(captured_once, name, method):
    """AST's eq. 6: S is the mean of every block of W (1 - m)."""
    found = captured_once(name)
    sparse = sf.prepare(found.model, found.example, sf.configure(method, 4), slorb_block=BLOCK)
    assert len(sparse.branches) == len(sparse.method.weights) > 0 and sparse.handed_over
    for w in sparse.method.weights:
        pruned = w.weight * (1 - w.mask)
        assert pruned.any()
        torch.testing.assert_close(s_of(sparse, w), means(pruned, w.dim))


def test_in_half_precision_the_start_is_in_the_masters(captured_once):
    model = copy.deepcopy(captured_once("mlp").model).bfloat16()
    data = [torch.randn(2, 16).bfloat16() for _ in range(4)]
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"steps": 2, "lr": 1e-9, "show_progress": False, "compile": False}
    sf.sparsify(model, data, method="ast", slorb_block=BLOCK, **options)
    for name, branch in low_rank.branches(model).items():
        pruned = torch.where(model.get_submodule(name).weight == 0, first[f"{name}.weight"], 0)
        torch.testing.assert_close(branch.s.float(), means(pruned), atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("softness", [0.0, 0.5])
@pytest.mark.parametrize("start", ["wanda", "sparsegpt"])
def test_a_layer_wise_start_hands_over_what_no_survivor_took(captured_once, start, softness):
    """Wanda's survivors stay as they are: eq. 6 again. SparseGPT's carry what was pruned: nothing is left."""
    found = captured_once("llama")
    batches = [found.batch(seed, rows=4) for seed in range(3)]
    config = sf.alps_kd_preset(4, start=start, softness_start=softness, quench_end=0.7 if softness else 0.0)
    sparse = sf.prepare(found.model, found.example, config, calibration=batches, slorb_block=BLOCK)
    for _ in range(4):
        sparse.step()
    assert sparse.handed_over
    for w in sparse.method.weights:
        wanted = means(found.first[w.fqn] * (1 - w.mask), w.dim) * (start == "wanda")
        torch.testing.assert_close(s_of(sparse, w), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["sparseforge", "gmp", "imp"])
def test_masks_that_harden_by_and_by_hand_over_in_parts(captured_once, method):
    """Without an optimizer's steps the parts add up to eq. 6."""
    found = captured_once("mlp")
    preset = {"preset": "paper", "score": "magnitude"} if method == "sparseforge" else {}
    sparse = sf.prepare(found.model, found.example, sf.configure(method, 8, **preset), slorb_block=BLOCK)
    assert not sparse.handed_over and not any(b.s.any() for b in sparse.branches)
    sizes = []
    for _ in range(8):
        sparse.step()
        sizes.append(sum(b.s.detach().abs().sum().item() for b in sparse.branches))
    assert 0 < sizes[0] < sizes[-1] and sparse.handed_over
    for w in sparse.method.weights:
        torch.testing.assert_close(s_of(sparse, w), means(w.weight * (1 - w.mask)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["cast", "maskllm"])
def test_methods_that_prune_at_the_end_hand_over_there(captured_once, method):
    found = captured_once("mlp")
    sparse = sf.prepare(found.model, found.example, sf.configure(method, 2, start="dense"), slorb_block=BLOCK)
    sparse.optimizer(lr=0.0)
    sparse.step()
    assert not any(b.s.any() for b in sparse.branches)
    dense = {w.fqn: w.weight.detach().clone() for w in sparse.method.weights}
    before = {w.fqn: means(w.weight * w.mask) for w in sparse.method.weights}
    sf.finalize(sparse)
    for b in sparse.branches:
        fqn = b.weight.fqn
        torch.testing.assert_close(
            b.s.detach(), before[fqn] - means(found.model.get_parameter(fqn)), atol=1e-6, rtol=1e-4
        )
        assert b.s.any() and dense[fqn].any()
    for module in found.model.modules():
        low_rank.detach(module)


# -- where they may not stand ----------------------------------------------------------------------------------------
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x):
        return self.norm(self.b(self.a(x, x, x)[0]))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x):
        return self.norm(nn.functional.linear(self.b(x), self.a.weight, self.a.bias))


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.norm(self.b(self.a(x).relu()))


REFUSED = {
    "a part of another module": (Attention, r"a\.(in_proj_|out_proj\.)weight"),
    "used without its module": (Functional, r"a\.weight .*used without calling its module"),
    "a class of the user": (lambda: nn.Sequential(Own(16, 16), nn.LayerNorm(16)), r"0\.weight .*a Own, no plain"),
    "shared": (Tied, r"a\.weight .*it is also b\.weight"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name_before_training(what):
    build, says = REFUSED[what]
    model = build().eval()
    first = copy.deepcopy(model.state_dict())
    with pytest.raises(SparseForgeError, match=rf"slorb_block: {says}.*exclude it") as error:
        sf.sparsify(model, [torch.randn(2, 4, 16)], method="ast", slorb_block=8, steps=2, show_progress=False)
    assert "\n" not in str(error.value)
    assert all(torch.equal(v, first[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
def test_methods_without_training_refuse_them(captured_once, method):
    found = captured_once("mlp")
    with pytest.raises(SparseForgeError, match=f"slorb_block: method {method} trains no low-rank branch"):
        sf.sparsify(found.model, [torch.randn(2, 16)], method=method, slorb_block=8)


@pytest.mark.parametrize("block", [0, -8])
def test_no_block_is_no_branch_and_zero_is_refused(captured_once, block):
    found = captured_once("mlp")
    with pytest.raises(SparseForgeError, match=f"slorb_block is {block}: give a whole number from 1"):
        sf.prepare(found.model, found.example, sf.configure("ast", 2), slorb_block=block)


# -- in files --------------------------------------------------------------------------------------------------------
IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(scope="module")
def trained():
    model = tiny_llama(num_hidden_layers=1)
    result = sf.sparsify(
        model, torch.randint(0, 250, (8, 12)), method="ast", slorb_block=BLOCK, steps=4, batch_size=2, length=12,
        lr=1e-2, show_progress=False, compile=False,
    )  # fmt: skip
    assert any("from_pretrained leaves them out" in note for note in result.report["notes"])
    model.eval()
    return model, model(IDS).logits.detach()


def test_a_second_run_is_refused(trained):
    with pytest.raises(SparseForgeError, match="has low-rank branches already"):
        sf.sparsify(copy.deepcopy(trained[0]))


def test_dense_folders_keep_them(trained, tmp_path):
    model, wanted = trained
    write_checkpoint(model, byte_tokenizer(), tmp_path / "m")
    again, _ = sf.load(tmp_path / "m")
    assert torch.equal(again(IDS).logits, wanted)
    again.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    byte_tokenizer().save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(sf.load(tmp_path / "shards")[0](IDS).logits, wanted)
    half, _ = sf.load(tmp_path / "m", dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(half(IDS).logits.float(), wanted, atol=0.1, rtol=0.1)


def test_packed_folders_keep_them(trained, tmp_path):
    model, wanted = trained
    report = sf.save_packed(model, byte_tokenizer(), tmp_path / "p")
    assert len(report["sites"]) == 7
    write_checkpoint(sf.load(tmp_path / "p")[0].dequantize(), byte_tokenizer(), tmp_path / "dense")
    for loaded in (
        sf.load(tmp_path / "p")[0],
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "p"),
        sf.load(tmp_path / "dense")[0],
    ):
        torch.testing.assert_close(loaded(IDS).logits, wanted)
    sf.load(tmp_path / "p")[0].save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")(IDS).logits, wanted
    )
    half = sf.load(tmp_path / "p", dtype="bfloat16")[0]
    assert {b.s.dtype for b in low_rank.branches(half).values()} == {torch.bfloat16}


@pytest.mark.parametrize("how", ["lower_modules", "lower", "export", "quantize"])
def test_deployed_models_keep_them(trained, tmp_path, how):
    model, wanted = copy.deepcopy(trained[0]), trained[1]
    if how == "lower_modules":
        assert len(sf.lower_modules(model, gate=False)["sites"]) == 7
        torch.testing.assert_close(model(IDS).logits, wanted)
    elif how == "lower":
        torch.testing.assert_close(sf.lower(model, {"input_ids": IDS}, gate=False)(input_ids=IDS)["logits"], wanted)
    elif how == "export":
        sf.export(model, tmp_path / "m.pt2", {"input_ids": IDS}, portable=True)
        torch.testing.assert_close(torch.export.load(tmp_path / "m.pt2").module()(input_ids=IDS)["logits"], wanted)
    else:
        sf.quantize(model)
        assert len(low_rank.branches(model)) == 7
        torch.testing.assert_close(model(IDS).logits, wanted, atol=0.2, rtol=0.2)


@pytest.mark.parametrize("edit", ["no s", "no x", "shape", "no linear"])
def test_branches_that_fit_nothing_are_refused(trained, tmp_path, edit):
    model, _ = trained
    write_checkpoint(model, byte_tokenizer(), tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    state = load_file(file)
    name = next(k for k in state if k.endswith(".slorb.x")).removesuffix(".x")
    if edit.startswith("no ") and len(edit) == 4:
        del state[f"{name}.{edit[-1]}"]
    elif edit == "shape":
        state[f"{name}.x"] = state[f"{name}.x"][:, :4].contiguous()
    else:
        state["model.norm.slorb.x"], state["model.norm.slorb.s"] = torch.ones(2, 32), torch.ones(32, 2)
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(SparseForgeError, match=r"low-rank branch of .* fits no linear here"):
        sf.load(tmp_path / "m")


def test_other_hooks_still_keep_a_linear_dense(trained):
    model = copy.deepcopy(trained[0])
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: output)
    report = sf.lower_modules(model, gate=False)
    reasons = {s["name"]: s["reason"] for s in report["skipped"]}
    assert reasons["model.layers.0.mlp.up_proj"] == "it has hooks, or a forward of its own, which a packed linear would not call"
