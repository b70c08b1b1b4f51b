"""The whole job in one call: every method on every kind of model, what it leaves as it was, and what it refuses."""

import contextlib
import json

import pytest
import tiny_models
import torch
from torch import nn
from torch.utils.data import DataLoader

import sparseforge_fx as sf
from sparseforge_fx.data.drawn_text import draw_text
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph import compile as compile_module
from sparseforge_fx.methods.catalog import METHODS, TRAINED
from sparseforge_fx.pattern import Pattern, check_pattern, hard_mask, parse_pattern
from sparseforge_fx.training.distillation import Distillation

TWO_FOUR = Pattern(2, 4)
SMALL = {
    "steps": 4,
    "batch_size": 2,
    "length": 12,
    "calibration": 4,
    "compile": False,
    "show_progress": False,
    "lr": 1e-3,
    "slorb_block": 0,  # models are shared, and a branch would stay
}


def data_for(found, count=8):
    """Token ids [n, 12] for language models, batches of two for the others."""
    if isinstance(found.example, dict):
        return torch.cat([found.batch(seed, rows=1)["input_ids"] for seed in range(count)])
    return [found.batch(seed, rows=2) for seed in range(count)]


def assert_exact(found, pattern=TWO_FOUR):
    for site in found.sites:
        if site.reason is None:
            value = found.model.get_parameter(site.fqn)
            assert torch.isfinite(value).all()
            assert check_pattern(value, pattern, site.reduction_dim), site.fqn
            assert torch.count_nonzero(value) == value.numel() * pattern.n // pattern.m, site.fqn


def untouched(found):
    return all(torch.equal(v, found.first[k]) for k, v in found.model.state_dict().items())


# -- every method ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mlp"])
@pytest.mark.parametrize("method", [*METHODS, "sparseforge of the paper"])
def test_every_method_on_every_kind_of_model(captured_once, method, name):
    found = captured_once(name)
    options = SMALL | {"method": method.split()[0]} | ({"preset": "paper"} if "paper" in method else {})
    result = sf.sparsify(found.model, None if method == "magnitude" else data_for(found), **options)
    assert result.model is found.model
    assert_exact(found)
    sites = {s.fqn for s in found.sites if s.reason is None}
    for fqn, value in found.model.state_dict().items():
        if fqn not in sites and value.dim() == 2:
            assert torch.equal(value, found.first[fqn]), fqn  # embeddings and heads keep their values
    batch = found.batch()
    output = found.model(**batch).logits if isinstance(batch, dict) else found.model(batch)
    assert torch.isfinite(output).all()
    report = result.report
    assert report["method"] == options["method"] and report["pattern"] == "2:4"
    assert {s["name"] for s in report["sites"]} == sites == set(report["density"])
    assert set(report["density"].values()) == {0.5}
    assert all(s["reason"] for s in report["skipped"])
    assert report["seconds"] > 0 and report["peak_memory_bytes"] > 1 << 20
    assert report["versions"]["torch"] == torch.__version__
    if options["method"] in TRAINED:
        assert len(report["curves"]) == 4 and report["config"]["steps"] == 4
        assert report["tokens"] == 4 * 2 * (1 if name == "mlp" else 12)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", [*METHODS, "sparseforge of the paper", "sparseforge with blocks that learn"])
def test_every_method_on_a_gpu_with_data_from_the_cpu(method, device="cuda"):
    torch.manual_seed(0)
    model = tiny_models.build("llama").to(device)
    data = torch.randint(3, tiny_models.VOCABULARY, (8, 12))
    options = SMALL | {"method": method.split()[0]} | ({"preset": "paper"} if "paper" in method else {})
    options |= {"reorder": True, "reconstruct": 1} if "blocks" in method else {}
    report = sf.sparsify(model, None if method == "magnitude" else data, **options).report
    assert report["sites"] and all(check_pattern(model.get_parameter(s["name"]), TWO_FOUR) for s in report["sites"])
    assert {p.device.type for p in model.parameters()} == {device}
    ids = data[:2].to(device)
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_magnitude_is_what_it_says(captured_once):
    found = captured_once("gpt2")
    sf.sparsify(found.model)
    for site in found.sites:
        first = found.first[site.fqn]
        expected = first * hard_mask(first.abs(), TWO_FOUR, site.reduction_dim) if site.reason is None else first
        assert torch.equal(found.model.get_parameter(site.fqn), expected), site.fqn


