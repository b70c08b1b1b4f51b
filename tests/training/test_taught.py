"""A model that is N:M already and learns from what it was before: masks kept, who teaches, and what is no teacher."""

import copy

import pytest
import torch
from tiny_checkpoint import TEXT, write_checkpoint
from tiny_models import build
from typer.testing import CliRunner

import sparseforge_fx as sf
from sparseforge_fx import cli
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.pattern import TWO_FOUR, check_pattern
from sparseforge_fx.training.basis import check_basis
from sparseforge_fx.training.distillation import Distillation

HOW = {"steps": 4, "batch_size": 2, "compile": False, "show_progress": False, "lr": 3e-3}
HEAL = {**HOW, "start": "magnitude"}


def text(count=4):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 97, (2, 12), generator=generator)} for _ in range(count)]


def pair(name="llama"):
    """A dense model, and what magnitude leaves of it."""
    torch.manual_seed(0)
    dense = build(name).eval()
    sparse = copy.deepcopy(dense)
    result = sf.sparsify(sparse, method="magnitude")
    return dense, sparse, [site["name"] for site in result.report["sites"]]


def curve(result):
    return [[row["loss"], row["kl"]] for row in result.report["curves"]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "moe"])
def test_to_heal_is_to_prune_and_train_in_one(name):
    dense, sparse, sites = pair(name)
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    zeros = {k: sparse.get_parameter(k) == 0 for k in sites}
    healed = sf.sparsify(sparse, text(), teacher=dense, **HEAL)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    assert all(torch.equal(sparse.get_parameter(k) == 0, zero) for k, zero in zeros.items())
    at_once = sf.sparsify(dense, text(), **HEAL)  # which prunes by magnitude before its first step
    assert curve(healed) == curve(at_once) and healed.report["curves"][0]["kl"] > 0.001
    assert all(torch.equal(v, sparse.state_dict()[k]) for k, v in dense.state_dict().items())
    assert healed.report["notes"] == [n for n in at_once.report["notes"] if "already" not in n]


def test_without_a_teacher_it_teaches_itself_and_that_is_said():
    dense, sparse, sites = pair()
    result = sf.sparsify(sparse, text(), **HEAL)
    assert result.report["curves"][0]["kl"] < 1e-6
    (note,) = [n for n in result.report["notes"] if "already" in n]
    assert note.startswith(f"{len(sites)} of {len(sites)} weights are 2:4 already, and the model is its own teacher")
    for model, options in (
        (dense, {}),
        (pair()[1], {"teacher": dense}),
        (pair()[1], {"objective": Distillation(kl=0)}),
    ):
        report = sf.sparsify(model, text(), **HEAL, **options).report
        assert not any("already" in n for n in report["notes"])
    partly, _, _ = pair()
    sf.sparsify(partly, method="magnitude", include="*.up_proj")
    partly.get_parameter(sites[0]).data.zero_()  # which says nothing
    notes = sf.sparsify(partly, text(), exclude="*.down_proj", **HEAL).report["notes"]
    assert [n for n in notes if n.startswith(f"2 of {len(sites) - 2} weights are 2:4 already")]


def test_a_teacher_in_a_wrapper():
    dense, sparse, _ = pair()
    plain = curve(sf.sparsify(copy.deepcopy(sparse), text(), teacher=dense, **HEAL))
    for wrapped in (torch.compile(dense), torch.nn.DataParallel(dense)):
        assert curve(sf.sparsify(copy.deepcopy(sparse), text(), teacher=wrapped, **HEAL)) == plain


def test_the_model_itself_as_its_teacher_does_not_learn():
    dense, _, _ = pair()
    alone, own = copy.deepcopy(dense), dense
    assert curve(sf.sparsify(own, text(), teacher=own, **HEAL)) == curve(sf.sparsify(alone, text(), **HEAL))


def test_blocks_come_near_to_the_teachers():
    config = copy.deepcopy(build("llama").config)
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    dense = type(build("llama"))(config).eval()
    sparse = copy.deepcopy(dense)
    sf.sparsify(sparse, method="magnitude")
    for options in ({**HEAL, "calibration": 8}, {"method": "wanda", "batch_size": 2, "show_progress": False}):
        report = sf.sparsify(copy.deepcopy(sparse), text(), teacher=dense, reconstruct=2, **options).report
        assert all(0.01 < b["after"] < b["before"] for b in report["reconstruction"]), report["reconstruction"]
        assert not any(n.startswith("teacher is given") for n in report["notes"])


OTHER_BASIS = "model.embed_tokens.weight of the teacher is another than the model's"


def rotated_pair(name="llama", steps=20):
    """A model, and the same in another basis."""
    torch.manual_seed(0)
    turned = copy.deepcopy(teacher := build(name).eval())
    sf.rotate(turned, text(), steps=steps, lr=0.1, batch_size=2)
    assert torch.allclose(turned(**text()[0]).logits, teacher(**text()[0]).logits, atol=1e-3)
    return teacher, turned


