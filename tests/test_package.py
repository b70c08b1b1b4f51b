"""The package as others get it: what an import costs, what a wheel holds, and that it works in an empty environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "triton", "torchao", "matplotlib", "datasets")


def python(code, executable=sys.executable, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([str(executable), "-c", code], capture_output=True, text=True, env=environment, **options)


def test_an_import_loads_nothing_heavy_and_takes_less_than_three_seconds():
    code = f"import sys, time; t = time.process_time(); import sparseforge_fx; print([m for m in {HEAVY} if m in sys.modules])"
    done = python(code + "; print(time.process_time() - t)")
    loaded, seconds = done.stdout.splitlines()
    assert loaded == "[]" and float(seconds) < 3, done.stderr


def test_sparsify_loads_no_pictures_and_starts_no_device():
    code = "import sys, sparseforge_fx as sf; sf.sparsify; import torch; "
    done = python(code + "print('matplotlib' in sys.modules, torch.cuda.is_initialized())")
    assert done.stdout == "False False\n", done.stderr


def test_the_version_is_said_in_one_place(tmp_path):
    version = metadata.version("sparseforge-fx")
    done = subprocess.run([sys.executable, "-m", "sparseforge_fx.cli", "--version"], capture_output=True, text=True)
    assert done.stdout == f"{version}\n"
    assert f"## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
    named = [f for f in (ROOT / "sparseforge_fx").rglob("*.py") if f'"{version}"' in f.read_text()]
    assert named == []


WORKS = """
import torch, transformers as t, sparseforge_fx as sf
from pathlib import Path
assert "site-packages" in sf.__file__ and (Path(sf.__file__).parent / "py.typed").is_file()
small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=97)
ids = torch.randint(0, 97, (4, 16))
for model in (t.BertModel(t.BertConfig(**small)), t.LlamaForCausalLM(t.LlamaConfig(**small, num_key_value_heads=1))):
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    result = sf.sparsify(model, data * 4, steps=2, calibration=2, show_progress=False)
    assert set(result.report["density"].values()) == {0.5}, result.report["density"]
    result.save(type(model).__name__)
    print(type(model).__name__, len(result.report["sites"]), (Path(type(model).__name__) / "report.html").is_file())
"""


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(tmp_path):
    for name in ("sparseforge_fx", "passes"):
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "source")
    build = "import os; from setuptools import build_meta as b; b.build_wheel('..')"
    assert (done := python(build, cwd=tmp_path / "source")).returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    (inside,) = (tmp_path / "env").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(inside)
    others = [p for p in sys.path if p.endswith("site-packages")] or [sysconfig.get_path("purelib")]
    (inside / "dependencies.pth").write_text(
        "\n".join(others)
    )  # whose own .pth files are not read: no editable install
    done = python(WORKS, tmp_path / "env" / "bin" / "python", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "BertModel 12 True\nLlamaForCausalLM 14 True\n"
