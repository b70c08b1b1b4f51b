"""Weights of int8 and int4 codes, and what a CPU's kernels make of x before they multiply."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparseforge_fx.deploy.lowering.modules import SparseLinear, replace, weight_of
from sparseforge_fx.formats import parse_format
from sparseforge_fx.kernels import cpu
from sparseforge_fx.kernels.activations import ACTIVATIONS
from sparseforge_fx.kernels.layouts import native_layout
from sparseforge_fx.kernels.packed import pack_codes, unpack
from sparseforge_fx.methods.rounding import Grid
from sparseforge_fx.pattern import TWO_FOUR, hard_mask
from sparseforge_fx.scales import scale_values, stored_scales

FORMATS = [
    *("2:4 int8", "dense int8", "2:4 int4/32", "dense int4/32", "2:4 int4/128", "dense int4/128"),
    *("2:4 int4/16", "dense int4/16"),
]
X_RUN = 256  # inputs of x, of which those share a scale that are summed in one lane


def random_codes(out, width, text, seed=0):
    """(Packed, codes) of a random weight in the format of that text."""
    generator, format = torch.Generator().manual_seed(seed), parse_format(text)
    least, largest = (-127, 127) if format.values == "int8" else (-8, 7)
    codes = torch.randint(least, largest + 1, (out, width), generator=generator, dtype=torch.int8)
    if format.levels is not None:
        codes = torch.tensor(format.levels, dtype=torch.int8)[codes.long() + 8]
    if format.is_sparse:
        codes *= hard_mask(torch.rand(out, width, generator=generator), TWO_FOUR).to(torch.int8)
    scales = 0.001 + 0.01 * torch.rand(out, width // format.group if format.group else 1, generator=generator)
    if format.group:  # of either sign
        scales *= torch.randint(2, scales.shape, generator=generator) * 2 - 1
    return pack_codes(codes, stored_scales(scales, format), format), codes


def lanes(isa):
    """How many sums the kernels of an instruction set have in a register, and of how many neighbouring products each."""
    if isa in ("portable", "avx2"):
        return (2, 32) if isa == "portable" else (8, 4)
    known = set(re.findall(r"avx512\w+", Path("/proc/cpuinfo").read_text()))
    return (16 if {"avx512vbmi", "avx512_vbmi2", "avx512_vnni"} <= known else 8), 4


def rounded(x, isa=None, sums_of=None):
    """x [rows, in] as 8-bit integers times a scale for each group, in float64, and the largest error of a place.
    ``sums_of``: what ``lanes`` says, where it is not that of rows."""
    rows, width = x.shape
    sums, near = sums_of or lanes(isa or cpu.instruction_set())
    shape = (rows, -1, X_RUN // (near * sums), sums, near)
    groups = F.pad(x.double(), (0, -width % X_RUN)).view(shape)
    scales = groups.abs().amax((2, 4), keepdim=True) / 127
    codes = (groups / scales.clamp(min=1e-300)).round()
    return (codes * scales).view(rows, -1)[:, :width], scales


def in_tiles(isa, dtype, text, pairs=False):
    """Do many rows of x meet these codes in tile registers? Then they have fifteen bits before int8, and before int4
    are not rounded."""
    return isa == "amx" and (not pairs if "int8" in text else dtype == torch.bfloat16)


def assert_tiles_correct(y, x, packed, bias=None, activation="none"):
    eight = packed.format.values == "int8"
    assert_codes_correct(y, x, packed, bias, activation, x.shape[1] if eight else None, levels=127 * 128)


#: rows of x, few of which never are in tile registers, and many always, where there are some
FEW, MANY = 6, 10


def assert_rows_alike(product, x, tiles):
    """A row of x has the same bits beside any number of others, and the last ones of a tile too; of two numbers of
    rows, one of which is for tile registers, each for itself. Returns the products of each row, and of all."""
    alone = torch.cat([product(row[None]) for row in x])
    every = product(x) if tiles else alone
    for rows in (*range(2, 14), 16, 17, 31, 33, 49, 65, len(x)):
        if rows < FEW:
            assert torch.equal(product(x[:rows]), alone[:rows])
        elif rows >= MANY:
            assert torch.equal(product(x[:rows]), every[:rows])
    return alone, every


def assert_codes_correct(y, x, packed, bias, activation, rounded_to=None, levels=127):
    """``y`` against float64. Allowed is what sparse_cases.assert_correct allows of the sum; three roundings of each
    weight to y's dtype (its scale, it, and sums in that dtype); and half a step of each input where groups of
    ``rounded_to`` inputs of x are rounded to so many ``levels`` of either sign."""
    weight, wide = unpack(packed).double(), x.double()
    sums = wide @ weight.t() + (0 if bias is None else bias.double())
    size = wide.abs() @ weight.abs().t() + (0 if bias is None else bias.double().abs())
    u = torch.finfo(y.dtype).eps / 2
    error = (x.shape[1] * 2.0**-24 + 3 * u) * size + 2 * u * sums.abs()
    if rounded_to is not None:
        step = wide.unflatten(1, (-1, rounded_to)).abs().amax(-1) / (2 * levels)
        error += step.repeat_interleave(rounded_to, 1) @ weight.abs().t()
    expected = ACTIVATIONS[activation].forward(sums)
    if activation == "silu_mul":
        (gate, up), (gate_error, up_error) = sums.chunk(2, -1), error.chunk(2, -1)
        error = 1.13 * gate_error * (up.abs() + up_error) + F.silu(gate).abs() * up_error
    elif activation != "none":
        error = 1.13 * error
    error = error + 3 * u * expected.abs() + 1e-5
    worst = ((y.double() - expected).abs() / error).max().item()
    assert worst <= 1, f"{worst:.2f} times the allowed error"


@torch.no_grad()
def mixed_formats(model, formats=FORMATS):
    """The model with its linears packed in these formats, one after the other, where their widths allow; by magnitude
    and rounded to nearest. Returns {name: format}. Heads stay dense."""
    found = {}
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and "head" not in n]
    for index, name in enumerate(names):
        module = model.get_submodule(name)
        weight = weight_of(module).float()
        fits = [f for f in map(parse_format, formats) if f.why_not(weight.shape[1]) is None]
        format = fits[index % len(fits)]
        if format.is_sparse:
            weight = weight * hard_mask(weight.abs(), TWO_FOUR)
        groups = weight.unflatten(1, (-1, format.group or weight.shape[1]))
        grid = Grid(format)
        scales = stored_scales(groups.abs().amax(-1).clamp(min=1e-3) / grid.largest, format)
        codes = grid.nearest(groups / scale_values(scales)[..., None]).flatten(1)
        packed = pack_codes(codes.to(torch.int8), scales, format)
        dtype = module.weight.dtype
        layout = native_layout(module.weight.device, format, *map(int, weight.shape), dtype)  # as if it were loaded
        transposed = isinstance(module, Conv1D)
        replace(model, name, SparseLinear(packed, module.bias, layout, transposed=transposed, dtype=dtype))
        found[name] = format
    return found