@pytest.mark.parametrize("pattern", ["1:4", "4:8"])
@pytest.mark.parametrize("method", METHODS)
def test_other_patterns(method, pattern):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.LayerNorm(16))
    data = None if method == "magnitude" else [torch.randn(4, 16) for _ in range(2)]
    example = torch.randn(2, 16) if data is None else None
    sf.sparsify(model, data, method=method, pattern=pattern, example_inputs=example, **SMALL)
    n, m = parse_pattern(pattern)
    for layer in (model[0], model[2]):
        assert ((layer.weight.reshape(-1, m) != 0).sum(-1) == n).all()


@pytest.mark.parametrize("method", METHODS)
def test_unstructured(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(15, 24), nn.Tanh(), nn.Linear(24, 15), nn.LayerNorm(15))  # 15: no whole groups
    data = None if method == "magnitude" else [torch.randn(4, 15) for _ in range(2)]
    example = torch.randn(2, 15) if data is None else None
    options = SMALL | ({"preset": "paper"} if method == "sparseforge" else {})
    if method in ("maskllm", "maskpro"):
        with pytest.raises(SparseForgeError, match=f"{method}.*70%.*take N:M"):
            sf.sparsify(model, data, method=method, pattern="70%", example_inputs=example, **options)
        return
    sf.sparsify(model, data, method=method, pattern="70%", example_inputs=example, **options)
    for layer in (model[0], model[2]):
        rows, columns = layer.weight.shape
        kept = rows * int(0.3 * columns) if method == "wanda" else round(0.3 * rows * columns)
        assert torch.count_nonzero(layer.weight) == kept


def divergence(found, dense, batches):
    with torch.no_grad():
        sparse = [found.model(**b).logits.log_softmax(-1) for b in batches]
    return sum(
        nn.functional.kl_div(s, d, log_target=True, reduction="sum").item() for s, d in zip(sparse, dense, strict=True)
    )


@pytest.mark.parametrize("preset", TRAINED["sparseforge"])
def test_training_brings_the_model_nearer_than_magnitude(captured_once, preset):
    found = captured_once("llama of one block")
    ids = data_for(found, 16)
    batches = [{"input_ids": ids}]
    with torch.no_grad():
        dense = [found.model(**b).logits.log_softmax(-1) for b in batches]
    sf.sparsify(found.model)
    by_size = divergence(found, dense, batches)
    found.reset()
    options = SMALL | {"steps": 40, "lr": 3e-3, "batch_size": 8, "calibration": 16}
    sf.sparsify(found.model, ids, preset=preset, objective=Distillation(task=0.0), **options)
    assert divergence(found, dense, batches) < 0.6 * by_size


# -- what it leaves as it was ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_modes_gradients_and_flags_come_back(captured_once, method):
    found = captured_once("llama of one block")
    model = found.model
    model.train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(False)
    modes = {n: m.training for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    cache = model.config.use_cache
    identity = {n: id(p) for n, p in model.named_parameters()}
    sf.sparsify(model, None if method == "magnitude" else data_for(found), method=method, **SMALL)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: id(p) for n, p in model.named_parameters()} == identity
    assert all(p.grad is None for p in model.parameters())
    assert model.config.use_cache == cache
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    assert set(model.state_dict()) == set(found.first)


