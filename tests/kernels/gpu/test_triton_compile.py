"""What the kernels become on three GPUs that are not here: no spills, no layout trips, the instructions that were meant."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import os

from offline_compile import TOOLS, compile_kernel, tile_constants

from sparseforge_fx.kernels.gpu.tiles import SHARED_BYTES, legal_tiles, shared_bytes
from sparseforge_fx.kernels.gpu.triton_dot import dot, expand_weight
from sparseforge_fx.kernels.gpu.triton_gemv import gemv, reduce_splits

pytestmark = [
    pytest.mark.skipif(not (TOOLS / "nvdisasm").exists(), reason="this Triton has no NVIDIA tools"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
CHIPS = [80, 90, 120]


def first_tile(capability, lines, **wanted):
    tiles = legal_tiles(capability, 4096, 128, lines)
    return next(t for t in tiles if all(getattr(t, k) == v for k, v in wanted.items()))._replace(split=1)


def check(compiled, tile, capability):
    assert compiled.stack == 0, "registers spill"
    assert compiled.shared <= shared_bytes(tile, capability) <= SHARED_BYTES[capability]
    return tile.rows * tile.words * 8 // (32 * tile.warps)  # groups of four that a thread sees in one step


@pytest.mark.parametrize("capability", CHIPS)
def test_gemv(capability):
    tile = first_tile(capability, 1)
    built = compile_kernel(gemv, tile_constants(tile), capability, tile.warps)
    groups = check(built, tile, capability)
    assert built.conversions <= 1
    sass = built.sass
    assert sass["LDG.E.128"] >= 25 and sass["LDG"] == sass["LDG.E.128"]  # 8 of pairs, 1 of metadata, 16 of x
    assert sass["PRMT"] <= groups + 4 and sass["FFMA"] == 2 * groups and not sass["BAR"] > 2
    assert sass["LOP3"] + sass["SHF"] + sass["PRMT"] <= 6 * groups


def test_gemv_of_four_rows_reads_the_weight_once():
    tile = first_tile(90, 4, warps=8, words=128)
    built = compile_kernel(gemv, tile_constants(tile, rows=4), 90, tile.warps)
    groups = check(built, tile, 90)
    assert built.conversions <= 4  # one sum a row
    assert built.sass["LDG.E.128"] == 8 + 1 + 4 * 16 and built.sass["FFMA"] == 8 * groups


@pytest.mark.parametrize("capability", CHIPS)
def test_dot(capability):
    tile = first_tile(capability, 16, pairs=False)
    built = compile_kernel(dot, tile_constants(tile), capability, tile.warps, tile.stages)
    groups = check(built, tile, capability)
    assert built.conversions <= 1
    sass = built.sass
    assert sass["HMMA"] == groups and not sass["HGMMA"]
    assert sass["LDGSTS.E.BYPASS.128"] == sass["LDGSTS"] > 0  # every copy to shared memory is of 16 bytes
    assert 2 * groups <= sass["PRMT"] <= 2 * groups + 16
    assert sass["LOP3"] + sass["SHF"] + sass["PRMT"] <= 7 * groups


def test_dot_with_warp_groups():
    tile = first_tile(90, 64, pairs=True, words=16)
    built = compile_kernel(dot, tile_constants(tile), 90, tile.warps, tile.stages)
    groups = check(built, tile, 90)
    assert built.conversions <= 1
    assert built.sass["HGMMA"] == groups // 2 and not built.sass["HMMA"] and not built.sass["STS"]
    assert built.sass["PRMT"] <= 2 * groups + 24


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_become_numbers_without_conversions(bits):
    """Three or four instructions a pair, one load of scales for each four words, and no more layout trips."""
    types = {"scales_ptr": "*fp32" if bits == 8 else "*fp16"}
    for kernel, lines in ((gemv, 1), (dot, 16)):
        tile = first_tile(90, lines)
        built = compile_kernel(kernel, tile_constants(tile, bits=bits), 90, tile.warps, tile.stages, **types)
        groups = check(built, tile, 90)
        sass = built.sass
        assert built.conversions <= 1 and sass["I2F"] + sass["I2FP"] <= 2  # of divisions of addresses
        assert sass["HFMA2"] <= (2 if bits == 4 else 1) * groups + 16
        if bits == 4:
            assert sass["LDG.E.U16"] == groups // 4


def test_tails_and_gates_sums_and_expansion_compile_too():
    capability = 90
    tile = first_tile(capability, 1)
    gated = tile_constants(tile, tail=True, activation="silu_mul", bias=True)
    check(compile_kernel(gemv, gated, capability, tile.warps), tile, capability)
    constants = {"SPLIT": 4, "BLOCK": 256, "HAS_BIAS": True, "ACTIVATION": "gelu"}
    assert compile_kernel(reduce_splits, constants, capability, 4).stack == 0
    constants = {"BN": 16, "BW": 32, "UNIT": 4, "BITS": 16, "GROUP": 0, "ASM": True}
    built = compile_kernel(expand_weight, constants, capability, 4)
    assert built.stack == 0 and built.sass["STG.E.128"] == built.sass["STG"] > 0