@pytest.mark.parametrize(
    "options, without",
    [
        ({"start": "magnitude", "reconstruct": 1}, "reconstruct=0"),
        ({"method": "wanda", "reconstruct": 1}, "reconstruct=0"),
        ({"start": "magnitude", "objective": Distillation(features="squarehead")}, "no features"),
        ({"start": "alps", "reconstruct": 1, "objective": Distillation(features="tinybert")}, "reconstruct=0 and no features"),
    ],
    ids=["blocks", "one-shot", "features", "both"],
)  # fmt: skip
def test_values_on_the_way_of_a_teacher_in_another_basis_are_no_aim(options, without):
    teacher, turned = rotated_pair()
    before = {n: t.clone() for n, t in turned.state_dict().items()}
    how = {k: v for k, v in HOW.items() if "method" not in options or k not in ("steps", "compile", "lr")}
    with pytest.raises(SparseForgeError, match=f"{OTHER_BASIS} .* pass {without}, or"):
        sf.sparsify(turned, text(), teacher=teacher, **how, **options)
    assert all(torch.equal(t, before[n]) for n, t in turned.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_table_that_turned_by_little_is_known_from_one_that_learned(name, dtype):
    teacher, turned = rotated_pair(name, steps=1)
    learned = copy.deepcopy(teacher)
    sf.sparsify(learned, text(), **HEAL, trainable="all")
    ours, others, theirs = (m.to(dtype).get_input_embeddings().weight for m in (turned, learned, teacher))
    difference = (ours.float() - theirs.float()).square().sum() / theirs.float().square().sum()
    assert 0 < difference < 0.3 and not torch.equal(others, theirs)
    config = sf.alps_kd_preset(steps=2, start="magnitude", reconstruct=1)
    with pytest.raises(SparseForgeError, match="e of the teacher is another"):
        check_basis([], {"e": ours}, {"e": theirs}, config, None)
    check_basis([], {"e": others}, {"e": theirs}, config, None)


def test_answers_of_a_teacher_in_another_basis_are():
    teacher, turned = rotated_pair()
    assert curve(sf.sparsify(turned, text(), teacher=teacher, **HEAL, reconstruct=0))[0][1] > 0.001


def test_a_loop_of_ones_own_has_no_such_teacher_either():
    teacher, turned = rotated_pair()
    config, objective = sf.alps_kd_preset(steps=2, start="magnitude"), Distillation(features="squarehead")
    with pytest.raises(SparseForgeError, match=OTHER_BASIS):
        sf.prepare(turned, text()[0], config, teacher=teacher, objective=objective)


def test_weights_that_were_dense_are_named():
    dense, _, sites = pair()
    partly = copy.deepcopy(dense)
    sf.sparsify(partly, method="magnitude", exclude="*.down_proj")
    report = sf.sparsify(partly, text(), teacher=dense, **HEAL).report
    named = [n for n in report["notes"] if n.startswith("was not 2:4 yet, and is pruned by magnitude: ")]
    assert len(named) == 1 and named[0].count("down_proj") == sum("down_proj" in s for s in sites)
    partly = copy.deepcopy(pair()[0])
    sf.sparsify(partly, method="magnitude", exclude="*.down_proj")
    report = sf.sparsify(partly, text(), teacher=dense, exclude="*.down_proj", **HEAL).report
    assert not any("was not" in n for n in report["notes"])


def test_values_in_few_bits_from_the_masks_as_they_are():
    dense, sparse, sites = pair()
    result = sf.sparsify(sparse, text(), teacher=dense, values="int8", calibration=8, **HEAL)
    assert set(result.scales) <= set(sites) and result.scales
    assert all(check_pattern(sparse.get_parameter(k), TWO_FOUR) for k in sites)


def test_other_methods_take_a_teacher_too():
    dense, sparse, _ = pair()
    for method in ("ast", "sr-ste", "gmp", "maskllm"):
        result = sf.sparsify(copy.deepcopy(sparse), text(), method=method, teacher=dense, **HOW)
        assert result.report["curves"][0]["kl"] > 0.001


def test_a_loop_of_ones_own():
    dense, sparse, sites = pair()
    prepared = sf.prepare(sparse, text()[0], sf.alps_kd_preset(steps=2, start="magnitude"), teacher=dense)
    assert prepared._taught_by is None  # a shared teacher is not held whole beside its parts
    loss = prepared(**text()[0]).loss
    alone = sf.prepare(pair()[1], text()[0], sf.alps_kd_preset(steps=2, start="magnitude"))
    assert loss > alone(**text()[0]).loss + 0.001
    sf.finalize(prepared)
    assert all(check_pattern(sparse.get_parameter(k), TWO_FOUR) for k in sites)


@pytest.mark.parametrize(
    ("options", "why"),
    [({"method": "magnitude"}, "nothing in this run comes near to it"),
     ({"method": "wanda", "batch_size": 2}, "nothing in this run comes near to it"),
     ({**HEAL, "objective": Distillation(kl=0)}, "nothing in this run comes near to it")],
)  # fmt: skip
def test_a_teacher_that_nobody_asks_is_named(options, why):
    dense, sparse, _ = pair()
    data = None if options.get("method") == "magnitude" else text()
    notes = sf.sparsify(sparse, data, teacher=dense, **options).report["notes"]
    assert [n for n in notes if n.startswith(f"teacher is given and not used: {why}")]


def other_shape(dense):
    config = copy.deepcopy(dense.config)
    config.intermediate_size *= 2
    return type(dense)(config)


def with_nan(dense):
    dense.model.norm.weight.data[0] = float("nan")
    return dense


@pytest.mark.parametrize(
    ("change", "message"),
    [(other_shape, r"has it as \[\d+, \d+\] where the model has model\.layers\.0\.mlp\.gate_proj\.weight"),
     (lambda dense: build("gpt2"), "has no such weight where the model has"),
     (with_nan, r"model\.norm\.weight of the teacher is not there, or holds NaN"),
     (lambda dense: dense.to("meta"), "of the teacher is not there"),
     (lambda dense: "no/such/folder", "no/such/folder"),
     (lambda dense: 3, "teacher is 3: give a model, or the folder")],
)  # fmt: skip
def test_what_is_no_teacher(change, message):
    dense, sparse, _ = pair()
    before = copy.deepcopy(sparse.state_dict())
    with pytest.raises(SparseForgeError, match=message):
        sf.sparsify(sparse, text(), teacher=change(dense), **HEAL)
    assert all(torch.equal(v, before[k]) for k, v in sparse.state_dict().items())


class Stop(Exception):
    pass


def test_a_killed_run_goes_on_with_its_teacher_and_no_other(tmp_path):
    dense, sparse, _ = pair()
    whole = copy.deepcopy(sparse)
    options = HEAL | {"save_seconds": 0.0, "state_path": tmp_path / "state"}

    def stop(step, row):
        if step == 2:
            raise Stop

    with pytest.raises(Stop):
        sf.sparsify(sparse, text(), teacher=dense, on_step=stop, **options)
    assert torch.equal(sparse.lm_head.weight, whole.lm_head.weight)
    with pytest.raises(SparseForgeError, match="teacher"):
        sf.sparsify(sparse, text(), teacher=copy.deepcopy(whole), **options)
    with pytest.raises(SparseForgeError, match="teacher"):
        sf.sparsify(sparse, text(), **options)
    resumed = sf.sparsify(sparse, text(), teacher=dense, **options)
    assert curve(resumed) == curve(sf.sparsify(whole, text(), teacher=dense, **HEAL))
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in sparse.state_dict().items())