def test_equal_seeds_give_equal_models(captured_once):
    results = []
    for seed in (0, 0, 1):
        found = captured_once("mlp")
        loader = DataLoader(torch.randn(32, 16, generator=torch.Generator().manual_seed(0)), batch_size=4, shuffle=True)
        sf.sparsify(found.model, loader, preset="paper", seed=seed, **SMALL)
        results.append([p.detach().clone() for p in found.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))


@pytest.mark.parametrize(("method", "preset"), [(m, p) for m, presets in TRAINED.items() for p in presets])
def test_resume_from_a_file(captured_once, tmp_path, method, preset):
    def run(stop=None, **options):
        found = captured_once("mlp")

        def on_step(step, row):
            if step == stop:
                raise KeyboardInterrupt

        try:
            result = sf.sparsify(
                found.model,
                data_for(found),
                method=method,
                preset=preset,
                on_step=on_step,
                **SMALL | {"steps": 12},
                **options,
            )
        except KeyboardInterrupt:
            return None
        assert_exact(found)
        return [p.detach().clone() for p in found.model.parameters()], [row["loss"] for row in result.report["curves"]]

    straight, curve = run()
    saved = {"state_path": str(tmp_path / "state"), "save_seconds": 0.0}
    for stop in (2, 10):
        assert run(stop, **saved) is None
    weights, resumed = run(**saved)
    assert resumed == curve and len(curve) == 12
    assert all(torch.equal(a, b) for a, b in zip(weights, straight, strict=True))


# -- data ------------------------------------------------------------------------------------------------------------
def test_tokens_make_steps(captured_once):
    """Rows have their own length: 2 x 12 tokens a step, whatever ``length`` is."""
    found = captured_once("llama")
    options = {k: v for k, v in SMALL.items() if k not in ("steps", "length")}
    result = sf.sparsify(found.model, data_for(found), tokens=5 * 24, **options)
    assert len(result.report["curves"]) == 5 and result.report["tokens"] == 120
    found.reset()
    result = sf.sparsify(found.model, data_for(found), tokens=5 * 24, accumulate=2, **options)
    assert len(result.report["curves"]) == 2 and result.report["tokens"] == 96


def test_calibration_counts_sequences(captured_once):
    found = captured_once("mlp")
    data = [found.batch(seed, rows=3) for seed in range(4)]
    result = sf.sparsify(found.model, data, method="sparsegpt", **SMALL | {"calibration": 7})
    assert result.report["calibration_sequences"] == 9


