"""The operator on a CPU without the interpreter: plain torch, and what graphs see of it."""

import json

import pytest
import torch
import torch.nn.functional as F
from sparse_cases import random_weight

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.activations import ACTIVATIONS
from sparseforge_fx.kernels.gpu.planes import to_planes
from sparseforge_fx.kernels.gpu.planes_linear import planes_linear, tune
from sparseforge_fx.kernels.gpu.tiles import (
    SHARED_BYTES,
    Tile,
    bucket,
    cache_file,
    legal_tiles,
    pick,
    remember,
    shared_bytes,
)
from sparseforge_fx.kernels.packed import pack

OP = torch.ops.sparseforge.planes_linear.default


def case(out=12, width=40, m=3, dtype=torch.float32):
    weight = random_weight((out, width), dtype, 0) / 20
    return torch.randn(m, width).to(dtype), weight, torch.randn(out).to(dtype), *to_planes(pack(weight))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_a_linear_and_an_activation(dtype, activation):
    x, weight, bias, values, meta = case(dtype=dtype)
    expected = ACTIVATIONS[activation].forward(F.linear(x, weight, bias))
    assert torch.equal(planes_linear(x, values, meta, 40, bias, activation), expected)
    assert planes_linear(x[None, :0], values, meta, 40, None, activation).shape == (1, 0, expected.shape[-1])


@pytest.mark.parametrize("activation", ["none", "silu_mul"])
def test_opcheck(activation):
    x, _, bias, values, meta = case()
    torch.library.opcheck(OP, (x, values, meta, 40, bias, activation))
    torch.library.opcheck(OP, (x[None], values, meta, 40, None, activation))


def test_it_stays_in_one_graph_and_rows_are_dynamic():
    _, _, bias, values, meta = case()
    compiled = torch.compile(
        lambda x: planes_linear(x, values, meta, 40, bias, "relu"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for m in (2, 5, 200):
        x = torch.randn(m, 40)
        assert torch.equal(compiled(x), planes_linear(x, values, meta, 40, bias, "relu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 36)), "36 inputs"),
        (dict(x=torch.zeros(2, 40, dtype=torch.bfloat16)), "convert x"),
        (dict(bias=torch.zeros(5)), "12 outputs"),
        (dict(activation="swish"), "choose from none"),
        (dict(meta=torch.zeros(12, 1, dtype=torch.int32)), "to_planes"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    x, _, bias, values, meta = case()
    with pytest.raises(SparseForgeError, match=message):
        planes_linear(**(dict(x=x, values=values, meta=meta, in_features=40, bias=bias, activation="none") | change))


def test_gated_outputs_come_in_halves():
    x, _, _, values, meta = case(out=5)
    with pytest.raises(SparseForgeError, match="even number of outputs"):
        planes_linear(x, values, meta, 40, None, "silu_mul")


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("lines", [1, 2, 3, 4, 8, 16, 32, 64, 128])
def test_there_is_a_legal_tile_for_every_shape(capability, lines):
    for rows, width in ((4096, 4096), (22016, 4096), (4096, 11008), (576, 576), (1, 4)):
        tiles = legal_tiles(capability, rows, -(-width // 32), lines)
        assert tiles and len(set(tiles)) == len(tiles) <= 48
        assert all(shared_bytes(t, capability) <= SHARED_BYTES[capability] for t in tiles)
        assert all(t.lines in (0, 8, 16, 32, 64) for t in tiles)
        assert {bool(t.lines) for t in tiles} == ({False} if lines == 1 else {True, False} if lines <= 4 else {True})
        assert not any(t.pairs for t in tiles) or capability == 90


def test_old_devices_are_refused():
    with pytest.raises(SparseForgeError, match=r"8\.0, not 7\.5"):
        legal_tiles(75, 64, 2, 1)


def test_a_choice_is_kept_and_one_that_is_no_longer_legal_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache_file.cache_clear()
    cpu = torch.device("cpu")
    try:
        first, other = legal_tiles(80, 4096, 128, 1)[:2]
        assert pick(cpu, 4096, 128, 1, torch.bfloat16) == first
        remember(cpu, 4096, 128, 1, torch.bfloat16, other)
        assert pick(cpu, 4096, 128, 1, torch.bfloat16) == other
        assert pick(cpu, 4096, 128, 1, torch.float16) == first
        assert json.loads(cache_file(cpu).read_text()) == {"4096x128x1 bfloat16": list(other)}
        remember(cpu, 4096, 128, 1, torch.bfloat16, Tile(7, 7, 7))
        assert pick(cpu, 4096, 128, 1, torch.bfloat16) == first
    finally:
        cache_file.cache_clear()


def test_buckets():
    assert [bucket(m) for m in (1, 2, 3, 4, 5, 8, 9, 17, 33, 64, 65, 128)] == [
        1,
        2,
        3,
        4,
        8,
        8,
        16,
        32,
        64,
        64,
        128,
        128,
    ]


def test_only_a_gpu_is_tuned():
    _, _, _, values, meta = case(dtype=torch.bfloat16)
    with pytest.raises(SparseForgeError, match="CUDA device"):
        tune(values, meta, 40, torch.bfloat16, 1)
