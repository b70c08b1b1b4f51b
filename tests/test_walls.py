"""The walls of the house: each rule over the sources, and each rule on a small tree that breaks it."""

from pathlib import Path

import pytest
import walls

ROOT = Path(__file__).parents[1]


RULES = (
    walls.rooms_without_a_row,
    walls.upward_arrows,
    walls.cycles,
    walls.long_files,
    walls.long_functions,
    walls.wide_signatures,
    walls.bare_passes,
    walls.relative_imports,
    walls.packages_not_installed,
)


@pytest.mark.parametrize("rule", RULES)
def test_the_walls_stand(rule):
    assert rule(ROOT) == []


def test_the_examples_have_no_long_function():
    assert walls.long_functions(ROOT, ("examples",)) == []


# -- every rule can fail ---------------------------------------------------------------------------------------------
@pytest.fixture
def build(tmp_path):
    def build(**files):
        """Files by name, ``__`` for a slash; the packages among them listed in pyproject.toml."""
        listed = ["sparseforge_fx", "sparseforge_fx.kernels", "sparseforge_fx.passes"]
        (tmp_path / "pyproject.toml").write_text(f"[tool.setuptools]\npackages = {listed}\n")
        sound = {"sparseforge_fx/__init__.py": "", "sparseforge_fx/kernels/__init__.py": "", "passes/__init__.py": ""}
        for name, text in {**sound, **{n.replace("__", "/") + ".py": t for n, t in files.items()}}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return build


def test_a_sound_tree_has_no_faults(build):
    root = build(
        passes__one="from sparseforge_fx.kernels import two\nfrom sparseforge_fx.kernels.two import f\n",
        sparseforge_fx__kernels__two="import torch\n\n\ndef f(): ...\n",
        sparseforge_fx__errors="",
    )
    assert [rule(root) for rule in RULES] == [[]] * len(RULES)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("from sparseforge_fx.passes import x\n", 1),
        ("import sparseforge_fx.passes\n", 1),
        ("from sparseforge_fx import passes\n", 1),
        ("def f():\n    from sparseforge_fx.passes.base import x\n", 2),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sparseforge_fx.passes import x\n", 3),
        ("import importlib\nimportlib.import_module('sparseforge_fx.passes.base')\n", 2),
    ],
)
def test_an_arrow_up(build, text, line):
    root = build(sparseforge_fx__kernels__two=text, passes__base="x = 1\n")
    (fault,) = walls.upward_arrows(root)
    assert fault.startswith(f"sparseforge_fx/kernels/two.py:{line} imports sparseforge_fx.passes")
    assert fault.endswith("passes stands above kernels; move what both need down")


def test_a_kernel_knows_no_graph(build):
    root = build(
        sparseforge_fx__kernels__two="import sparseforge_fx.graph.program\n", sparseforge_fx__graph__program=""
    )
    (fault,) = walls.upward_arrows(root)
    assert "graph stands beside kernels" in fault


def test_the_public_names_are_for_users_and_the_command_line(build):
    root = build(
        passes__one="import sparseforge_fx as sf\n",
        sparseforge_fx__cli__app="import sparseforge_fx as sf\n",
    )
    (fault,) = walls.upward_arrows(root)
    assert fault.startswith("passes/one.py:1 imports sparseforge_fx: __init__ stands above passes")


@pytest.mark.parametrize(
    "back",
    ["from passes_ import one\n", "def f():\n    import passes_.one\n", "f('passes_.one')\n"],
)
def test_a_cycle_however_lazy(build, back):
    back = back.replace("passes_", "sparseforge_fx.passes")
    root = build(
        passes__one="from sparseforge_fx.passes.two import x\n",
        passes__two="from sparseforge_fx.passes import three\n",
        passes__three=back,
        passes__four="from sparseforge_fx.passes import one\n",
    )
    names = [f"sparseforge_fx.passes.{n}" for n in ("one", "three", "two")]
    assert walls.cycles(root) == [
        f"{' and '.join(names)} import each other: move what both need into a file of its own"
    ]


def test_a_room_that_nobody_placed(build):
    (fault,) = walls.rooms_without_a_row(build(sparseforge_fx__attic="", sparseforge_fx__errors=""))
    assert fault.startswith("sparseforge_fx.attic is in no row")


def test_a_long_file(build):
    root = build(passes__one="\n" * 350, passes__two="\n" * 351)
    assert walls.long_files(root) == ["passes/two.py has 351 lines: split it, 350 are enough"]


def test_a_long_function(build):
    body = "    pass\n"
    root = build(
        passes__one="def f():\n" + body * 79 + "\n\nclass A:\n    async def g(self):\n" + (4 * " " + body) * 80,
        passes__two="@triton.jit\ndef device():\n" + body * 90 + "\n\n@other\ndef host():\n" + body * 80,
    )
    inner, host = walls.long_functions(root)
    assert inner.startswith("passes/one.py:84 g has 81 lines") and host.startswith("passes/two.py:96 host has 81 lines")


def test_a_wide_signature(build):
    twelve = "a, b, /, c, d, e, f, g, *, h, i, j, k, l"
    root = build(
        passes__one=f"def narrow({twelve}): ...\n\n\nclass A:\n    def method(self, {twelve}): ...\n",
        passes__two=f"def wide({twelve.replace('*', '*rest')}): ...\n\n\ndef wider({twelve}, **more): ...\n",
        passes__three=f"@triton.jit\ndef device({twelve}, m): ...\n\n\ndef sparsify({twelve}, m): ...\n",
        sparseforge_fx__cli__app=f"@command\ndef verb({twelve}, m): ...\n\n\ndef helper({twelve}, m): ...\n",
        sparseforge_fx__training__sparsify=f"def sparsify({twelve}, m): ...\n\n\ndef train({twelve}, m): ...\n",
    )
    found = {fault.split(" has ")[0] for fault in walls.wide_signatures(root)}
    assert found == {
        "passes/two.py:1 wide",
        "passes/two.py:4 wider",
        "passes/three.py:5 sparsify",
        "sparseforge_fx/cli/app.py:5 helper",
        "sparseforge_fx/training/sparsify.py:4 train",
    }


@pytest.mark.parametrize(
    "text", ["import passes\n", "from passes.base import x\n", "def f():\n    from passes import x\n"]
)
def test_passes_by_the_name_of_its_folder(build, text):
    root = build(passes__one=text, tests__test_one=text, examples__demo="from sparseforge_fx import passes\n")
    found = walls.bare_passes(root)
    assert len(found) == 2 and "write sparseforge_fx.passes" in found[0] and found[1].startswith("tests/test_one.py")


def test_a_relative_import(build):
    (fault,) = walls.relative_imports(build(passes__one="from . import base\n", passes__base=""))
    assert fault == "passes/one.py:1 imports .: write the whole name"


def test_a_package_that_would_not_be_installed(build):
    root = build(sparseforge_fx__deploy__new__one="")
    first, second = walls.packages_not_installed(root)
    assert (
        first
        == "sparseforge_fx.deploy.new is not in [tool.setuptools] packages of pyproject.toml: add it, or it is not installed"
    )
    assert second == "sparseforge_fx.deploy.new has no __init__.py: add one"
    (root / "passes" / "__init__.py").unlink()
    assert any(f.startswith("sparseforge_fx.passes is in") for f in walls.packages_not_installed(root))
