"""What a folder has beside its weights is there after every verb that writes a folder."""

import pytest
from tiny_checkpoint import write_checkpoint, write_text
from typer.testing import CliRunner

from sparseforge_fx import cli

BESIDE = {"preprocessor_config.json": '{"size": 32}', "LICENSE": "free", "modules.json": '[{"path": "1_Pooling"}]'}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    folder = write_checkpoint(root / "model", num_hidden_layers=1)
    for name, text in BESIDE.items():
        (folder / name).write_text(text)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    write_text(root / "text.txt")
    return root


def has_all(folder):
    assert all((folder / name).read_text() == text for name, text in BESIDE.items())
    assert (folder / "1_Pooling" / "config.json").is_file() and (folder / "model.safetensors").is_file()


def ok(*arguments):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output


def test_sparse_and_packed(home, tmp_path):
    ok("sparsify", home / "model", "--method", "magnitude", "-o", tmp_path / "sparse")
    has_all(tmp_path / "sparse")
    ok("export", tmp_path / "sparse", "--format", "safetensors", "-o", tmp_path / "packed")
    has_all(tmp_path / "packed")


def test_quantised(home, tmp_path):
    ok("quantize", home / "model", "--values", "int8", "-o", tmp_path / "packed")
    has_all(tmp_path / "packed")


def test_walked_on_disk(home, tmp_path):
    few = ["--calibration", "4", "--length", "16", "--batch-size", "2"]
    data = ["--data", home / "text.txt", "--device", "disk", "--method", "wanda"]
    ok("sparsify", home / "model", *data, *few, "-o", tmp_path / "out")
    has_all(tmp_path / "out")


def test_a_model_of_pictures(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    ok("sparsify", tmp_path / "vit", "--method", "magnitude", "-o", tmp_path / "out")
    assert ViTImageProcessor.from_pretrained(tmp_path / "out").size["height"] == 32