def test_on_the_command_line(tmp_path):
    write_checkpoint(tmp_path / "dense", num_hidden_layers=1)
    (tmp_path / "text.txt").write_text(TEXT * 60)

    def run(*arguments):
        return CliRunner().invoke(cli.app, [*map(str, arguments), "--device", "cpu"])

    said = run("sparsify", tmp_path / "dense", "--method", "magnitude", "-o", tmp_path / "sparse")
    next_step = (
        f"sparsify {tmp_path / 'sparse'} --teacher {tmp_path / 'dense'} --set start=magnitude --data DATA -o healed"
    )
    assert next_step in " ".join(said.stdout.split())
    said = run(
        "sparsify", tmp_path / "dense", "--method", "magnitude", "--exclude", "*.o_proj", "-o", tmp_path / "part"
    )
    assert "start=magnitude --data DATA --exclude '*.o_proj' -o healed" in " ".join(said.stdout.split())
    how = ("--data", tmp_path / "text.txt", "--tokens", "256", "--length", "32", "--batch-size", "2")
    more = ("--set", "start=magnitude", "--teacher", tmp_path / "dense")
    said = run("sparsify", tmp_path / "sparse", *how, *more, "-o", tmp_path / "healed")
    assert said.exit_code == 0, said.output
    assert f"healed --dense {tmp_path / 'dense'}" in " ".join(said.stdout.split())
    recipe = sf.Recipe.read(tmp_path / "healed")
    assert recipe.teacher == str(tmp_path / "dense") and recipe.options["start"] == "magnitude"
    again = run("sparsify", "--config", tmp_path / "healed", "-o", tmp_path / "again")
    assert again.exit_code == 0, again.output
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("healed", "again")]
    assert weights[0] == weights[1]
    wrong = run("sparsify", tmp_path / "sparse", *how, "--teacher", tmp_path / "none", "-o", tmp_path / "no")
    assert wrong.exit_code == 2 and "none" in wrong.stderr and not (tmp_path / "no").exists()
