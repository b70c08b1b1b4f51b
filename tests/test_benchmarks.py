"""The benchmark scripts on a tiny model, in this process: their code, and what their json needs; no number of theirs."""

import importlib
import json
from pathlib import Path

import pytest
import torch
import transformers
import typer
from tiny_checkpoint import write_checkpoint, write_text

from sparseforge_fx.kernels import cpu
from sparseforge_fx.pattern import TWO_FOUR, hard_mask

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"
MODEL = {"model": "the tiny one", "label": "tiny"}
STEPS = {**MODEL, "batch_size": 1, "length": 16, "rounds": 1}
TEXT = {"model": "the tiny one", "data": "", "calibration": 2, "length": 32}
#: script -> its options, and what its json holds beside commit, device and versions
SCRIPTS = {
    "attention_gradients": ({"label": "tiny", "shapes": "1x2x9x8", "rounds": 1}, {"cases", "instruction_set"}),
    "contenders": (
        {"label": "tiny", "shapes": "32x64", "rows": "1", "threads": "1", "rounds": 2, "rotate_bytes": 1},
        {"cases", "rotated_bytes"},
    ),
    "cpu_kernels": (
        {"label": "tiny", "shapes": "32x64", "rows": "1", "threads": "1", "seconds_per_case": 0.0},
        {"cases"},
    ),
    "decode": ({**MODEL, "batch": [1], "prefill": 8, "tokens": 2, "rounds": 1}, {"batches", "prefill", "gate"}),
    "decode_attention": (
        {"label": "tiny", "shapes": "1x4x2x9x8", "rounds": 1, "rotated_bytes": 1},
        {"cases", "instruction_set", "dtype"},
    ),
    "estimator_cost": (STEPS, {"median_seconds", "over_none", "amortised"}),
    "huge_pages": (
        {"label": "tiny", "shapes": "32x64", "rows": "1", "rounds": 4, "rotate_bytes": 1},
        {"cases", "rotated_bytes"},
    ),
    "plan_check": ({**TEXT, "valid": "", "weights": 3, "windows": 1}, {"spearman", "rows", "predict_seconds"}),
    "row_split": ({**TEXT, "rotate_bytes": 1, "rounds": 1, "rows": [2]}, {"budgets", "time", "share_of_the_kept"}),
    "one_shot_speed": (
        {"out_features": 8, "in_features": 16, "rounds": 1},
        {"median_seconds", "relative_output_error"},
    ),
    "step_profile": ({**MODEL, "dtypes": "float32", "batch_size": 1, "length": 16}, {"dtypes"}),
    "training_overhead": (STEPS, {"prepare_seconds", "modes", "extra_memory"}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=1024)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import common

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in ("decode", "estimator_cost") else []) for n in SCRIPTS]
)
def test_a_script_writes_what_it_measured_and_where(name, model, text, results):
    if name == "attention_gradients" and not cpu.differentiates_attention():
        pytest.skip("no instructions for bfloat16")
    options, holds = SCRIPTS[name]
    files = {"model": str(model), "data": str(text), "valid": text}
    options = {name: files.get(name, value) for name, value in options.items()}
    importlib.import_module(name).main(**options)
    (file,) = (results / name.replace("cpu_", "")).glob("*.json")
    record = json.loads(file.read_text())
    assert record.keys() >= {*holds, "commit", "device", "threads", "versions"}


