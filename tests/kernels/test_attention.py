"""Attention with gradients of its own: torch's values to the bit, gradients no farther from float64's than torch's."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparseforge_fx.kernels import cpu
from sparseforge_fx.kernels.attention import attention

needs_kernel = pytest.mark.skipif(not cpu.differentiates_attention(), reason="no instructions for bfloat16")


def tensors(batch=2, heads=3, key_heads=3, queries=10, keys=10, size=8):
    def made(count, length):  # as a projection gives them: heads behind positions
        return torch.randn(batch, length, count, size).bfloat16().transpose(1, 2).requires_grad_()

    return made(heads, queries), made(key_heads, keys), made(key_heads, keys)


def boolean(*shape):
    return torch.rand(*shape) > 0.3


def without_sight(*shape):
    """Two queries that see nothing, and one sequence that sees nothing at all."""
    mask = boolean(*shape)
    mask[..., 3:5, :] = False
    mask[0] = False
    return mask


CASES = {
    "plain": ({}, {}, None),
    "one position": ({"queries": 1, "keys": 1}, {}, None),
    "one query": ({"queries": 1, "keys": 300}, {}, None),
    "odd": ({"queries": 77, "keys": 131, "size": 6}, {}, None),
    "several blocks": ({"batch": 1, "queries": 513, "keys": 257, "size": 64}, {}, None),
    "causal": ({"queries": 300, "keys": 300, "size": 32}, {"is_causal": True}, None),
    "more queries than keys": ({"queries": 300, "keys": 100}, {"is_causal": True}, None),
    "causal by mask": ({"queries": 300, "keys": 300}, {}, lambda: torch.ones(300, 300).tril().bool()),
    "scale": ({"queries": 20}, {"scale": 0.7}, None),
    "gqa": ({"heads": 4, "key_heads": 2, "queries": 65, "keys": 65}, {"enable_gqa": True}, None),
    "one head of keys": ({"heads": 4, "key_heads": 1}, {"enable_gqa": True}, None),
    "keys of padding": ({"queries": 130, "keys": 130}, {}, lambda: boolean(2, 1, 1, 130)),
    "mask of heads": ({"keys": 33}, {}, lambda: boolean(1, 3, 10, 33)),
    "nothing to see": ({"queries": 40, "keys": 150}, {}, lambda: without_sight(2, 1, 40, 150)),
    "added": ({"queries": 40, "keys": 150}, {}, lambda: torch.randn(1, 3, 40, 150).bfloat16()),
    "added to rows": ({"queries": 40, "keys": 20}, {}, lambda: torch.randn(40, 20).bfloat16()),
    "least number": (
        {"queries": 40, "keys": 40},
        {},
        lambda: torch.where(boolean(2, 1, 40, 40), 0.0, torch.finfo(torch.bfloat16).min).bfloat16(),
    ),
}


def gradients(call, given, out_gradient, **options):
    out = call(*given, **options)
    return out, torch.autograd.grad(out, given, out_gradient.to(out.dtype))


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_near_those_in_float64(case):
    sizes, options, mask = CASES[case]
    torch.manual_seed(0)
    given = tensors(**sizes)
    options = options if mask is None else {**options, "attn_mask": mask()}
    out_gradient = torch.randn(given[0].shape)
    out, ours = gradients(attention, given, out_gradient, **options)
    expected, theirs = gradients(F.scaled_dot_product_attention, given, out_gradient, **options)
    assert torch.equal(out, expected)
    exact = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in options.items()}
    wide = tuple(t.detach().double().requires_grad_() for t in given)
    _, aims = gradients(F.scaled_dot_product_attention, wide, out_gradient, **exact)
    for found, other, aim in zip(ours, theirs, aims, strict=True):
        assert torch.isfinite(found).all()
        size = aim.norm()
        # rounded to bfloat16 once as an input of the last product, once as its result
        bound = max(2 * 2**-8, 1.1 * float((other.double() - aim).norm() / size.clamp(min=1e-12)))
        assert (found.double() - aim).norm() <= bound * size + 1e-6


def test_rows_of_padding_stay_finite():
    """Queries that see the least number alone, as transformers' masks have it, and whose outputs nothing reads."""
    torch.manual_seed(0)
    given = tensors(queries=40, keys=40)
    given = tuple((20 * t.detach()).requires_grad_() for t in given)
    mask = torch.zeros(2, 1, 40, 40, dtype=torch.bfloat16)
    mask[0, :, :7] = torch.finfo(torch.bfloat16).min
    out_gradient = torch.randn(2, 3, 40, 8)
    out_gradient[0, :, :7] = 0
    ours, theirs = (
        gradients(call, given, out_gradient, attn_mask=mask)[1] for call in (attention, F.scaled_dot_product_attention)
    )
    for found, other in zip(ours, theirs, strict=True):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, other, rtol=2**-6, atol=float(other.abs().max()) * 2**-6)


