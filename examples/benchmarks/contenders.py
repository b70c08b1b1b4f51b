"""Dense int8 and int4 products of kept libraries, and ours, dense and 2:4, beside torch's dense linear on this CPU.

    python examples/benchmarks/contenders.py [--label NAME] [--threads 1,2] [--rows 1,8,64] [--compiled] [--shapes ...]

One json. What a user would take instead of a sparse weight of the same bits. Contenders take turns in one process, and every
call takes another copy of its weight, so that weights come from memory. Where a library wants activations in 8 bits,
they are rounded token by token inside the timed call, in eager operators; a name that ends in "product" is the product
alone, a bound for what fusing the rounding could give. With --compiled: torchao's weights and plain expressions under
torch.compile, whose guards (some 20 microseconds a call) are in the times. ``stream`` reads a float32 weight once: the
memory's speed. Errors are against the product with the weight as that library holds it: of the arithmetic, not of the
weight's rounding. Who takes over twenty times as long as dense is timed once (torch has scalar loops for some).
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from common import save, seconds_in_turn
from cpu_kernels import LARGE, last_level_cache_bytes
from torch import Tensor

from sparseforge_fx.formats import BITS, Format
from sparseforge_fx.kernels import cpu
from sparseforge_fx.kernels.layouts import native_layout
from sparseforge_fx.kernels.packed import pack_codes, unpack
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.pattern import TWO_FOUR, hard_mask

SMALL = "1536x576,576x1536,49152x576"  # SmolLM2-135M's gate, down and output head
TOO_SLOW = 20  # times dense


class Contender(NamedTuple):
    """``call(x, *weight)``; ``meant`` is the weight [out, in] as the library holds it, in float32."""

    bits: int
    call: Callable[..., Tensor]
    weight: tuple[Any, ...]
    meant: Tensor


def main(
    label: str = "contenders",
    shapes: str = f"{LARGE},{SMALL}",
    rows: str = "1,8,64",
    threads: str = "1,2",
    rounds: int = 25,
    rotate_bytes: int = 256 << 20,
    compiled: bool = False,
) -> None:
    cases = []
    for shape, dtype in itertools.product(shapes.split(","), (torch.float32, torch.bfloat16)):
        out, width = map(int, shape.split("x"))
        weight = torch.randn(out, width, generator=torch.Generator().manual_seed(0))
        contenders = of_torch(weight, dtype) | ours(weight, dtype) | (compiled_ones(weight, dtype) if compiled else {})
        copies = {name: rotated(c.weight, rotate_bytes) for name, c in contenders.items()}
        for count, m in itertools.product(map(int, threads.split(",")), map(int, rows.split(","))):
            torch.set_num_threads(count)
            x = torch.randn(m, width, generator=torch.Generator().manual_seed(1)).to(dtype)
            case = {"out": out, "in": width, "dtype": str(dtype)[6:], "threads": count, "rows": m}
            cases.append(case | {"results": measure(contenders, copies, x, rounds)})
            print(describe(cases[-1]), flush=True)
    record = {
        "instruction_set": cpu.instruction_set(),
        "torch_level": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "rotated_bytes": rotate_bytes,
        "rounds": rounds,
        "cases": cases,
    }
    save("contenders", label, record)


# -- the contenders ----------------------------------------------------------------------------------------------------
def of_torch(weight: Tensor, dtype: torch.dtype) -> dict[str, Contender]:
    """What runs without a compiler: torch's operators, oneDNN and FBGEMM."""
    codes, scales = to_int8(weight)
    meant, rounded = codes * scales[:, None], codes * scales.to(dtype).float()[:, None]
    zeros = torch.zeros(len(scales), dtype=torch.long)
    one_dnn = (torch.ops.onednn.qlinear_prepack(codes, None), scales, zeros)
    found = {
        "dense": Contender(0, F.linear, (weight.to(dtype),), weight.to(dtype).float()),
        "stream": Contender(0, lambda x, w: w.sum(), (weight,), weight),
        "int8 aten": Contender(8, torch.ops.aten._weight_int8pack_mm, (codes, scales.to(dtype)), rounded),
        "int8 _int_mm": Contender(8, int_mm, (codes, scales), meant),
        "int8 _int_mm product": Contender(8, product_of(int_mm_product), (codes,), meant),
        "int8 oneDNN": Contender(8, one_dnn_linear, one_dnn, meant),
        "int8 oneDNN product": Contender(8, product_of(one_dnn_product), one_dnn, meant),
    }
    if dtype is torch.float32:  # the only one that dynamic quantisation takes
        for engine in ("fbgemm", "onednn"):
            torch.backends.quantized.engine = engine
            held = torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, 0)
            packed = (torch.ops.quantized.linear_prepack(held, None),)
            found[f"int8 {engine} dynamic"] = Contender(8, torch.ops.quantized.linear_dynamic, packed, meant)
    for group in (32, 128):
        if weight.shape[1] % group == 0:
            found[f"int4/{group} aten"] = aten_int4(weight, dtype, group)
    return found