@pytest.mark.parametrize("options", [{"method": "sparsegpt"}, {"preset": "alps+kd", "start": "sparsegpt"}], ids=str)
def test_calibration_ends_with_the_data(captured_once, options):
    """What is there is seen once, and the report says how much that was."""
    found = captured_once("mlp")
    data = [found.batch(seed, rows=3) for seed in range(2)]
    result = sf.sparsify(found.model, data, **SMALL | options | {"calibration": 128})
    assert result.report["calibration_sequences"] == 6
    assert "asked for 128 calibration sequences, the data has 6" in result.report["notes"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_uneven_batches_are_counted_as_they_come(captured_once, accumulate):
    found = captured_once("mlp")
    data = [found.batch(seed, rows=rows) for seed, rows in enumerate((4, 4, 1))]
    options = {k: v for k, v in SMALL.items() if k not in ("steps", "accumulate")}
    result = sf.sparsify(found.model, data, tokens=18, accumulate=accumulate, **options)
    seen = [4, 8, 9, 13, 17, 18] if accumulate == 1 else [8, 13, 18]
    assert [row["tokens"] for row in result.report["curves"]] == seen
    assert result.report["tokens"] == 18 and result.report["epochs"] == 2
    assert "the run went over its data 2.0 times" in result.report["notes"]


def test_padding_is_not_counted(tiny):
    found = tiny("gpt2")
    batch = found.batch(rows=2) | {"attention_mask": torch.tensor([[1] * 12, [1] * 6 + [0] * 6])}
    options = {k: v for k, v in SMALL.items() if k != "steps"}
    result = sf.sparsify(found.model, [batch], tokens=4 * 18, **options)
    assert len(result.report["curves"]) == 4 and result.report["tokens"] == 4 * 18


def test_pairs_of_inputs_and_targets():
    """What a data loader of a classification set gives; the model takes the first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
    pairs = DataLoader([(torch.randn(16), i % 4) for i in range(16)], batch_size=4)
    for method in ("sparsegpt", "sparseforge"):
        sf.sparsify(model, pairs, method=method, **SMALL)
        assert check_pattern(model[0].weight, TWO_FOUR) and not check_pattern(model[2].weight, TWO_FOUR)


class Scored(nn.Module):
    """The usual module with labels of its own, whose loss weighs them in its own way."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.body, self.weight = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4)), weight

    def forward(self, x, labels=None):
        scores = self.body(x)
        loss = scores.sum() * 0 if labels is None else self.weight * nn.functional.cross_entropy(scores, labels)
        return {"loss": loss, "logits": scores}


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_a_modules_own_loss_is_compared_with_ours(weight):
    torch.manual_seed(0)
    batch = (torch.randn(8, 16), torch.arange(8) % 4)
    report = sf.sparsify(Scored(weight), [batch], **SMALL | {"calibration": 8}).report
    assert all(row["task"] > 0.1 for row in report["curves"])  # the logits are learnt, not the scalar
    assert any("own loss" in n for n in report["notes"]) == (weight != 1)


def test_what_is_given_and_not_used_is_in_the_notes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
    notes = sf.sparsify(model, [(torch.randn(8, 16), torch.randn(8, 4))], **SMALL | {"calibration": 8}).report["notes"]
    assert any("labels" in n and "not used" in n for n in notes)
    notes = sf.sparsify(model, [torch.randn(8, 16)], **SMALL | {"calibration": 8}).report["notes"]
    assert any("no labels" in n for n in notes)


class _OneNumber(nn.Module):
    """Its answer holds nothing that could be distilled."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x):
        return self.down(self.up(x).relu()).square().mean()


@pytest.mark.parametrize("form", [lambda x, y: {"x": x, "labels": y}, lambda x, y: (x, y), lambda x, y: {"x": x}])
@pytest.mark.parametrize("options", [{"method": "wanda"}, {"method": "alps", "reconstruct": 1}])
def test_a_method_that_does_not_train_wants_no_labels_and_no_answer_to_distil(form, options):
    batches = [form(torch.randn(4, 16), torch.randint(0, 8, (4,))) for _ in range(2)]
    report = sf.sparsify(_OneNumber(), batches, calibration=8, **options).report
    assert len(report["sites"]) == 2
    told = [n for n in report["notes"] if "labels" in n]
    given = len(batches[0]) == 2
    assert told == (["labels is in the batches and not used: nothing in this run learns from labels"] if given else [])
    with pytest.raises(SparseForgeError, match="nothing that can be distilled"):
        sf.sparsify(_OneNumber(), batches, steps=2)


@pytest.mark.parametrize(
    "method, preset", [("sparseforge", "paper"), ("sparseforge", "alps+kd"), ("ast", None), ("alps", None)]
)
def test_what_the_user_froze_stays_to_the_bit(method, preset):
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)).requires_grad_(False)
    model = nn.Sequential(tower, nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 8))
    before = {n: p.clone() for n, p in model.named_parameters()}
    sf.sparsify(model, [torch.randn(8, 16)] * 4, method=method, preset=preset, **SMALL | {"lr": 1e-2})
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert not any(n.startswith("0.") for n in moved) and "1.weight" in moved
    assert ("2.bias" in moved) == (method != "alps")  # what nobody froze trains


@pytest.mark.parametrize("method", ["wanda", "sparseforge"])
def test_what_was_noted_of_layers_is_in_the_notes(method):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(5)), nn.LayerNorm(16))
    report = sf.sparsify(model, [torch.zeros(8, 16)], method=method, **SMALL | {"calibration": 8}).report
    assert len(report["layer_notes"]) == 5
    (told,) = [n for n in report["notes"] if "no calibration token" in n]
    assert told.endswith("pruned by magnitude: 0.weight, 1.weight, 2.weight and 2 more")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_grad_mode_does_not_matter(captured_once, mode):
    found = captured_once("llama of one block")
    results = []
    for context in (contextlib.nullcontext, mode):
        found.reset()
        with context():
            batches = [{"input_ids": found.batch(seed)["input_ids"].clone()} for seed in range(4)]
            sf.sparsify(found.model, batches, preset="paper", **SMALL)
            assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
        results.append({n: p.detach().clone() for n, p in found.model.named_parameters()})
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=0, atol=0)


def test_weights_that_are_elsewhere_are_missed_before_the_capture(monkeypatch):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    model[1].to("meta")
    monkeypatch.setattr("sparseforge_fx.graph.capture.torch.export.export", None)
    with pytest.raises(SparseForgeError, match=r"1\.weight is on the meta device \(it has a shape alone"):
        sf.sparsify(model, example_inputs=torch.randn(2, 16))
    model.hf_device_map = {"0": 0, "1": "disk"}
    with pytest.raises(SparseForgeError, match="disk hold them"):
        sf.prepare(model, torch.randn(2, 16), sf.annealed_preset(4))


def test_a_label_out_of_range_is_found_before_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4))
    before = model[0].weight.detach().clone()
    with pytest.raises(SparseForgeError, match="scores 4 classes"):
        sf.sparsify(model, [(torch.randn(8, 16), torch.arange(8))], **SMALL)
    assert torch.equal(model[0].weight, before)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, left, right):
        return self.norm(self.left(left) * self.right(right))


@pytest.mark.parametrize("method", ["sparsegpt", "sparseforge"])
def test_several_inputs_by_name_in_any_order(method):
    torch.manual_seed(0)
    rows = [(torch.randn(4, 8), torch.randn(4, 8)) for _ in range(3)]
    results = []
    for keys in (("left", "right"), ("right", "left"), None):
        torch.manual_seed(0)
        model = Pair()
        batches = [
            {k: dict(zip(("left", "right"), row, strict=True))[k] for k in keys} if keys else row for row in rows
        ]
        sf.sparsify(model, batches, method=method, **SMALL)
        results.append(model.left.weight.detach().clone())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])
    assert check_pattern(results[0], TWO_FOUR)


def test_padded_batches_bring_their_mask(tiny):
    found = tiny("gpt2")
    batches = []
    for seed in range(2):
        batch = found.batch(seed, rows=2)
        mask = torch.ones_like(batch["input_ids"])
        mask[0, 8:] = 0
        batches.append({**batch, "attention_mask": mask, "labels": batch["input_ids"].masked_fill(mask == 0, -100)})
    for method in ("sparsegpt", "sparseforge"):
        found.reset()
        sf.sparsify(found.model, batches, method=method, **SMALL)
        assert_exact(found)


def test_text_drawn_from_the_model_itself(captured_once):
    found = captured_once("llama")
    result = sf.sparsify(found.model, "self", **SMALL)
    assert_exact(found)
    assert result.report["method"] == "sparseforge" and result.report["tokens"] == 4 * 2 * 12


def test_drawn_text_follows_the_model(captured_once):
    """Frequencies of the first token are the model's own after its start token."""
    found = captured_once("llama")
    ids = draw_text(found.model, 16 * 2 * 60, length=2, seed=3)
    assert ids.shape == (16 * 60, 2) and ids.min() >= 0 and ids.max() < tiny_models.VOCABULARY
    logits = found.model(torch.tensor([[1]])).logits[0, 0].detach()
    logits[2] = -torch.inf  # the end of text is held off
    p = logits.softmax(-1)
    share = torch.bincount(ids[:, 0], minlength=tiny_models.VOCABULARY) / len(ids)
    assert ((share - p).abs() < 5 * (p * (1 - p) / len(ids)).sqrt() + 1e-3).all()
    assert torch.equal(ids, draw_text(found.model, 16 * 2 * 60, length=2, seed=3))
    assert not torch.equal(ids, draw_text(found.model, 16 * 2 * 60, length=2, seed=4))


def test_drawn_text_has_no_dropout_in_it(captured_once):
    found = captured_once("gpt2")
    quiet = draw_text(found.model, 16 * 8, length=8)
    found.model.train()
    found.model.transformer.h[0].eval()
    modes = [m.training for m in found.model.modules()]
    assert torch.equal(draw_text(found.model, 16 * 8, length=8), quiet)
    assert [m.training for m in found.model.modules()] == modes


def test_low_rank_branch_leaves_the_pattern_exact():
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16), nn.LayerNorm(16))
    sf.sparsify(model, [torch.randn(4, 16) for _ in range(2)], **SMALL | {"slorb_block": 8})
    assert check_pattern(model[0].weight, TWO_FOUR) and check_pattern(model[2].weight, TWO_FOUR)
    assert torch.isfinite(model(torch.randn(2, 16))).all()


