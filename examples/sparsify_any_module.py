"""Make any nn.Module 2:4: a vision transformer and a plain MLP, both tiny and random here.

    python examples/sparsify_any_module.py              seconds
    python examples/sparsify_any_module.py MODEL        a vision model of the hub or a folder, with random pictures

The dense model itself is the teacher, so the batches need no labels; with your own, real pictures belong here.
"""

import sys

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import sparseforge_fx as sf


def main() -> None:
    torch.manual_seed(0)
    vision = sf.load(sys.argv[1])[0] if len(sys.argv) > 1 else tiny_vit()
    size, channels = vision.config.image_size, vision.config.num_channels
    pictures = [{"pixel_values": torch.randn(4, channels, size, size, dtype=vision.dtype)} for _ in range(8)]
    show("vision transformer", sf.sparsify(vision, pictures, steps=8, batch_size=4, calibration=16))

    mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
    vectors = [torch.randn(32, 16) for _ in range(8)]
    show("mlp", sf.sparsify(mlp, vectors, steps=8, batch_size=32, calibration=64))

    pruned = sf.sparsify(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), example_inputs=torch.randn(2, 8))
    show("mlp without data (magnitude)", pruned)


def show(name: str, result: sf.SparsifyResult) -> None:
    report = result.report
    trained = (
        f", loss {report['curves'][0]['loss']:.4f} -> {report['curves'][-1]['loss']:.4f}" if "curves" in report else ""
    )
    print(
        f"{name}: {len(report['sites'])} linears are {report['pattern']}, {len(report['skipped'])} stay dense{trained}"
    )


def tiny_vit() -> ViTForImageClassification:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=4, **shape))


if __name__ == "__main__":
    main()
