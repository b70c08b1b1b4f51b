"""What the leaderboard runs next: sweeps first, then seeds at the best rate, and nothing twice."""

import json
import math
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def board(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import leaderboard

    monkeypatch.setattr(leaderboard, "RESULTS", tmp_path)
    return leaderboard


def finish(run, valid):
    run.file.write_text(json.dumps({"sparse_perplexity": {"valid": valid, "test": 2 * valid}}))


def test_a_sweep_comes_before_the_seeds_and_decides_their_rate(board):
    first = board.plan(["ast"], 4096, 2, 1024)
    assert [r.name for r in first] == [f"sweep-ast-{rate:g}-1024" for rate in (2e-4, 5e-4, 1e-3)]
    assert all(r.arguments[r.arguments.index("--tokens") + 1] == "1024" for r in first)
    finish(first[0], 30.0)
    finish(first[1], 20.0)
    assert [r.name for r in board.plan(["ast"], 4096, 2, 1024)] == [first[2].name]
    finish(first[2], 25.0)
    seeds = board.plan(["ast"], 4096, 2, 1024)
    assert [r.name for r in seeds] == ["ast-4096-seed0", "ast-4096-seed1"]
    assert all(r.arguments[r.arguments.index("--lr") + 1] == "0.0005" for r in seeds)
    finish(seeds[0], 10.0)
    assert board.plan(["ast"], 4096, 2, 1024) == seeds[1:]
    finish(seeds[1], 10.0)
    assert board.plan(["ast"], 4096, 2, 1024) == []


def test_a_rate_for_all_needs_no_sweep(board):
    (run,) = board.plan(["ast"], 4096, 1, 1024, rate=3e-4)
    assert run.name == "ast-4096-seed0" and run.arguments[run.arguments.index("--lr") + 1] == "0.0003"


@pytest.mark.parametrize(
    ("method", "best", "tried"),
    [
        ("ast", 5e-4, [2e-4, 5e-4, 1e-3]),
        ("ast", 1e-4, [5e-5, 1e-4, 2e-4, 5e-4, 1e-3]),
        ("ast", 1e-9, [5e-5, 1e-4, 2e-4, 5e-4, 1e-3]),  # there is nothing lower
        ("ast", 2e-3, [2e-4, 5e-4, 1e-3, 2e-3, 5e-3]),
        ("maskllm", 5e-3, [5e-4, 1e-3, 2e-3, 5e-3]),
        ("maskpro", 50, [5, 50, 500]),
    ],
)
def test_a_sweep_goes_on_until_the_best_has_worse_neighbours(board, method, best, tried):
    while (rate := board.best_rate(method, 1024)) is None:
        for name, run in board.sweep(method, 1024).items():
            finish(run, abs(math.log(name / best)))
    assert list(board.sweep(method, 1024)) == tried
    assert rate == min(tried, key=lambda r: abs(math.log(r / best)))


def test_of_equal_rates_the_highest_is_taken(board):
    for run, perplexity in zip(board.sweep("maskpro", 1024).values(), (20.0, 20.0, 21.0), strict=True):
        finish(run, perplexity)
    assert board.best_rate("maskpro", 1024) == 50


def test_the_rate_of_maskpro_is_that_of_its_logits(board):
    rates = [
        json.loads(r.arguments[r.arguments.index("--options") + 1]) for r in board.plan(["maskpro"], 4096, 1, 1024)
    ]
    assert rates == [{"logit_lr": 5}, {"logit_lr": 50}, {"logit_lr": 500}]


def test_a_longer_board_takes_over_the_rates_of_a_shorter_one(board):
    for run, perplexity in zip(board.sweep("ast", 1024).values(), (30.0, 20.0, 25.0), strict=True):
        finish(run, perplexity)
    assert [r.name for r in board.plan(["ast"], 65536, 1, 1024)] == ["ast-65536-seed0"]
    assert all("16384" in r.name for r in board.plan(["ast"], 65536, 1, 16384))


def test_one_shot_methods_need_no_sweep_and_magnitude_one_seed(board):
    names = [r.name for r in board.plan(["dense", "magnitude", "wanda"], 4096, 3, 1024)]
    assert names == ["dense-0-seed0", "magnitude-0-seed0", "wanda-0-seed0", "wanda-0-seed1", "wanda-0-seed2"]


def test_variants_wait_for_the_rate_of_their_method(board):
    assert board.ablations(4096, 1024) == []
    for k, run in zip((2, 1, 3), board.sweep("sparseforge-annealed", 1024).values(), strict=True):
        finish(run, 30.0 * k)
    runs = board.ablations(4096, 1024)
    assert {r.name for r in runs} == {
        f"ablation-{n}-2048" for n, (m, _) in board.ABLATIONS.items() if m == "sparseforge-annealed"
    }
    assert all(r.arguments[r.arguments.index("--lr") + 1] == "0.0005" for r in runs)
    finish(runs[0], 10.0)
    assert board.ablations(4096, 1024) == runs[1:]


def test_variants_are_options_of_their_method(board):
    from sparseforge_fx.methods.catalog import configure

    for method, changes in board.ABLATIONS.values():
        arguments = (*board.TRAINED[method], *changes)
        given = dict(zip(arguments[::2], arguments[1::2], strict=True))
        options = json.loads(given.get("--options", "{}"))
        options.pop("slorb_block", None)  # a field of the recipe
        configure("sparseforge", 10, preset=given["--preset"], **options)


def test_chosen_variants_have_seeds(board):
    for k, run in zip((2, 1, 3), board.sweep("sparseforge-annealed", 1024).values(), strict=True):
        finish(run, 30.0 * k)
    names = ["curvature-activation", "curvature-fisher"]
    runs = board.ablations(4096, 1024, names, 3)
    assert [r.name for r in runs] == [f"ablation-{n}-2048{end}" for n in names for end in ("", "-seed1", "-seed2")]
    assert [r.arguments[r.arguments.index("--seed") + 1] for r in runs[:3]] == ["0", "1", "2"]
    assert [json.loads(r.arguments[r.arguments.index("--options") + 1]) for r in runs[::3]] == [
        {"curvature": "activation"}, {"curvature": "fisher"},
    ]  # fmt: skip


def test_every_method_of_the_package_is_there(board):
    from sparseforge_fx.methods.catalog import METHODS

    named = {a[a.index("--method") + 1] for a in board.TRAINED.values()} | set(board.ONE_SHOT)
    assert named == {*METHODS, "dense"}