# -- what it refuses -------------------------------------------------------------------------------------------------
class Unsavoury(nn.Module):
    """Control flow on data: torch.export cannot take it."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x):
        return self.norm(self.a(x) if x.sum() > 0 else x)


WRONG_OPTIONS = {
    "method": ({"method": "wanda++"}, "unknown method 'wanda"),
    "preset": ({"preset": "theirs"}, "unknown preset 'theirs'"),
    "option": ({"temprature_start": 2.0}, "temprature_start"),
    "option of another method": ({"method": "magnitude", "mask_rate": 0.5}, "mask_rate"),
    "value": ({"gate": "group"}, "gate"),
    "pattern": ({"pattern": "4:2"}, "4:2"),
    "no pattern": ({"pattern": "dense"}, "dense"),
    "steps": ({"steps": -1}, "steps"),
    "nothing left": ({"exclude": ["*"]}, "nothing to prune.*excluded"),
    "nothing named": ({"include": ["nothing*"]}, "nothing to prune"),
    "low rank": ({"slorb_block": 7}, "7"),
}


@pytest.mark.parametrize("what", WRONG_OPTIONS)
def test_wrong_options_leave_the_model_alone(captured_once, what):
    found = captured_once("mlp")
    options, message = WRONG_OPTIONS[what]
    with pytest.raises(SparseForgeError, match=message) as error:
        sf.sparsify(found.model, data_for(found), **SMALL | options)
    assert "\n" not in str(error.value)
    assert untouched(found)
    assert all(p.requires_grad and p.grad is None for p in found.model.parameters())


WRONG_DATA = {
    "other width": (lambda: [torch.randn(4, 10)], "4, 10|10"),
    "other width later": (lambda: [torch.randn(2, 16), torch.randn(2, 10)], "batch 1 does not fit.*16"),
    "not a number": (lambda: [torch.full((4, 16), float("nan"))], "NaN|finite"),
    "not a number later": (lambda: [torch.randn(2, 16), torch.full((2, 16), float("nan"))], "finite"),
    "integers": (lambda: [torch.ones(4, 16, dtype=torch.int64)], "first batch"),
    "empty": (lambda: [], "no batch"),
    "once": (lambda: iter([torch.randn(4, 16)]), "only once"),
    "text": (lambda: ["some text"], "tokenizer"),
    "itself": (lambda: "self", "cannot generate"),
    "number": (lambda: 7, "int"),
    "names": (lambda: [{"features": torch.randn(4, 16)}], "input"),
}


@pytest.mark.parametrize("method", ["sparsegpt", "sparseforge"])
@pytest.mark.parametrize("what", WRONG_DATA)
def test_wrong_data_leaves_the_model_alone(captured_once, what, method):
    found = captured_once("mlp")
    make, message = WRONG_DATA[what]
    with pytest.raises(SparseForgeError, match=message) as error:
        sf.sparsify(found.model, make(), method=method, **SMALL)
    assert "\n" not in str(error.value)
    assert untouched(found)
    assert all(p.requires_grad and p.grad is None for p in found.model.parameters())


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp()


@pytest.mark.parametrize("method", ["sparsegpt", "sparseforge"])
def test_a_failure_at_a_later_layer_gives_the_first_one_back(method):
    """The second batch overflows between the layers, when the first layer is pruned already."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), Exponential(), nn.Linear(16, 16), nn.LayerNorm(16))
    first = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(SparseForgeError, match="finite"):
        sf.sparsify(model, [torch.randn(2, 16), 1000 * torch.randn(2, 16)], method=method, **SMALL)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), first, strict=True))