def aten_int4(weight: Tensor, dtype: torch.dtype, group: int) -> Contender:
    codes, scales = to_int4(weight, group)
    scales = scales.to(dtype)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
    scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], -1).transpose(0, 1).contiguous()

    def call(x: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales_and_zeros)

    return Contender(4, call, (packed, scales_and_zeros), times_scales(codes, scales, group))


def ours(weight: Tensor, dtype: torch.dtype) -> dict[str, Contender]:
    """The operator of this package, on dense and on 2:4 codes, each in the layout that it is kept in here."""
    found = {}
    for pattern, (values, group) in itertools.product(("", " 2:4"), (("int8", None), ("int4", 32), ("int4", 128))):
        form = Format(pattern.strip() or "dense", values, group)
        if form.why_not(weight.shape[1]) is not None:
            continue
        kept = weight * hard_mask(weight.abs(), TWO_FOUR) if pattern else weight
        codes, scales = to_int4(kept, group) if group else to_int8(kept)
        packed = pack_codes(codes, scales if group else scales[:, None], form)
        name = f"{values}{f'/{group}' if group else ''} ours{pattern}"
        layout = native_layout(weight.device, form, *weight.shape, dtype)
        tensors = (*layout.convert(packed), packed.scales)
        found[name] = Contender(BITS[values], packed_linear(layout.name), tensors, unpack(packed))
    return found


def packed_linear(layout: str) -> Callable[..., Tensor]:
    def call(x: Tensor, values: Tensor, meta: Tensor, scales: Tensor) -> Tensor:
        return OP(x, values, meta, layout, x.shape[-1], None, "none", scales)

    return call


