"""The stand-in for vLLM takes the calls that vLLM takes: compared with vLLM itself, where that is installed."""

import re
import sys

import fake_vllm
import pytest


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """The stand-in's modules, with a file of it changed if asked for, and whatever stood there before afterwards."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "vllm"}

    def imported(folder, file=None, old="", new=""):
        place = fake_vllm.write(tmp_path / folder)
        if file:
            text = (place / "vllm" / file).read_text()
            assert text.count(old) == 1
            (place / "vllm" / file).write_text(text.replace(old, new))
        with monkeypatch.context() as patch:
            patch.syspath_prepend(place)
            fake_vllm.forget()
            found = fake_vllm.modules()
        fake_vllm.forget()
        return found

    yield imported
    fake_vllm.forget()
    sys.modules.update(before)


def test_the_stand_in_takes_vllms_own_calls(imported):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    assert fake_vllm.differences(real=fake_vllm.modules(), stand_in=imported("stand_in")) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("model_executor/utils.py", "def set_weight_attrs", "def set_attrs", "has no set_weight_attrs"),
        ("model_executor/utils.py", "(weight, weight_attrs)", "(weight, attrs, weight_attrs=())", "attrs stands there"),
        ("model_executor/parameter.py", "shard_size, shard_id, num_heads", "shard_size, shard_id", "'num_heads'"),
        ("model_executor/layers/linear.py", "x, bias=None", "x, residual, bias=None", "residual stands there"),
        ("model_executor/layers/linear.py", "params_dtype, **", "params_dtype, rank, **", "missing .* 'rank'"),
        ("model_executor/layers/quantization/base_config.py", "(cls, config)", "(cls)", "from_config.*too many"),
    ],
)
def test_another_signature_is_seen(imported, file, old, new, said):
    (difference,) = fake_vllm.differences(imported("stand_in"), imported("changed", file, old, new))
    assert re.search(said, difference)


def test_no_difference_from_itself_with_more(imported):
    more = imported("more", "model_executor/layers/linear.py", "x, bias=None", "x, bias=None, *, scale=1.0")
    assert fake_vllm.differences(imported("stand_in"), more) == []
