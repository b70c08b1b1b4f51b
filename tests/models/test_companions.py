"""Processors, modules of sentence encoders and licences go where the weights go."""

import json

import pytest
import transformers

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.models.companions import companions, copy_companions
from sparseforge_fx.models.dense import load_dense, write_checkpoint

KEPT = {"preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json", "chat_template.json",
        "README.md", "LICENSE", "license.txt", "Notice", "COPYING", "modeling_x.py", "modules.json",
        "sentence_bert_config.json", "config_sentence_transformers.json"}  # fmt: skip
FOLDERS = {"1_Pooling", "2_Dense", "custom_generate"}
LEFT = {"pytorch_model.bin", "model.safetensors.index.json", "report.json", "recipe.yaml", "training_args.bin",
        "model.onnx"}  # fmt: skip


def checkpoint(folder):
    folder.mkdir()
    for name in KEPT | LEFT | {"config.json"}:
        (folder / name).write_text(name)
    modules = [{"path": "", "type": "Transformer"}, {"path": "1_Pooling"}, {"path": "2_Dense"}, {"path": "../out"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    for inner in ("1_Pooling", "2_Dense", "custom_generate", "onnx", "original"):
        (folder / inner).mkdir()
        (folder / inner / "config.json").write_text(inner)
    return folder


def test_what_a_folder_has_beside_its_weights(tmp_path):
    (tmp_path / "out").mkdir()
    folder = checkpoint(tmp_path / "in")
    assert {path.name for path in companions(folder)} == KEPT | FOLDERS
    (tmp_path / "out" / "chat_template.json").write_text("newer")
    copy_companions(companions(folder), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == KEPT | FOLDERS
    assert (tmp_path / "out" / "2_Dense" / "config.json").read_text() == "2_Dense"
    assert (tmp_path / "out" / "chat_template.json").read_text() == "newer"


def test_of_a_hub_id_they_are_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    folder, asked = checkpoint(tmp_path / "in"), []

    def fetch(name, allow_patterns, **options):
        asked.append((name, allow_patterns, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    assert {path.name for path in companions("some/model")} == KEPT | FOLDERS
    assert [name for name, _, _ in asked] == ["some/model"] * 2
    assert {"1_Pooling/*", "2_Dense/*"} <= set(asked[1][1]) and "*" not in asked[0][1]


@pytest.mark.parametrize("text", ["{", "[1]", '[{"name": "0"}]'])
def test_a_damaged_list_of_modules_is_told(tmp_path, text):
    folder = checkpoint(tmp_path / "in")
    (folder / "modules.json").write_text(text)
    with pytest.raises(SparseForgeError, match="cannot read what stands beside the weights") as caught:
        companions(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_with_code_of_its_own_loads_by_it_again(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    config = transformers.LlamaConfig(
        vocab_size=2, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "in")
    named = {"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    said = json.loads((tmp_path / "in" / "config.json").read_text()) | {"auto_map": named}
    (tmp_path / "in" / "config.json").write_text(json.dumps(said))
    ran = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
    config_code = "from transformers import LlamaConfig\nclass Config(LlamaConfig): pass\n"
    code = "from transformers import LlamaForCausalLM\nfrom .configuration_x import Config\n"
    (tmp_path / "in" / "configuration_x.py").write_text(ran + config_code)
    (tmp_path / "in" / "modeling_x.py").write_text(code + "class Model(LlamaForCausalLM): config_class = Config\n")
    write_checkpoint(*load_dense(tmp_path / "in"), tmp_path / "out")
    copy_companions(companions(tmp_path / "in"), tmp_path / "out")
    assert not list(tmp_path.rglob("ran"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(model).__name__ == "Model"