def test_swaps_are_predicted_made_and_taken_back(model, text, results, tmp_path):
    import swap_gains

    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    linears = [m.weight for m in net.model.modules() if isinstance(m, torch.nn.Linear)]
    for w in linears:
        w.data *= hard_mask(w.abs(), TWO_FOUR)
    net.save_pretrained(tmp_path / "sparse")
    options = {"sequences": 4, "length": 16, "windows": 2, "label": "tiny"}
    swap_gains.main(str(model), str(tmp_path / "sparse"), data=str(text), valid=text, **options)
    record = json.loads((results / "swap_gains" / "tiny.json").read_text())
    assert record["weights"] == len(linears) and record["groups"] == sum(w.numel() for w in linears) // 4
    assert record["dense"]["kl"] == pytest.approx(0, abs=1e-6) and record["before"]["kl"] > 0
    assert len(record["singles"]) == swap_gains.SINGLES and 0 < record["paying"] < record["groups"]
    most = record["after"][str(swap_gains.SHARES[-1])]
    assert {found["groups"] for found in most.values()} == {max(1, round(0.01 * record["groups"]))}
    assert most["swapped"]["kl"] != record["before"]["kl"] != most["dropped"]["kl"]


def test_swaps_need_a_model_that_is_sparse(model, text):
    import swap_gains

    with pytest.raises(typer.BadParameter, match="no linear that is 2:4"):
        swap_gains.main(str(model), str(model), data=str(text), valid=text)


def test_turns_are_taken_in_order(results):
    import common

    order = []
    found = common.in_turn({name: lambda name=name: order.append(name) or len(order) for name in "ab"}, 2)
    assert order == ["a", "b", "a", "b"] and found == {"a": [1, 3], "b": [2, 4]}
    assert common.medians_and_spread({"a": [3.0, 1.0, 2.0]}) == {
        "median_seconds": {"a": 2.0},
        "spread": {"a": [1.0, 3.0]},
    }


def read_by_the_tables(file, results):
    import quality_tables
    import records

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "RESULTS", results)
        record = json.loads(file.read_text())
        for folder in ("quality", "leaderboard"):
            record["label"] = "alps+kd-256-seed0"
            record["zero_shot"] = {"a task": {"acc": 0.5, "acc_stderr": 0.1, "documents": 2}}
            (results / folder).mkdir()
            (results / folder / "default.json").write_text(json.dumps(record))
        score = f"{record['sparse_perplexity']['test']:.2f}"
        row = quality_tables.quality_table().splitlines()[-1]
        seconds = f"{record['report']['seconds']:,.0f} ({record['report']['calibration_seconds']:,.0f})"
        assert row.startswith(f"| alps+kd | 256 | 4 x 64 | 2 | {seconds} | {score} |")
        where = record["report"]["device"]
        row = quality_tables.leaderboard_table().splitlines()[-1]
        assert (
            row.startswith(f"| alps+kd | 256 | 4 x 64 | 0.0005 | {seconds} | {where} | {score} |")
            and "| 50.0 ± 10.0 | 50 |" in row
        )


def test_quality_is_one_json_that_is_not_made_twice(model, results, capsys):
    import quality

    text = write_text(results / "text.txt")
    run = {"model": str(model), "data": [str(text)], "valid": text, "test": text, "folder": results / "runs"}
    run |= {"tokens": 256, "length": 64, "batch_size": 1, "calibration": 2, "windows": 1, "compile": "off"}
    quality.main(**run, label="default", rotate=2, quantize="int8")
    record = json.loads((results / "runs" / "default.json").read_text())
    assert record["tokens"] == 256 and record["report"]["sites"] == 14 and record["report"]["preset"] == "alps+kd"
    scores = (record["dense_perplexity"], record["sparse_perplexity"], record["quantized_perplexity"]["int8"])
    assert all(found["valid"] == found["test"] > 1 for found in scores) and len({s["test"] for s in scores}) == 3
    assert not list((results / "runs").glob("*.state"))
    assert record["rotation"]["steps"] == 2 and record["report"]["versions"]
    capsys.readouterr()
    quality.main(**run, label="default")
    assert "is there already" in capsys.readouterr().out
    quality.main(**run, method="dense", label="dense", dense_from=results / "runs" / "default.json")
    assert json.loads((results / "runs" / "dense.json").read_text())["sparse_perplexity"] == scores[0]
    read_by_the_tables(results / "runs" / "default.json", results)
    with pytest.raises(SystemExit, match="--options is not json"):
        quality.main(**run, label="other", options="{")


