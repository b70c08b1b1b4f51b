"""The entry point for vLLM: found by its name, called twice, and never in the way of vLLM."""

import importlib
import logging
import sys
import tomllib
from pathlib import Path

import pytest
from fake_vllm import vllm  # noqa: F401  (a fixture)

from sparseforge_fx.deploy.vllm.plugin import register
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.packed import METHOD


def test_the_entry_point_names_it():
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["sparseforge"].partition(":")
    assert getattr(importlib.import_module(module), name) is register


def test_registered_once(vllm):  # noqa: F811
    register()
    register()
    quantization = importlib.import_module("vllm.model_executor.layers.quantization")
    assert [cls.get_name(None) for cls in quantization.REGISTERED] == [METHOD]
    assert METHOD in quantization.QUANTIZATION_METHODS


@pytest.mark.parametrize("gone", ["layers/linear.py", "parameter.py", "layers/quantization/__init__.py"])
def test_another_vllm_goes_on_without_it(vllm, gone, caplog):  # noqa: F811
    (vllm / "vllm" / "model_executor" / gone).write_text("")
    with caplog.at_level(logging.WARNING):
        register()
    assert "does not fit this version of vLLM (ImportError" in caplog.text


def test_without_vllm(monkeypatch):
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SparseForgeError, match="pip install vllm"):
        register()
