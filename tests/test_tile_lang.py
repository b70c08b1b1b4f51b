"""The contender in TileLang: its compressed weight, and that its program becomes sparse tensor core instructions."""

import sys
from pathlib import Path

import pytest
import torch

from sparseforge_fx.pattern import TWO_FOUR, hard_mask

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))
import tile_lang


def expanded(found):
    """[out, in] by the places that the words name."""
    words = found.places.int()[..., None] >> torch.arange(0, 16, 4)
    nibbles = (words & 15).flatten(1)
    places = torch.stack((nibbles & 3, nibbles >> 2), -1)
    assert (places[..., 0] < places[..., 1]).all()  # what the instructions ask for
    groups = torch.zeros(*nibbles.shape, 4).scatter_(2, places.long(), found.values.unflatten(1, (-1, 2)).float())
    return groups.flatten(1)


def test_a_compressed_weight_is_the_weight():
    weight = torch.randn(8, 64)
    weight = weight * hard_mask(weight.abs(), TWO_FOUR)
    weight[0], weight[1, :4], weight[2, :4] = 0, torch.tensor([0, 0, 0, 2.0]), torch.tensor([3.0, 0, 0, 0])
    found = tile_lang.compress(weight)
    assert found.values.shape == (8, 32) and found.places.shape == (8, 4) and found.places.dtype == torch.int16
    assert torch.equal(expanded(found), weight)


def test_without_a_device_there_is_a_reason():
    assert tile_lang.why_not(torch.zeros(8, 64)) == "it needs a CUDA device"


@pytest.mark.parametrize(("arch", "instruction"), [("sm_80", "mma_sp"), ("sm_90", "wgmma_sp")])
def test_the_program_takes_sparse_tensor_cores(arch, instruction):
    tilelang = pytest.importorskip("tilelang", reason="TileLang is not installed")
    target = tilelang.tvm.target.Target({"kind": "cuda", "arch": arch})
    with target:
        made = tilelang.lower(tile_lang.program(576, 1536), target, enable_device_compile=False)
    assert instruction in made.kernel_source