@pytest.mark.parametrize("reduced", [(), (2,), (3,), (0, 1)], ids=str)
@pytest.mark.parametrize("repeated", [False, True])
def test_rows_may_lie_anyhow(reduced, repeated):
    """Gradients that are one row, repeated, and so are keys."""
    torch.manual_seed(0)
    query, key, value = (t.detach() for t in tensors())
    key = key[:, :, :1].expand(-1, -1, 10, -1) if repeated else key
    found = []
    for call in (attention, F.scaled_dot_product_attention):
        given = tuple(t.requires_grad_() for t in (query.detach(), key.detach(), value.detach()))
        out = call(*given)
        (out.mean(reduced) if reduced else out).sum().backward()
        found.append([t.grad.float() for t in given])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=float(theirs.abs().max()) * 2**-6)


@needs_kernel
def test_the_kernel_is_what_differentiates():
    out = attention(*tensors())
    assert type(out.grad_fn).__name__ == "_AttentionBackward"


@pytest.mark.parametrize(
    "change",
    ["float32", "dropout", "learned mask", "float mask", "odd size", "other values", "mask of three", "turned", "math"],
)
def test_what_the_kernel_does_not_do_is_torchs(change):
    torch.manual_seed(0)
    options = {}
    query, key, value = tensors(size=7 if change == "odd size" else 8)
    if change == "float32":
        query, key, value = (t.detach().float().requires_grad_() for t in (query, key, value))
    if change == "dropout":
        options["dropout_p"] = 0.5
    if change == "learned mask":
        options["attn_mask"] = torch.zeros(10, 10, dtype=torch.bfloat16, requires_grad=True)
    if change == "float mask":
        options["attn_mask"] = torch.randn(10, 10)
        query, key, value = (t.detach().float().requires_grad_() for t in (query, key, value))
    if change == "other values":
        value = torch.randn(2, 3, 10, 4).bfloat16().requires_grad_()
    if change == "mask of three":
        options["attn_mask"] = boolean(3, 10, 10)
    if change == "turned":
        query = query.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    found = []
    with sdpa_kernel(SDPBackend.MATH) if change == "math" else nullcontext():
        for call in (attention, F.scaled_dot_product_attention):
            torch.manual_seed(1)
            out = call(query, key, value, **options)
            assert type(out.grad_fn).__name__ != "_AttentionBackward"
            found.append((out, *torch.autograd.grad(out.float().square().sum(), (query, key, value))))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_without_gradients_and_under_autocast_it_is_torchs():
    torch.manual_seed(0)
    given = tensors()
    with torch.no_grad():
        assert torch.equal(attention(*given), F.scaled_dot_product_attention(*given))
    wide = tuple(t.detach().float().requires_grad_() for t in given)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(*wide), F.scaled_dot_product_attention(*wide))


@needs_kernel
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_of_the_backward_pass(masked):
    torch.manual_seed(0)
    query, key, value = (t.detach() for t in tensors(queries=33, keys=20))
    mask = torch.randn(1, 1, 33, 20).bfloat16() if masked else None
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, logsumexp = flash(query, key, value, 0.0, False, attn_mask=mask)
    arguments = (torch.randn_like(out), query, key, value, mask, out, logsumexp, False, 0.5)
    torch.library.opcheck(torch.ops.sparseforge_cpu.attention_backward.default, arguments)


@needs_kernel
def test_any_number_of_threads_gives_the_same_bits():
    torch.manual_seed(0)
    given, threads = tensors(queries=200, keys=200, size=32), torch.get_num_threads()
    out_gradient, found = torch.randn(given[0].shape), []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            found.append(gradients(attention, given, out_gradient, is_causal=True)[1])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_kernel
def test_a_second_derivative_is_refused():
    query, key, value = tensors()
    with pytest.raises(RuntimeError, match="differentiates once"):
        torch.autograd.grad(attention(query, key, value).float().square().sum(), query, create_graph=True)


@needs_kernel
@pytest.mark.parametrize("change", ["sizes", "mask"])
def test_the_kernel_refuses_what_does_not_fit(change):
    query, key, value = (t.detach() for t in tensors())
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    mask = torch.zeros(1, 1, 9, 10).bfloat16() if change == "mask" else None
    if change == "sizes":
        key = key[:, :, :-1]
    with pytest.raises(RuntimeError, match="attention_backward"):
        cpu.attention_backward(out, query, key, value, mask, out, logsumexp, causal=False, scale=1.0)


@needs_kernel
def test_it_compiles():
    torch.manual_seed(0)
    given, out_gradient = tensors(queries=40, keys=40), torch.randn(2, 3, 40, 8)

    def call(*tensors):
        return torch.ops.sparseforge.attention(*tensors, is_causal=True)

    eager = gradients(call, given, out_gradient)
    compiled = gradients(torch.compile(call, backend="aot_eager"), given, out_gradient)
    assert torch.equal(eager[0], compiled[0])
    assert all(torch.equal(a, b) for a, b in zip(eager[1], compiled[1], strict=True))