def test_estimates_are_compared_once(model, results, monkeypatch):
    import estimator_quality

    monkeypatch.setattr(estimator_quality, "RESULTS", results)
    monkeypatch.setattr(estimator_quality, "POINTS", (1, 8))
    text = write_text(results / "text.txt")
    run = {"model": str(model), "data": str(text), "valid": text, "batch_size": 1, "length": 16, "windows": 1}
    estimator_quality.main(**run, vectors=2, vectors_until=1, label="tiny")
    file = results / "estimator_quality" / "tiny.json"
    found = json.loads(file.read_text())["perplexity"]
    assert set(found["absolute"]) == {"1", "8"} and set(found["absolute of means, 2 vectors"]) == {"1"}
    assert set(found["gauss_newton"]) == {"8"} and not file.with_suffix(".state").exists()
    monkeypatch.setattr(estimator_quality, "windowed_perplexity", lambda *_: pytest.fail("measured twice"))
    estimator_quality.main(**run, vectors=2, vectors_until=1, label="tiny")
    assert json.loads(file.read_text())["perplexity"] == found


def test_without_a_gpu_a_script_says_so(results, monkeypatch):
    import common

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="finds no device"):
        common.use("cuda")


@pytest.mark.parametrize(
    ("name", "parameters", "sites", "active"),
    [("llama-70b", 68.98e9, 560, 1.0), ("deepseek-v3", 671.03e9, 604, 0.0533)],
)
def test_a_large_model_is_counted_by_its_first_blocks(results, name, parameters, sites, active):
    """Published sizes; a mixture's tokens meet eight of 256 experts and all that is shared."""
    import scale_plan

    scale_plan.main(models=name)
    record = json.loads((results / "scale" / f"{name}.json").read_text())
    assert record["parameters"] == pytest.approx(parameters, rel=1e-4) and record["sites"] == sites
    assert record["active_site_entries"] / record["site_entries"] == pytest.approx(active, rel=1e-2)
    assert [row["gpus"] for row in record["gpus"]] == [8, 64, 512]
    states = [row["state_bytes"] * row["gpus"] for row in record["gpus"]]
    assert max(states) == pytest.approx(min(states)) and record["bytes_per_weight"]["float32 master"] == 4


def test_experts_are_timed_in_every_format(results, monkeypatch):
    import experts_decode
    import records
    import speed_tables

    monkeypatch.setattr(records, "RESULTS", results)

    experts_decode.main(label="x", experts=2, hidden=64, width=32, tokens="1,3", rounds=4)
    found = json.loads((results / "experts_decode" / "x.json").read_text())["rows"]
    assert [row["tokens"] for row in found] == [1] * 6 + [3] * 6 and all(row["median_seconds"] > 0 for row in found)
    sizes = {row["format"]: row["bytes"] for row in found}
    assert sizes["dense"] > sizes["2:4"] > sizes["2:4 int8"] > sizes["2:4 int4"]
    assert sizes["dense"] > sizes["dense int8"] > sizes["dense int4"] > sizes["2:4 int4"]
    assert speed_tables.experts_table().count("\n| ") == 13


def test_a_table_that_no_page_would_show_is_not_written():
    import records

    assert records.table(("a", "b"), "lr", [(1, 2)]) == "| a | b |\n|---|---:|\n| 1 | 2 |"
    for sides, row in (("lrr", (1, 2)), ("lr", (1, 2, 3))):
        with pytest.raises(ValueError, match="2 columns"):
            records.table(("a", "b"), sides, [row])


