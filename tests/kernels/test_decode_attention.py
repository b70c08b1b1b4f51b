"""sparseforge::decode_attention against float64: every instruction set, dtype and mask, odd sizes, parts that nothing sees."""

import math

import pytest
import torch

from sparseforge_fx.kernels import cpu
from sparseforge_fx.kernels.decode_attention import DECODE_ATTENTION_OP, decode_attention

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler")

#: B, H, heads, L, D, V: one part of positions and several, lanes that are not filled, every count of queries for a head
SIZES = [
    (1, 9, 3, 130, 64, 64),
    (2, 4, 4, 1, 8, 8),
    (3, 6, 3, 65, 80, 40),
    (2, 14, 2, 200, 96, 128),
    (1, 5, 1, 64, 33, 7),
    (1, 2, 2, 63, 256, 256),
]
MASKS = {
    "none": lambda b, h, n: None,
    "some": lambda b, h, n: torch.rand(b, 1, 1, n) > 0.4,
    "by head": lambda b, h, n: torch.rand(b, h, 1, n) > 0.4,
    "padding": lambda b, h, n: (torch.arange(n) >= n // 2).expand(b, 1, 1, n),
    "added": lambda b, h, n: torch.randn(b, h, 1, n),
    "least": lambda b, h, n: torch.zeros(1, 1, 1, n).masked_fill(torch.rand(n) > 0.5, torch.finfo(torch.float32).min),
    "never": lambda b, h, n: torch.zeros(n).masked_fill(torch.rand(n) > 0.5, -math.inf),
}


def exact(query, key, value, mask, scale):
    groups = query.shape[1] // key.shape[1]
    query, key, value = (t.double() for t in (query, key, value))
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    return torch.ops.aten._safe_softmax(scores, -1) @ value


def made(sizes, dtype=torch.float32):
    batch, heads, key_heads, length, size, width = sizes
    query = torch.randn(batch, heads, 1, size, dtype=dtype)
    held = [torch.randn(batch, length, key_heads, n, dtype=dtype) for n in (size, width)]  # as a cache has them
    return query, *(t.transpose(1, 2) for t in held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", cpu.instruction_sets())
def test_every_instruction_set(isa, dtype):
    torch.manual_seed(0)
    eps = torch.finfo(dtype).eps
    for sizes in SIZES:
        query, key, value = made(sizes, dtype)
        for mask in MASKS.values():
            seen = mask(sizes[0], sizes[1], sizes[3])
            found = cpu.decode_attention(query, key, value, seen, 0.3, isa)
            assert found.dtype == dtype and found.is_contiguous()
            wanted = exact(query, key, value, seen, 0.3)
            # a score is a sum of D products in float32, and e to its power is off by as much
            slack = 8 * sizes[4] * torch.finfo(torch.float32).eps * value.abs().max().double()
            assert ((found.double() - wanted).abs() <= eps * wanted.abs() + slack).all()


def test_numbers_that_are_none_come_through():
    query, key, value = made((1, 2, 1, 70, 8, 8))
    key[0, 0, 69] = math.nan
    assert decode_attention(query, key, value, None, 1.0).isnan().all()
    seen = torch.arange(70).expand(1, 1, 1, 70) < 69
    assert decode_attention(query, key, value, seen, 1.0).isfinite().all()  # nobody reads it


def test_subnormal_halves():
    query, key, value = made((1, 1, 1, 3, 16, 16), torch.float16)
    value = value * 2**-22
    found = decode_attention(query, key, value, None, 0.25)
    torch.testing.assert_close(found.double(), exact(query, key, value, None, 0.25), rtol=0, atol=2**-24)


def test_any_strides():
    query, key, value = made((2, 4, 2, 70, 16, 16))
    apart = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (query, key, value)]
    wanted = decode_attention(query, key, value, None, 1.0)
    assert torch.equal(decode_attention(*apart, None, 1.0), wanted)
    wide = torch.randn(2, 4, 2, 70, 16)[:, :, 0]
    same = decode_attention(query, wide[:, :2], wide[:, 2:], None, 1.0)
    assert torch.equal(same, decode_attention(query, wide[:, :2].contiguous(), wide[:, 2:].contiguous(), None, 1.0))


def test_the_same_bits_for_any_number_of_threads():
    query, key, value = made((3, 6, 2, 500, 32, 32), torch.bfloat16)
    mask = torch.rand(3, 1, 1, 500) > 0.2
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(decode_attention(query, key, value, mask, 0.2))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_no_positions_at_all():
    query, key, value = made((2, 4, 2, 0, 8, 8))
    assert not decode_attention(query, key, value, None, 1.0).any()


def test_without_the_kernels(monkeypatch):
    query, key, value = made((2, 4, 2, 70, 16, 16))
    mask = torch.rand(2, 1, 1, 70) > 0.4
    wanted = decode_attention(query, key, value, mask, 0.3)
    monkeypatch.setattr(cpu, "available", lambda: False)
    torch.testing.assert_close(decode_attention(query, key, value, mask, 0.3), wanted)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q[:, :3], k, v),
        lambda q, k, v: (q, k[..., :8], v),
        lambda q, k, v: (q, k, v[:, :, :5]),
        lambda q, k, v: (q, k, v[:1]),
        lambda q, k, v: (q.expand(-1, -1, 2, -1), k, v),
        lambda q, k, v: (q, k.bfloat16(), v),
    ],
)
def test_what_does_not_fit_is_refused(change):
    with pytest.raises(RuntimeError, match="decode_attention"):
        cpu.decode_attention(*change(*made((2, 4, 2, 10, 16, 16))), None, 1.0)


def test_a_mask_that_does_not_fit_is_refused():
    query, key, value = made((2, 4, 2, 10, 16, 16))
    for mask in (torch.ones(2, 1, 1, 9, dtype=torch.bool), torch.ones(2, 1, 1, 10, dtype=torch.long)):
        with pytest.raises(RuntimeError):
            cpu.decode_attention(query, key, value, mask, 1.0)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    mask = torch.rand(2, 1, 1, 10) > 0.4 if masked else None
    torch.library.opcheck(DECODE_ATTENTION_OP, (*made((2, 4, 2, 10, 16, 8)), mask, 0.3))