def compiled_ones(weight: Tensor, dtype: torch.dtype) -> dict[str, Contender]:
    """torchao's tensors, and expressions that Inductor fuses: a linear over the expanded weight, a sum of products."""
    from torch import nn
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    compile = torch.compile(dynamic=False)
    codes, scales = to_int8(weight)
    meant = codes * scales[:, None]
    codes4, scales4 = to_int4(weight, 32)
    low, high = (codes4 + 8).to(torch.uint8).view(*scales4.shape, 2, 16).unbind(2)
    meant4 = times_scales(codes4, scales4, 32)

    def int8_linear(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        return F.linear(x, codes.to(x.dtype)) * scales.to(x.dtype)

    def int8_sum(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        return ((x.float()[:, None] * codes).sum(-1) * scales).to(x.dtype)

    def int4_sum(x: Tensor, nibbles: Tensor, scales: Tensor) -> Tensor:
        first, second = x.float().view(len(x), 1, -1, 2, 16).unbind(3)
        products = first * ((nibbles & 15).float() - 8) + second * ((nibbles >> 4).float() - 8)
        return (products * scales[..., None]).sum((-1, -2)).to(x.dtype)

    found = {
        "int8 compiled linear": Contender(8, compile(int8_linear), (codes, scales), meant),
        "int8 compiled sum": Contender(8, compile(int8_sum), (codes, scales), meant),
        "int4/32 compiled sum": Contender(4, compile(int4_sum), (low | high << 4, scales4), meant4),
    }
    for name, config in (("weight only", Int8WeightOnlyConfig), ("dynamic", Int8DynamicActivationInt8WeightConfig)):
        held = nn.Sequential(nn.Linear(*weight.shape[::-1], bias=False, dtype=dtype)).requires_grad_(False)
        held[0].weight.copy_(weight)
        quantize_(held, config(version=2))
        tensor = held[0].weight
        found[f"int8 torchao {name}"] = Contender(8, compile(F.linear), (tensor,), tensor.dequantize().float())
    return found


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] and one scale per output [out]."""
    scales = weight.abs().amax(1) / 127
    return (weight / scales[:, None]).round().to(torch.int8), scales


def to_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [out, in] of -7 to 7 and scales [out, in / group]."""
    grouped = weight.unflatten(1, (-1, group))
    scales = grouped.abs().amax(-1) / 7
    return (grouped / scales[..., None]).round().flatten(1).to(torch.int8), scales


def times_scales(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    return (codes.unflatten(1, (-1, group)) * scales.float()[..., None]).flatten(1)


def rounded_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [tokens, in] and one scale per token [tokens, 1]."""
    scales = x.abs().amax(-1, keepdim=True).float() / 127
    return (x / scales).round().to(torch.int8), scales


def int_mm_product(codes: Tensor, weight: Tensor) -> Tensor:
    return torch._int_mm(codes, weight.t())


def int_mm(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    codes, of_token = rounded_tokens(x)
    return (int_mm_product(codes, weight) * of_token * scales).to(x.dtype)


def one_dnn_product(codes: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Of codes that are unsigned, with 128 for zero: oneDNN has no fast kernel for signed ones on every CPU."""
    return torch.ops.onednn.qlinear_pointwise(
        codes.view(torch.uint8), 1.0, 128, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def one_dnn_linear(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    codes, of_token = rounded_tokens(x)
    return (one_dnn_product(codes ^ -128, weight, scales, zeros) * of_token).to(x.dtype)


def product_of(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The product alone, of tokens that were rounded at the first call with them."""
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def call(x: Tensor, *weight: Tensor) -> Tensor:
        if id(x) not in known:
            known[id(x)] = x, rounded_tokens(x)[0]
        return product(known[id(x)][1], *weight)

    return call


# -- the measurement ---------------------------------------------------------------------------------------------------
def rotated(weight: tuple[Any, ...], room: int) -> list[tuple[Any, ...]]:
    """Copies that fill so many bytes; packed objects of FBGEMM and oneDNN are made anew of what they unpack to."""

    def copy(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.clone()
        return torch.ops.quantized.linear_prepack(*torch.ops.quantized.linear_unpack(part))

    size = sum(size_of(part) for part in weight)
    return [tuple(map(copy, weight)) for _ in range(max(2, -(-room // size)))]


def size_of(part: Any) -> int:
    if not isinstance(part, Tensor):
        return torch.ops.quantized.linear_unpack(part)[0].numel()
    if hasattr(part, "__tensor_flatten__"):  # torchao's wrap others
        return sum(getattr(part, name).nbytes for name in part.__tensor_flatten__()[0])
    return part.numel() * part.element_size()


@torch.inference_mode()
def measure(
    contenders: dict[str, Contender], copies: dict[str, list[tuple]], x: Tensor, rounds: int
) -> dict[str, dict[str, Any]]:
    """Microseconds (median, quartiles, best), gigabytes of the weight per second, over dense, relative error."""

    def run(name: str) -> Callable[[], Tensor]:
        turn = itertools.cycle(copies[name])
        return lambda: contenders[name].call(x, *next(turn))

    runs = {name: run(name) for name in contenders}
    first = {name: warm(r) for name, r in runs.items()}
    slow = [name for name in runs if first[name] > TOO_SLOW * first["dense"]]
    times = seconds_in_turn({name: r for name, r in runs.items() if name not in slow}, rounds)
    times |= {name: [first[name]] * 2 for name in slow}
    found = {}
    for name, seconds in times.items():
        low, middle, high = statistics.quantiles(seconds, n=4)
        size = sum(map(size_of, copies[name][0]))
        found[name] = {
            "bits": contenders[name].bits,
            "microseconds": 1e6 * middle,
            "quartiles": [1e6 * low, 1e6 * high],
            "best_microseconds": 1e6 * min(seconds),
            "timed": 1 if name in slow else rounds,
            "weight_bytes": size,
            "gigabytes_per_second": size / middle / 1e9,
            "over_dense": statistics.median(times["dense"]) / middle,
            "relative_error": error_of(contenders[name], x),
        }
    return found


def warm(run: Callable[[], Tensor]) -> float:
    """Compile, allocate; seconds of a second call."""
    run()
    clock = time.perf_counter()
    run()
    return time.perf_counter() - clock


def error_of(contender: Contender, x: Tensor) -> float | None:
    """None where the result is no product in x's units."""
    result, expected = contender.call(x, *contender.weight).float(), F.linear(x.float(), contender.meant)
    if result.shape != expected.shape or contender.call.__qualname__.startswith("product_of"):
        return None
    return float((result - expected).norm() / expected.norm())


def describe(case: dict[str, Any]) -> str:
    """One line: the shape, dense, and the best dense and 2:4 of each number of bits."""
    parts = [f"{case['out']}x{case['in']} {case['dtype']} {case['threads']} threads M={case['rows']}"]
    for bits, sparse in ((0, False), (8, False), (8, True), (4, False), (4, True)):
        mine = {n: r for n, r in case["results"].items() if r["bits"] == bits and n != "stream"}
        mine = {n: r for n, r in mine.items() if n.endswith("2:4") == sparse}
        if not mine:
            continue
        name = min(mine, key=lambda n: mine[n]["microseconds"])
        row = mine[name]
        parts.append(f"{name} {row['microseconds']:.0f} us ({row['gigabytes_per_second']:.1f} GB/s)")
    return "; ".join(parts)


if __name__ == "__main__":
    typer.run(main)