@pytest.mark.parametrize("of", ["Qwen3-8B", "Qwen3-30B-A3B"])
def test_a_large_model_decodes_beside_what_llama_cpp_reads(results, monkeypatch, tmp_path, of):
    import gguf
    import large_decode
    import records
    import speed_tables

    monkeypatch.setattr(records, "RESULTS", results)
    monkeypatch.setattr(large_decode, "find_spec", lambda name: None)
    monkeypatch.setattr(large_decode, "generator", lambda config, name, *_: made.append(config) or len(made))
    taken = {"tokens_per_second": {"1": [8.0, 9.0]}, "first_token_seconds": {"1": [0.1, 0.1]}}
    monkeypatch.setattr(large_decode, "run_generator", lambda kind, path, folder: taken)
    made = []
    mixture = large_decode.SIDES[of]["experts"] > 0
    sides = {"layers": 1, "hidden": 32, "width": 32, "heads": 2, "keys": 1, "vocabulary": 96}
    sides |= {"experts": 4, "chosen": 2} if mixture else {}
    large_decode.main(tmp_path, of, label="x", sides=json.dumps(sides), batch=[1, 2], rounds=2)
    record = json.loads((results / "large_decode" / "x.json").read_text())
    assert list(record["points"]) == list(large_decode.OURS) and record["perplexity"]["transformers"] > 1
    assert speed_tables.large_decode_table().count("\n| ") == 1 + len(large_decode.OURS)
    prompts = torch.load(tmp_path / "request.pt")["ids"]
    assert len(prompts) == 2 and not torch.equal(*prompts)
    with pytest.raises(SystemExit, match="name a new folder"):
        large_decode.main(tmp_path, of, sides=json.dumps(sides | {"layers": 2}))

    file = large_decode.write_gguf(made[0], tmp_path / "F16.gguf")
    stored = {t.name: t for t in gguf.GGUFReader(file).tensors}
    dense = large_decode.model_of(made[0], "dense bf16").state_dict()
    experts, end = ("experts.", "") if mixture else ("", ".weight")
    parts = {name: dense.get(f"model.layers.0.mlp.{experts}{name}_proj{end}") for name in ("gate", "up")}
    if mixture:  # one stack there is two here
        into = dense["model.layers.0.mlp.experts.gate_up_proj"]
        parts = {"gate": into[:, :32], "up": into[:, 32:]}
    for name, want in parts.items():
        got = torch.from_numpy(stored[f"blk.0.ffn_{name}{'_exps' if mixture else ''}.weight"].data.copy())
        torch.testing.assert_close(got.float(), want.float(), rtol=1e-3, atol=1e-4)
    assert len(stored) == len(dense) + mixture
    models = {name: large_decode.model_of(made[0], name) for name in large_decode.OURS}
    held = {name: sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for name, m in models.items()}
    assert sorted(held, key=held.get) == ["2:4 int4", "dense int4", "2:4 int8", "dense int8", "dense bf16"]


def test_a_forecast_stands_beside_what_the_run_took(results, model, tmp_path, monkeypatch):
    import forecasts

    said = {"start": 8.0, "step": 1.5, "steps": 2, "seconds": 11.0}
    report = {"seconds": 22.0, "peak_memory_bytes": 10, "calibration_seconds": 4.0, "method": "sparseforge"}
    report["curves"] = [{"seconds": 3.0}, {"seconds": 1.0}, {"seconds": 1.0}]

    def run(arguments):
        if "--dry-run" in arguments:
            return json.dumps({"predicted": said})
        (tmp_path / "sparse").mkdir()
        (tmp_path / "sparse" / "report.json").write_text(json.dumps(report))
        return ""

    monkeypatch.setattr(forecasts, "run", run)
    monkeypatch.setitem(
        forecasts.SHAPES, "tiny", transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=1)
    )
    forecasts.main(tmp_path, "some text", str(model), ["--tokens", "9"], model="tiny", blocks=1)
    record = json.loads((results / "forecasts" / "tiny-1-sparseforge.json").read_text())
    assert record["ratio"] == {"seconds": 0.5, "step": 1.5, "start": 2.0} and record["options"] == ["--tokens", "9"]
    assert not (tmp_path / "sparse").exists() and not (tmp_path / "model").exists()
