"""A run as plain data: there and back, what is refused, and that it repeats the run."""

import pytest
import torch
import yaml

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.catalog import METHODS, ONE_SHOT, configure
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import Pattern
from sparseforge_fx.training.distillation import Distillation
from sparseforge_fx.training.recipe import FILE, Recipe, parse_tokens

QUIET = {"show_progress": False, "compile": False}
FULL = Recipe(
    model="m", data="d", separator="\n\n", dtype="float32", method="ast", options={"decay": 1e-3}, pattern="1:4",
    include=["*mlp*"], exclude=["*head*"], tokens=4096, batch_size=2, length=16, accumulate=3, lr=1e-4,
    objective=Distillation(kl=0.5, temperature=2.0, features="squarehead"), slorb_block=16, calibration=8, seed=5,
)  # fmt: skip


@pytest.mark.parametrize("recipe", [Recipe(), FULL, Recipe(steps=9, preset="paper")])
def test_there_and_back(recipe, tmp_path):
    assert Recipe.from_plain(recipe.describe()) == recipe
    (tmp_path / FILE).write_text(recipe.to_yaml())
    assert Recipe.read(tmp_path / FILE) == Recipe.read(tmp_path) == recipe


@pytest.mark.parametrize("method", METHODS)
def test_a_config_becomes_plain_data_that_gives_it_again(method):
    steps = {} if method in ONE_SHOT else {"steps": 7}
    config = configure(method, **steps, pattern="4:8")
    plain = Recipe(method=config).describe()
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert Recipe.from_plain(plain).config(True) == config == Recipe(method=config).config(True)


def test_names_that_are_no_fields_are_options_of_the_method():
    changed = Recipe(options={"start": "wanda"}).changed(lr=1e-3, heat_end=0.0, start="sparsegpt")
    assert changed == Recipe(lr=1e-3, options={"heat_end": 0.0, "start": "sparsegpt"})
    assert changed.config(True, 30).steps == 30 and changed.config(True).start == "sparsegpt"


def test_another_method_begins_anew():
    tuned = Recipe(method="sparseforge", preset="alps+kd", steps=60, options={"start": "wanda"})
    assert tuned.changed(method="ast", tokens=4096) == Recipe(method="ast", tokens=4096)
    assert tuned.changed(method="sparseforge", lr=1e-3).options == {"start": "wanda"}
    assert tuned.changed(method="ast", decay=1e-3).options == {"decay": 1e-3}
    assert Recipe(preset="paper").changed(method="sparseforge").preset == "paper"  # none was named before
    with pytest.raises(SparseForgeError, match="both set the length"):
        Recipe().changed(steps=3, tokens=9)


def test_defaults():
    assert Recipe().config(False).describe() == {"pattern": "2:4"}  # magnitude
    tuned = Recipe().config(True)
    assert (tuned.start, tuned.steps, tuned.pattern) == ("alps", 60, Pattern(2, 4))


def test_one_glob_is_a_list_of_one():
    assert Recipe(include="*mlp*") == Recipe.from_plain({"include": "*mlp*"}) == Recipe(include=["*mlp*"])


@pytest.mark.parametrize("recipe", ["run.yaml", {"lr": 1e-3}, sf.annealed_preset(4)])
def test_what_is_not_a_recipe_object(recipe):
    with pytest.raises(SparseForgeError, match=r"give a Recipe, or Recipe\.read"):
        sf.sparsify(torch.nn.Linear(4, 4), None, recipe)


@pytest.mark.parametrize("objective", [{"kl": 1.0}, "kl", Recipe()])
def test_what_is_not_an_objective(objective):
    with pytest.raises(SparseForgeError, match=r"objective is .*: give a Distillation"):
        sf.sparsify(torch.nn.Linear(4, 4), objective=objective)
    with pytest.raises(SparseForgeError, match=r"objective is .*: give a Distillation"):
        sf.prepare(torch.nn.Linear(4, 4), torch.randn(2, 4), sf.annealed_preset(4), objective=objective)


def test_numbers_as_people_write_them(tmp_path):
    (tmp_path / "by_hand.yaml").write_text("pattern: 2:4\nplan: {a.weight: 1:4 int8}")
    by_hand = Recipe.read(tmp_path / "by_hand.yaml")
    assert (by_hand.pattern, by_hand.plan) == ("2:4", {"a.weight": "1:4 int8"})
    read = Recipe.from_plain(yaml.safe_load("lr: 5e-4\ntokens: 20M\noptions: {damping: 1e-3}\nobjective: {kl: 2}"))
    assert (read.lr, read.tokens, read.options["damping"], read.objective.kl) == (5e-4, 20_000_000, 1e-3, 2)
    assert parse_tokens("1.5B") == 1_500_000_000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rate: 1", "no entry learning_rate; it has model, data"),
        ("- a", "mapping of names to values"),
        ("", "mapping of names to values"),
        ("lr: fast", "lr is 'fast': give a finite number above 0"),
        ("lr: -1", "lr is -1: give a finite number above 0"),
        ("steps: 2.5", r"steps is 2\.5: give a whole number from 1"),
        ("steps: 5\ntokens: 9000", "both set the length"),
        ("tokens: many", "'many' is not a number of tokens"),
        ("objective: {w_kl: 1}", "objective of a recipe takes divergence, feature_weight"),
        ("objective: {temperature: 0}", "temperature is 0: give a finite number above 0"),
        ("objective: {divergence: js}", "unknown divergence 'js'"),
        ("include: 4", "include of a recipe is 4: give a list"),
        ("objective: {features: [tinybert]}", "unknown features"),
        ("options: {1: 2}", "named by text, not 1"),
        ("options: [a]", "options of a recipe is .*: give a dict"),
        ("method: [ast]", "method of a recipe is .*: give text"),
        ("pattern: 0.5", "pattern of a recipe is 0.5: give text"),
        ("lr: 1e-3\nseed: 1\nlr: 5e-4", "line 3 gives lr a second time: leave one"),
        ("options: {decay: 1, decay: 2}", "line 1 gives decay a second time"),
        ("a: [", "while parsing"),
        ("x: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_what_is_no_recipe(text, says, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SparseForgeError, match=says) as error:
        Recipe.read(tmp_path / "run.yaml")
    assert "run.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(SparseForgeError, match=f"there is no recipe .*{FILE}"):
        Recipe.read(tmp_path)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (Recipe(method=configure("ast", 5), lr=1e-3, tokens=4096), "StraightThroughConfig.*leave out tokens"),
        (Recipe(method=configure("wanda"), pattern="1:4"), "WandaConfig, which says all of its own: leave out pattern"),
        (Recipe(method="wanda", slorb_block=4), "wanda trains no low-rank branch"),
        (Recipe(method="gmp", options={"decay": 1.0}), "gmp has no option decay"),
        (Recipe(method="gmp", preset="alps+kd"), "unknown preset 'alps.kd' of gmp"),
        (Recipe(method="sparsefroge"), "unknown method 'sparsefroge'"),
        (Recipe(pattern="4:2"), "4:2"),
    ],
)
def test_what_the_method_has_not(recipe, says):
    with pytest.raises(SparseForgeError, match=says):
        recipe.config(True)