def test_a_failure_in_training_leaves_no_gradients(captured_once):
    """The second of two micro-batches is not a number: the gradients of the first are there by then."""
    found = captured_once("mlp")
    found.model[0].bias.requires_grad_(False)
    data = [torch.randn(2, 16), torch.full((2, 16), float("nan"))]
    with pytest.raises(SparseForgeError, match="loss is nan at step 0"):
        sf.sparsify(found.model, data, preset="paper", **SMALL, accumulate=2)
    assert untouched(found)
    assert all(p.grad is None for p in found.model.parameters())
    assert [p.requires_grad for p in found.model.parameters()] == [True, False, True, True, True, True]


@pytest.mark.parametrize("method", ["sparsegpt", "sparseforge"])
def test_methods_that_need_data(captured_once, method):
    found = captured_once("llama")
    with pytest.raises(SparseForgeError, match=f"{method} needs data"):
        sf.sparsify(found.model, method=method)
    assert untouched(found)


@pytest.mark.parametrize(
    ("name", "ids", "message"),
    [
        ("gpt2", torch.full((4, 12), 97), "vocabulary of 97"),
        ("gpt2", torch.full((4, 12), -1), "vocabulary of 97"),
        ("gpt2", torch.ones(4, 65, dtype=torch.int64), "65 tokens are longer than the model's 64 positions"),
        ("llama", torch.full((4, 12), 97), "vocabulary of 97"),
    ],
    ids=["beyond the vocabulary", "negative", "too long", "llama"],
)
def test_tokens_that_do_not_fit(captured_once, name, ids, message):
    found = captured_once(name)
    with pytest.raises(SparseForgeError, match=message):
        sf.sparsify(found.model, ids, **SMALL)
    assert untouched(found)


