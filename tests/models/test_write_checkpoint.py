"""What a result of any kind of module writes can be read again."""

import pytest
import torch
from huggingface_hub import load_torch_model
from tiny_checkpoint import tiny_llama
from torch import nn

import sparseforge_fx as sf
from sparseforge_fx.pattern import TWO_FOUR, check_pattern


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.last = nn.Linear(16, 8)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def wanda(model, data, **options):
    return sf.sparsify(model, data, method="wanda", length=16, calibration=4, show_progress=False, **options)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, torch.compile], ids=["plain", "parallel", "compiled"])
def test_a_module_of_ones_own(tmp_path, wrap):
    model = Tied()
    result = wanda(wrap(model), [torch.randn(4, 16) for _ in range(4)])
    result.save(tmp_path / "out")
    again = Tied()
    load_torch_model(again, tmp_path / "out")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    assert check_pattern(again.first.weight, TWO_FOUR) and (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
def test_a_wrapped_model_of_transformers(tmp_path, wrap):
    model = tiny_llama(num_hidden_layers=1)
    result = wanda(wrap(model), torch.randint(3, 200, (8, 16)), exclude=["model.layers.0.self_attn.*"])
    assert not result.report["notes"]  # that name none of the wrapper's
    result.save(tmp_path / "out")
    again, _ = sf.load(tmp_path / "out")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    assert check_pattern(again.model.layers[0].mlp.up_proj.weight, TWO_FOUR)


def test_adapters_on_a_module_of_ones_own(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Tied(), peft.LoraConfig(r=2, target_modules=["first"]))
    wanda(model, [torch.randn(4, 16) for _ in range(4)]).save(tmp_path / "out")
    again = Tied()
    load_torch_model(again, tmp_path / "out")
    assert torch.equal(again.first.weight, model.base_model.model.first.base_layer.weight)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
def test_a_wrapped_model_is_quantised_planned_and_packed_under_its_own_names(tmp_path, wrap):
    model, ids = tiny_llama(num_hidden_layers=1), torch.randint(3, 200, (8, 16))
    planned = sf.plan(wrap(model), ids, bytes=0.8, formats=["2:4", "dense int8"], length=16, calibration=4)
    assert {weight.name for weight in planned.weights} <= {name for name, _ in model.named_parameters()}
    report = sf.quantize(wrap(model), "int8")
    assert all(not site["name"].startswith(("module.", "_orig_mod.")) for site in report["sites"])
    sf.save_packed(wrap(model), None, tmp_path / "packed")
    again, _ = sf.load(tmp_path / "packed")
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