def test_methods_need_data():
    with pytest.raises(SparseForgeError, match="method alps needs data"):
        Recipe(method=configure("alps")).config(False)


def test_the_written_recipe_repeats_the_run(captured_once, tmp_path):
    found = captured_once("llama")
    ids = torch.randint(3, 97, (16, 12), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(method="ast", steps=3, batch_size=2, length=12, lr=1e-2, objective=Distillation(temperature=2.0))
    first = sf.sparsify(found.model, ids, recipe, **QUIET)
    first.save(tmp_path / "out")
    weights = {k: v.clone() for k, v in found.model.state_dict().items()}
    found.reset()
    again = sf.sparsify(found.model, ids, Recipe.read(tmp_path / "out"), **QUIET)
    assert all(torch.equal(v, weights[k]) for k, v in found.model.state_dict().items())
    losses = [[row["loss"] for row in run.report["curves"]] for run in (first, again)]
    assert losses[0] == losses[1] and again.report["recipe"] == first.report["recipe"]


def test_what_was_left_to_defaults_is_written(captured_once, tmp_path):
    """Without data the file alone would be a run of magnitude."""
    found = captured_once("llama")
    sf.sparsify(found.model, [found.batch()], preset="paper", slorb_block=0, steps=1, **QUIET).save(tmp_path / "out")
    read = Recipe.read(tmp_path / "out")
    assert (read.method, read.preset, read.steps) == ("sparseforge", "paper", 1)
    assert Recipe().resolved(True) == Recipe(method="sparseforge", preset="alps+kd", steps=60)
    assert Recipe(tokens=4096).resolved(True).steps is None
    assert Recipe().resolved(False) == Recipe(method="magnitude")


def test_a_path_is_written_as_the_data(tmp_path):
    (tmp_path / "ids.txt").write_text("x")
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))
    run = sf.sparsify(model, tmp_path / "ids.txt", method="magnitude", example_inputs=torch.randn(2, 8))
    assert run.recipe.data == run.report["recipe"]["data"] == str(tmp_path / "ids.txt")


def test_a_config_and_its_name_are_one_run(captured_once):
    found = captured_once("llama")
    ids = torch.randint(3, 97, (8, 12), generator=torch.Generator().manual_seed(0))
    how = {"batch_size": 2, "length": 12, "calibration": 4, **QUIET}
    sf.sparsify(found.model, ids, method="sparsegpt", damping=0.1, **how)
    weights = {k: v.clone() for k, v in found.model.state_dict().items()}
    found.reset()
    report = sf.sparsify(found.model, ids, method=configure("sparsegpt", damping=0.1), **how).report
    assert report["method"] == "sparsegpt" and report["config"]["damping"] == 0.1
    assert all(torch.equal(v, weights[k]) for k, v in found.model.state_dict().items())


def test_a_dtype_that_is_not_the_models_is_said():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))
    report = sf.sparsify(model, recipe=Recipe(dtype="bfloat16"), example_inputs=torch.randn(2, 8)).report
    assert "dtype bfloat16 is for the command line: the model given computes in torch.float32" in report["notes"]


@pytest.mark.parametrize("method", ["maskllm", "maskpro"])
def test_masks_that_are_drawn_are_drawn_by_the_recipes_seed(method):
    """Three seeds once shared all draws, and their spread was that of the data alone."""
    assert Recipe(method=method, steps=3, seed=7).config(True).seed == 7
    assert Recipe(method=method, steps=3, seed=7, options={"seed": 5}).config(True).seed == 5
    unsure = {"certainty": 0.0} if method == "maskpro" else {}
    net, weights = torch.nn.Linear(64, 64), {}
    for seed in (0, 1, 0):
        config = Recipe(method=method, steps=3, seed=seed, options=unsure).config(True)
        w = MaskedWeight("weight", net.weight, torch.ones(64, 64), 1)
        learned = config.build([w])
        learned.advance(0.3)
        weights.setdefault(seed, []).append(w.mask.clone())
    assert torch.equal(*weights[0]) and not torch.equal(weights[0][0], weights[1][0])