def test_drawing_more_than_the_positions(captured_once):
    found = captured_once("gpt2")
    with pytest.raises(SparseForgeError, match="64 positions"):
        sf.sparsify(found.model, "self", **SMALL | {"length": 100})
    assert untouched(found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(captured_once, method, bad):
    found = captured_once("mlp")
    with torch.no_grad():
        found.model[2].weight[3, 3] = bad
    before = [p.detach().clone() for p in found.model.parameters()]
    with pytest.raises(SparseForgeError, match=r"2\.weight"):
        sf.sparsify(found.model, None if method == "magnitude" else data_for(found), method=method, **SMALL)
    for p, q in zip(found.model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=0, equal_nan=True)


def test_norms_that_are_not_finite(captured_once):
    """No site is at fault, but the dense model answers with NaN."""
    found = captured_once("llama")
    with torch.no_grad():
        found.model.model.norm.weight[0] = float("nan")
    with pytest.raises(SparseForgeError, match="NaN"):
        sf.sparsify(found.model, data_for(found), **SMALL)
    assert all(torch.equal(p, found.first[n]) for n, p in found.weights.items())


def test_models_that_cannot_be_captured_or_pruned():
    with pytest.raises(SparseForgeError, match="nothing to prune"):
        sf.sparsify(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), example_inputs=torch.randn(2, 3, 8, 8))
    with pytest.raises(SparseForgeError, match=r"test_sparsify\.py"):
        sf.sparsify(Unsavoury(), example_inputs=torch.randn(2, 16))
    with pytest.raises(SparseForgeError, match="example_inputs"):
        sf.sparsify(nn.Linear(16, 16))
    with pytest.raises(SparseForgeError, match=r"nn\.Module"):
        sf.sparsify("a model")


