"""The 2:4 product that TileLang (pip install tilelang) makes of a few lines in its language: sparse tensor core
instructions of Ampere or Hopper. A contender of gpu_kernels.py, where it installs and finds a CUDA compiler."""

import functools
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: outputs, tokens and inputs of a tile; its threads, and how many tiles of inputs are on their way
TOKENS, THREADS, STAGES = 128, 256, 3
OUTPUTS, INPUTS = 128, 64


class Compressed(NamedTuple):
    """What tensor cores read of a 2:4 weight [out, in].

    Attributes:
        values: [out, in / 2]
        places: int16 [out, in / 16]; four bits for each group of four inputs, the first group's lowest: where the first
            of its two values stood, and above it where the second did.
    """

    values: Tensor
    places: Tensor


def why_not(weight: Tensor) -> str | None:
    """Why TileLang has no product for this weight; None if it may have."""
    if not weight.is_cuda:
        return "it needs a CUDA device"
    if importlib.util.find_spec("tilelang") is None:
        return "tilelang is not installed"
    return None if weight.shape[1] % INPUTS == 0 else f"its tiles need inputs in multiples of {INPUTS}"


def compress(weight: Tensor) -> Compressed:
    """Of each group of four the two values that are not zero, or zeros that fill up."""
    groups = weight.unflatten(1, (-1, 4))
    first = (groups != 0).to(torch.int8).sort(dim=2, descending=True, stable=True).indices[..., :2].sort(dim=2).values
    nibbles = (first[..., 0] | first[..., 1] << 2).unflatten(1, (-1, 4))
    words = (nibbles << torch.arange(0, 16, 4, device=weight.device)).sum(2)
    return Compressed(groups.gather(2, first).flatten(1), words.to(torch.int16))


def program(out: int, width: int, dtype: str = "bfloat16") -> Any:
    """TileLang's program of y [tokens, out] = x [tokens, width] times a compressed weight, for any number of tokens."""
    import tilelang.language as T

    tokens = T.dynamic("tokens")

    @T.prim_func
    def linear(
        values: T.Tensor((out, width // 2), dtype), places: T.Tensor((out, width // 16), "int16"),
        x: T.Tensor((tokens, width), dtype), y: T.Tensor((tokens, out), dtype),
    ):  # fmt: skip
        with T.Kernel(T.ceildiv(tokens, TOKENS), T.ceildiv(out, OUTPUTS), threads=THREADS) as (column, row):
            a = T.alloc_shared((OUTPUTS, INPUTS // 2), dtype)
            e = T.alloc_shared((OUTPUTS, INPUTS // 16), "int16")
            b = T.alloc_shared((TOKENS, INPUTS), dtype)
            sums = T.alloc_fragment((OUTPUTS, TOKENS), "float32")
            T.clear(sums)
            for k in T.Pipelined(width // INPUTS, num_stages=STAGES):
                T.copy(values[row * OUTPUTS, k * INPUTS // 2], a)
                T.copy(places[row * OUTPUTS, k * INPUTS // 16], e)
                T.copy(x[column * TOKENS, k * INPUTS], b)
                T.gemm_sp(a, e, b, sums, transpose_B=True)
            for i, j in T.Parallel(OUTPUTS, TOKENS):
                if column * TOKENS + j < tokens and row * OUTPUTS + i < out:
                    y[column * TOKENS + j, row * OUTPUTS + i] = T.cast(sums[i, j], dtype)

    return linear


@functools.cache
def _compiled(out: int, width: int) -> Any:
    import tilelang

    return tilelang.compile(program(out, width), out_idx=[-1], target="cuda")


def linear(x: Tensor, weight: Compressed) -> Tensor:
    """[tokens, out]; the first call for a shape compiles."""
    return _compiled(weight.values.shape[0], 2 * weight.values.shape[1])(*weight, x)
