"""What people see of the command line: examples, dry runs, json, and where measurements of a run go."""

import json
import os
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from tiny_checkpoint import write_checkpoint, write_text
from tiny_models import build
from typer.main import get_command
from typer.testing import CliRunner

import sparseforge_fx as sf
from sparseforge_fx import cli
from sparseforge_fx.cli.app import as_typed, at_home
from sparseforge_fx.cli.dry_run import of_export
from sparseforge_fx.cli.run_folder import RunFolder
from sparseforge_fx.cli.sparsify import sparsify
from sparseforge_fx.deploy.lowering.cost_table import Shape, Timing, as_table, save_table
from sparseforge_fx.formats import DENSE, parse_format
from sparseforge_fx.passes.find_routing import Routing
from sparseforge_fx.pattern import TWO_FOUR, hard_mask
from sparseforge_fx.plans import Plan, PlannedWeight, Price
from sparseforge_fx.training.checkpoint import save_state

COMMANDS = get_command(cli.app).commands


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A dense model, a text, and the folder of a run."""
    root = tmp_path_factory.mktemp("face")
    write_checkpoint(root / "dense", num_hidden_layers=1)
    write_text(root / "test.txt", repeats=6)
    model, tokenizer = sf.load(root / "dense")
    sf.sparsify(model).save(root / "run", tokenizer)
    return root


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def ok(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_tilde_is_the_home_folder_wherever_a_path_is_named(home, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    ok("sparsify", "~/dense", "--method", "magnitude", "--output=~/tilde")
    assert (home / "tilde" / "report.html").is_file() and os.listdir(tmp_path) == []
    for name, value in (("model", "~/x"), ("plan", "~/x"), ("output", Path("~/x"))):
        assert at_home(name, value) == type(value)(home / "x")
    for name, value in (("prompt", "~/x"), ("model", "a/~"), ("output", Path("a/~")), ("model", None), ("seed", 1)):
        assert at_home(name, value) == value
    assert at_home("output", Path("~nobody-of-this-name/x")) == Path("~nobody-of-this-name/x")


@pytest.mark.parametrize("verb", sorted(COMMANDS))
def test_every_verb_has_examples_that_can_be_typed(verb):
    command = COMMANDS[verb]
    lines = [line.removeprefix("Example: ") for line in command.epilog.split("\n\n") if "sparseforge-fx" in line]
    assert lines and command.help
    for line in lines:
        program, name, *rest = shlex.split(line)
        assert (program, name) == ("sparseforge-fx", verb)
        command.make_context(verb, rest)  # raises for an option or a value that there is not
    assert lines[0] in run(verb, "--help").output.replace("\n ", " ") or len(lines[0]) > 78


def test_the_first_help_names_the_first_command_and_completion():
    text = " ".join(run("--help").output.split())
    assert "Begin with: sparseforge-fx inspect MODEL" in text and "--install-completion" in text


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            "sparsify {home}/dense --data {home}/test.txt --length 16 --tokens 1k -o {home}/no",
            "15 steps of 64 tokens (960)",
        ),
        (
            "sparsify {home}/dense --data {home}/test.txt --length 16 --tokens 320 -o {home}/no",
            "after a layer-wise start of",
        ),
        pytest.param(
            "sparsify {home}/dense --data {home}/test.txt --length 16 --tokens 320 --optimizer adamw8bit -o {home}/no",
            "129 kB for teacher, masks, gradients and AdamW in 8 bits",  # (3 * 4 + 2) * 9,216
            marks=pytest.mark.skipif(find_spec("torchao") is None, reason="torchao has that optimizer"),
        ),
        (
            "sparsify {home}/dense --data {home}/test.txt --length 16 --method wanda --device disk -o {home}/no",
            "at the largest weight; the others stay on disk",
        ),
        (
            "sparsify {home}/dense --data {home}/test.txt --tokens 1k --method ast -o {home}/no",  # it has 128 positions
            "1 steps of 512 tokens (512)",
        ),
        (
            "sparsify {home}/dense --data {home}/test.txt --length 16 --tokens 1k --activation-checkpointing -o {home}/no",
            "counted as if all were kept",
        ),
        ("sparsify {home}/dense --method magnitude -o {home}/no", "7 linears with 9,216 weights"),
        (
            "sparsify {home}/dense --method magnitude --exclude model.layers.0.mlp -o {home}/no",
            "model.layers.0.mlp.up_proj.weight: excluded by name",
        ),
        ("sparsify {home}/dense --method magnitude --exclude lm_haed -o {home}/no", "notes: exclude 'lm_haed' is"),
        ("quantize {home}/dense --exclude lm_haed -o {home}/no", "notes: exclude 'lm_haed' is"),
        ("quantize {home}/dense --values int4 -o {home}/no", "7 linears in dense int4/32"),
        ("quantize {home}/dense --data {home}/test.txt --set length=16 -o {home}/no", " on this machine"),
        ("export {home}/run -o {home}/no.pt2", "7 linears, those of them whose weights are 2:4"),
        ("export {home}/run --format safetensors -o {home}/no", "all packed"),
    ],
)
def test_a_dry_run_says_what_would_be_done_and_writes_nothing(home, line, says):
    before = sorted(os.listdir(home))
    arguments = [*line.format(home=home).split(), "--dry-run"]
    if "--format" in line:  # one of them is enough
        assert says in json.loads(ok(*arguments, "--json"))["bytes"]
    else:
        assert says in ok(*arguments)
    assert sorted(os.listdir(home)) == before


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("sparsify {home}/dense --method magnitude --include nothing* -o {home}/no --dry-run", "nothing to prune"),
        ("sparsify {home}/dense --method magnitude -o {home}/run --dry-run", "is not empty"),
        ("sparsify {home}/dense --tokens 5 --data {home}/test.txt -o {home}/no --dry-run", "less than one step"),
        ("sparsify -o {home}/no --dry-run", "there is no model"),
        ("sparsify {home}/dense --data {home}/test.txt --device disk -o {home}/no --dry-run", "is not trained"),
        ("sparsify {home}/dense --device disk --log-with wandb -o {home}/no --dry-run", "no use for --log-with"),
        ("sparsify {home}/dense --method magnitude --device disk -o {home}/run --dry-run", "is not empty"),
        ("sparsify {home}/dense --method magnitude --log-with wandb -o {home}/no", "has no use for --log-with: leave"),
        ("sparsify {home}/dense --compile on -o {home}/no --dry-run", "magnitude does not train and has no use for"),
        ("sparsify {home}/dense --save-seconds 5 -o {home}/no", "has no use for --save-seconds"),
        ("sparsify {home}/dense --method magnitude --device tpu -o {home}/no --dry-run", "cannot be used here"),
        ("quantize {home}/dense --values int3 -o {home}/no --dry-run", "int3"),
        ("quantize {home}/dense --plan {home}/none.json -o {home}/no --dry-run", "none.json cannot be read: No such"),
        ("export {home}/run --format onnx -o {home}/no --dry-run", "unknown format"),
        ("export {home}/run --generator --portable -o {home}/no.pt2 --dry-run", "leave --portable out"),
        ("report {home}/run --html --json", "give one of the two"),
        ("evaluate {home}/run --task-data rte -o {home}/no", "is not TASK=FILE"),
        ("evaluate {home}/run --task-data rte=x.jsonl", "is not among the tasks"),
        ("evaluate {home}/run -o {home}", "name a file"),
        ("inspect {home}/dense --picture {home}/no/at/all.png", "name a file that ends in .svg"),
    ],
)
def test_a_wrong_invocation_gets_one_sentence(home, line, says):
    before = sorted(os.listdir(home))
    result = run(*line.format(home=home).split())
    assert result.exit_code == 2 and result.stdout == ""
    assert says in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert sorted(os.listdir(home)) == before


def test_json_is_all_that_is_printed(home):
    assert json.loads(ok("report", home / "run", "--json"))["method"] == "magnitude"
    (found,) = json.loads(ok("generate", home / "dense", "-p", "The", "--max-new-tokens", "2", "--json"))
    assert found["prompt"] == "The" and isinstance(found["text"], str)


def test_names_are_printed_as_they_are(home, tmp_path):
    report = json.loads((home / "run" / "report.json").read_text())
    names = ["[a] :smile: x[/y]", "model.[b].weight", "exclude '*.[a-z].mlp' names nothing"]
    report["recipe"]["model"], report["notes"] = names[0], names[2:]
    report["skipped"] = [{"name": names[1], "shape": [3], "reason": "x[/y]"}]
    (tmp_path / "report.json").write_text(json.dumps(report))
    said = ok("report", tmp_path)
    assert all(name in said for name in names)


def test_what_a_terminal_cannot_show_is_written_out(home, tmp_path):
    report = json.loads((home / "run" / "report.json").read_text()) | {"notes": ["caf\u00e9"]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    result = CliRunner(charset="ascii").invoke(cli.app, ["report", str(tmp_path)])
    assert result.exit_code == 0 and "caf\\xe9" in result.stdout


def test_measurements_of_a_run_go_onto_its_page(home):
    options = ["--data", home / "test.txt", "--context", "32", "--max-windows", "6", "-p", "The quick"]
    numbers = json.loads(ok("evaluate", home / "run", "--dense", home / "dense", *options, "--json"))
    assert json.loads((home / "run" / "evaluation.json").read_text()) == numbers
    assert numbers["paired"]["pairs"] == 6 and numbers["paired"]["difference"] == pytest.approx(numbers["nll_increase"])
    assert {"prompt", "dense", "model"} == set(numbers["texts"][0]) and numbers["perplexity"]["model"]["stderr"] > 0
    page = (home / "run" / "report.html").read_text()
    assert f"{numbers['perplexity']['model']['perplexity']:.4g}" in page and "The quick" in page
    assert "in pairs over 6 windows (p = " in page
    (home / "run" / "report.html").unlink()
    assert "report.html" in ok("report", home / "run", "--html") and (home / "run" / "report.html").is_file()


@pytest.mark.parametrize("saved", [True, False])
def test_an_interruption_says_how_to_go_on(tmp_path, saved):
    folder = RunFolder(tmp_path)

    def interrupted():
        if saved:
            save_state(folder.state, 0, {"x": 1.0})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        folder.telling(interrupted)()
    (told,) = caught.value.__notes__
    assert ("--resume" in told) == saved and ("nothing was saved" in told) != saved


def test_inspect_shows_what_a_plan_and_a_table_predict(home, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    int8, dense = parse_format("2:4 int8"), Price(0.0, 4096.0, {1: 4.0, 8: 8.0})
    weight = PlannedWeight(name, (64, 32), int8, {DENSE: dense, int8: Price(0.0123, 1280.0, {1: 2.0, 8: 2.0})})
    Plan([weight], (1, 8), {"speedup": 1.0}, None, 1).save(tmp_path / "plan.json")
    rows = [
        Timing(Shape(64, 32, "bfloat16"), layout, 1, 6.0, (6.0, 6.0), us, (us, us))
        for layout, us in (("a", 4.0), ("b", 3.0))
    ]
    save_table(as_table(rows), tmp_path / "costs.json")
    options = [
        "--plan",
        tmp_path / "plan.json",
        "--table",
        tmp_path / "costs.json",
        "--picture",
        tmp_path / "linears.svg",
    ]
    text = ok("inspect", home / "dense", *options)
    assert "+0.0123, 2.00x 4.00x" in text and "2.00x" in text and "not timed" in text and "wrote" in text
    picture = (tmp_path / "linears.svg").read_text()
    assert (
        "model.layers.0.mlp.up_proj.weight (1)" in picture
        and "2.00x at 1" in picture
        and "stays dense: also read" in picture
    )
    refused = run("inspect", home / "dense", "--pattern", "4:8", "--table", tmp_path / "costs.json")
    assert refused.exit_code == 2 and "not of 4:8" in refused.stderr


def test_inspect_reads_the_times_of_the_weights_dtype(home, tmp_path):
    table, rows = tmp_path / "costs.json", {"bfloat16": 3.0, "float32": 2.0}
    for dtypes, gain in ((["bfloat16"], 2.0), (["bfloat16", "float32"], 3.0)):
        timed = [Timing(Shape(64, 32, t), "a", 1, 6.0, (6.0, 6.0), rows[t], (rows[t],) * 2) for t in dtypes]
        save_table(as_table(timed), table)
        told = json.loads(ok("inspect", home / "dense", "--table", table, "--json"))
        (up,) = [s for s in told["sites"] if s["name"] == "model.layers.0.mlp.up_proj.weight"]
        assert up["gain"] == {"1": gain}
        other = f"{table} has times in bfloat16, and the weights are float32"
        assert (other in told["notes"]) == (len(dtypes) == 1)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """The folder of a 2:4 mixture: four experts, two for a token."""
    folder, model = tmp_path_factory.mktemp("mixture"), build("moe")
    for parameter in model.parameters():
        if parameter.dim() == 3:
            parameter.data *= hard_mask(parameter.detach().abs(), TWO_FOUR)
    model.save_pretrained(folder)
    return folder


def stack_rows(routing):
    return [
        Timing(Shape(*sides, "float32", routing=routing), "rows", 1, 6.0, (6.0, 6.0), us, (us, us))
        for sides, us in (((64, 32), 3.0), ((32, 32), 12.0))
    ]


@pytest.mark.parametrize("routing", [None, Routing(4, 1), Routing(4, 2)])
def test_stacks_are_shown_as_they_are_decided(mixture, tmp_path, routing):
    """By the times of stacks of which a token goes to as many experts, and by no others."""
    table = tmp_path / "costs.json"
    save_table(as_table(stack_rows(routing)), table)
    lines = ok("inspect", mixture, "--table", table, "--json")
    stacks = {s["name"].rpartition(".")[2]: s for s in json.loads(lines)["sites"] if "experts" in s}
    assert {s["chosen"] for s in stacks.values()} == {2}
    gains = {name: s["gain"] for name, s in stacks.items()}
    known = routing == (4, 2)
    assert gains == ({"gate_up_proj": {"1": 2.0}, "down_proj": {"1": 0.5}} if known else {name: {} for name in gains})
    lower = ("lower", mixture, "--tokens", "1", "--device", "cpu", "--dtype", "float32", "--table", table)
    said = " ".join(ok(*lower).split())
    if known:
        assert "4 x 64 x 32, 2 a token" in said and "1 packed" in said and "4 x 64 x 32, rows" in said
        assert "slower than dense at 1 tokens (0.50x)" in said
    else:
        assert "0 packed" in said and "gate: not measured at 1 tokens" in said


def test_a_dry_run_counts_stacks_where_they_are_packed(mixture, tmp_path):
    """A graph in a file has them as they are in the folder: this one has them dense."""
    said = ok("export", mixture, "-o", tmp_path / "m.pt2", "--dry-run")
    assert "7 linears, those of them" in said and "2 stacks of experts: export writes those packed" in said
    said = ok("export", mixture, "--format", "safetensors", "-o", tmp_path / "packed", "--dry-run")
    assert "9 linears, those of them" in said and "stacks of experts" not in said
    ok("export", mixture, "--format", "safetensors", "-o", tmp_path / "packed")
    said = ok("export", tmp_path / "packed", "-o", tmp_path / "m.pt2", "--dry-run")
    assert "9 linears, those of them" in said and "stacks of experts" not in said


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("pass length=256", "pass --length 256"),
        ("batch_size=4 is too many: use batch_size=2, or length=8.", "--batch-size 4 is too many: use --batch-size 2, or --length 8."),
        ("--set length=9x: write NAME=VALUE", "--set length=9x: write NAME=VALUE"),
        ("pass curvature_beta=0.5", "pass --set curvature_beta=0.5"),
        ("call sf.sparsify(model, length=3, lr=0.1) with lr=0.1", "call sf.sparsify(model, length=3, lr=0.1) with --lr 0.1"),
        ("compile=False or resume=True", "compile=False or resume=True"),
        ("use length=positions", "use length=positions"),
        ("x==3, objective=Distillation(kl=0)", "x==3, objective=Distillation(kl=0)"),
    ],
)  # fmt: skip
def test_arguments_of_python_are_told_as_options(text, typed):
    assert as_typed(text, sparsify) == typed


def test_a_dry_run_counts_in_the_dtype_that_is_asked_for(home):
    sizes = [
        of_export(str(home / "dense"), home, "pt2", None, False, dtype)["bytes"] for dtype in ("float32", "bfloat16")
    ]
    whole = [float(size.split(" to ")[1].split()[0]) for size in sizes]
    assert whole[0] == pytest.approx(2 * whole[1], rel=0.02)