def test_a_layer_wise_start_is_saved_before_the_first_step(captured_once, tmp_path):
    """It takes minutes on a real model: a run that is killed in its first step does not solve all layers again."""
    ids = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(0))
    options = {"steps": 3, "batch_size": 2, "compile": False, "show_progress": False}
    model = captured_once("llama of one block").model
    first = sf.sparsify(model, ids, **options).report
    want = {name: value.clone() for name, value in model.state_dict().items()}
    assert first["calibration_seconds"] > 0

    def killed(step, row):
        raise KeyboardInterrupt

    options |= {"state_path": tmp_path / "state"}
    model = captured_once("llama of one block").model
    with pytest.raises(KeyboardInterrupt):
        sf.sparsify(model, ids, **options, on_step=killed)
    model = captured_once("llama of one block").model
    report = sf.sparsify(model, ids, **options).report
    assert report["calibration_seconds"] > 0 and report["calibration_sequences"] == 4
    assert report["layer_notes"] == first["layer_notes"] and len(report["curves"]) == 3
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())
    assert [row["loss"] for row in report["curves"]] == [row["loss"] for row in first["curves"]]


# -- values in few bits ----------------------------------------------------------------------------------------------
def test_layerwise_methods_put_survivors_on_a_grid_and_keep_its_scales():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 32), nn.LayerNorm(32)
    )
    result = sf.sparsify(model, [torch.randn(64, 32)], method="wanda", values="int4", calibration=64)
    assert set(result.scales) == {"0.weight", "2.weight"}
    assert result.report["layer_notes"] == {"4.weight": "not in int4: 16 inputs are no multiple of the group of 32"}
    for name, scales in result.scales.items():
        codes = model.get_parameter(name).detach() / scales.float()
        torch.testing.assert_close(codes, codes.round())
        assert scales.dtype == torch.float16 and codes.any() and codes.min() >= -8 and codes.max() <= 7
        assert check_pattern(codes, Pattern(2, 4))
    assert sf.sparsify(model, [torch.randn(64, 32)], method="wanda", calibration=64).scales == {}


# -- activation checkpointing ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"preset": "annealed"}, {"accumulate": 2}], ids=str)
def test_blocks_that_are_computed_again_change_no_bit(monkeypatch, options):
    again: list[bool] = []
    checkpoint = compile_module.checkpoint
    monkeypatch.setattr(compile_module, "checkpoint", lambda *a, **k: again.append(True) or checkpoint(*a, **k))
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny_models.build("llama")
        data = torch.randint(3, tiny_models.VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(1))
        result = sf.sparsify(model, data, activation_checkpointing=checkpointing, **SMALL | options)
        found.append((model.state_dict(), [row["loss"] for row in result.report["curves"]]))
        assert bool(again) == checkpointing
    (first, losses), (second, others) = found
    assert losses == others and all(torch.equal(first[name], second[name]) for name in first)


def test_nothing_to_compute_again_is_said(captured_once):
    found = captured_once("mlp")
    with pytest.raises(SparseForgeError, match="no repeated blocks"):
        sf.sparsify(found.model, data_for(found), activation_checkpointing=True, **SMALL)
    assert untouched(found)
    found = captured_once("llama")
    report = sf.sparsify(
        found.model, data_for(found), method="alps", activation_checkpointing=True, calibration=4
    ).report
    assert "activation_checkpointing is given and not used: alps does not train" in report["notes"]
