"""What a preset says beside its method: taken where the user says nothing, and told in the report."""

import pytest
import torch
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.methods.config import Beside
from sparseforge_fx.training.distillation import Distillation
from sparseforge_fx.training.recipe import Recipe
from sparseforge_fx.training.settings import choose_settings

PAPER = Beside(temperature=2.0, weight_decay=0.1, slorb_block=64)
QUICK = {"steps": 3, "show_progress": False, "compile": False}


def test_of_who_says_nothing():
    assert choose_settings(Beside(), None, None, None) == (Distillation(), 0.0, None, {})
    assert choose_settings(PAPER, None, None, None) == (
        Distillation(temperature=2.0), 0.1, 64, {"temperature": 2.0, "weight_decay": 0.1, "slorb_block": 64},
    )  # fmt: skip


def test_what_the_user_says_goes_first_also_where_it_is_the_default():
    assert choose_settings(PAPER, Distillation(), 0.0, 0) == (Distillation(), 0.0, None, {})
    assert choose_settings(PAPER, None, 0.01, 8)[1:] == (0.01, 8, {"temperature": 2.0})
    recipe = Recipe(preset="paper", objective=Distillation(), weight_decay=0.0, slorb_block=0)
    assert recipe.settings(True) == Recipe(preset="annealed").settings(True)


def test_of_methods_and_presets():
    assert Recipe(method="ast").settings(True).objective == Distillation(task=1 / 3, kl=2 / 3, temperature=2.0)
    assert Recipe(preset="paper-universal").settings(True).slorb_block == 16
    assert Recipe(preset="tuned").settings(True) == Recipe().settings(True)
    assert Recipe(method=sf.paper_preset(9)).settings(True).by_preset == {}  # a config is the method's alone


def model(width=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.LayerNorm(width))


def run(net, **options):
    width = net[0].in_features
    data = [torch.randn(4, width, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    return sf.sparsify(net, data, **QUICK | options)


def test_the_report_says_what_was_taken():
    net = model(64)
    report = run(net, preset="paper").report
    assert report["settings"]["slorb_block"] == 64 and report["settings"]["weight_decay"] == 0.1
    assert report["settings"]["objective"]["temperature"] == 2.0
    assert report["settings"]["by_preset"] == {"temperature": 2.0, "weight_decay": 0.1, "slorb_block": 64}
    assert any(
        n.startswith("preset paper sets temperature 2, weight_decay 0.1, slorb_block 64") for n in report["notes"]
    )
    assert hasattr(net[0], "slorb")
    plain = model(64)
    report = run(plain, preset="paper", slorb_block=0, weight_decay=0.5).report
    assert report["settings"]["by_preset"] == {"temperature": 2.0} and report["settings"]["weight_decay"] == 0.5
    assert not hasattr(plain[0], "slorb")


def test_a_preset_has_the_branch_that_the_model_can_have():
    report = run(model(32), preset="paper").report
    assert report["settings"]["slorb_block"] == 32 and any(
        "32 in the place of the preset's 64" in n for n in report["notes"]
    )
    report = run(model(24), preset="paper").report  # 8 divides both
    assert report["settings"]["slorb_block"] is None and "slorb_block" not in report["settings"]["by_preset"]
    assert any("slorb_block 64 is left out" in n for n in report["notes"])
    net = model(32)
    net[2].weight = net[0].weight
    report = run(net, preset="paper").report
    assert report["settings"]["slorb_block"] is None
    assert any("left out" in n and "no low-rank branch" in n for n in report["notes"])
    with pytest.raises(sf.SparseForgeError, match="low-rank branch"):  # asked for, it is an error
        run(net, preset="paper", slorb_block=16)


@pytest.mark.parametrize("method", ["sparseforge", "ast", "sr-ste"])
def test_matrices_decay_and_vectors_do_not(method):
    """At a rate so small that nothing else moves a weight: lr * weight_decay is 0.5 in all."""
    dense, sparse = model(), model()
    preset = {"preset": "annealed"} if method == "sparseforge" else {}
    run(sparse, method=method, lr=1e-9, weight_decay=1e8, slorb_block=0, **preset)
    kept = sparse[0].weight != 0
    assert (sparse[0].weight[kept].abs() < 0.95 * dense[0].weight[kept].abs()).all()
    torch.testing.assert_close(sparse[0].bias, dense[0].bias)
    torch.testing.assert_close(sparse[3].weight, dense[3].weight)


def test_an_old_recipe_with_a_loss_keeps_it(tmp_path):
    (tmp_path / "recipe.yaml").write_text("preset: tuned\nobjective: {task: 1.0, kl: 1.0, temperature: 1.0}\n")
    recipe = Recipe.read(tmp_path)
    assert recipe.objective == Distillation() and recipe.resolved(True).preset == "alps+kd"
