import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import bits, random_weight

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.packed import (
    BITMASK,
    VALUES,
    Packed,
    check_packed,
    pack,
    packed_names,
    unpack,
    unpack_mask,
    why_dense,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9),
    st.integers(1, 12),
    st.sampled_from(DTYPES),
    st.integers(0, 1000),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_packing_is_exact(out, groups, dtype, seed, drop):
    weight = random_weight((out, 4 * groups), dtype, seed, drop)
    packed = check_packed(pack(weight))
    back = unpack(packed)
    assert back.dtype == dtype and back.shape == weight.shape == packed.shape
    assert torch.equal(bits(back), bits(weight.float().add(0.0).to(dtype)))  # + 0.0 turns -0.0 into 0.0
    again = pack(back)
    assert torch.equal(bits(again.values), bits(packed.values)) and torch.equal(again.bitmask, packed.bitmask)


def test_bits_and_values_stand_in_order():
    weight = torch.tensor([[0, 5, 0, 7, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 9, 0]], dtype=torch.float32)
    packed = pack(weight)
    assert packed.bitmask.tolist() == [[0b0011_1010, 0b0101_0011]]
    assert packed.values.tolist() == [[5, 7, 1, 2, 0, 0, 0, 9]]


def test_minus_zero_is_zero_and_subnormals_stay():
    tiny = torch.finfo(torch.bfloat16).smallest_normal / 4
    packed = pack(torch.tensor([[-0.0, tiny, -0.0, -tiny]], dtype=torch.bfloat16))
    assert packed.values.view(torch.int16).tolist()[0][:2] == [
        torch.tensor(v, dtype=torch.bfloat16).view(torch.int16).item() for v in (tiny, -tiny)
    ]
    assert not (pack(torch.full((2, 8), -0.0)).values.view(torch.int32) != 0).any()


@pytest.mark.parametrize("width", [4, 12, 20])
def test_widths_that_are_not_whole_bytes_are_padded_with_zeros(width):
    packed = check_packed(pack(random_weight((3, width), torch.bfloat16, 0)))
    assert packed.values.shape == (3, (width + 4) // 2) and packed.bitmask.shape == (3, (width + 4) // 8)
    assert not packed.values[:, width // 2 :].any()


def test_nine_sixteenths_of_the_bytes():
    weight = random_weight((32, 64), torch.bfloat16, 0)
    assert pack(weight).nbytes / weight.nbytes == 9 / 16


def test_experts_are_packed_row_by_row():
    weight = random_weight((3, 5, 16), torch.bfloat16, 1)
    assert torch.equal(unpack(pack(weight)), weight)
    assert torch.equal(pack(weight).values[1], pack(weight[1]).values)


def test_a_weight_that_is_not_sparse_is_refused():
    with pytest.raises(SparseForgeError, match="more than two non-zeros"):
        pack(torch.ones(2, 8))


def test_empty_weights():
    assert unpack(pack(torch.zeros(0, 8))).shape == (0, 8)


def test_mask():
    assert unpack_mask(torch.tensor([[0b1000_0001]], dtype=torch.uint8)).tolist() == [[True] + 6 * [False] + [True]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p._replace(bitmask=p.bitmask.to(torch.int8)), "uint8"),
        (lambda p: p._replace(in_features=17), "do not belong to 17"),
        (lambda p: p._replace(in_features=-8), "do not belong to -8"),
        (lambda p: p._replace(values=p.values[:1]), "does not belong to values"),
        (lambda p: p._replace(bitmask=p.bitmask ^ 1), "exactly two bits"),
    ],
)
def test_damaged_data_is_refused(change, message):
    packed = pack(random_weight((2, 16), torch.float32, 0))
    with pytest.raises(SparseForgeError, match=message):
        check_packed(Packed(*change(packed)))


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 0]]), None),
        (torch.zeros(2, 8, dtype=torch.bfloat16), None),
        (torch.ones(2, 8), "not 2:4: a group of four has more than two non-zeros"),
        (torch.zeros(2, 6), "not 2:4: a group of four has more than two non-zeros"),
        (torch.zeros(2, 8, dtype=torch.float64), "no kernel for torch.float64"),
        (torch.zeros(2, 8, dtype=torch.int8), "no kernel for torch.int8"),
        (torch.zeros(2, 8, device="meta"), "on the meta device"),
    ],
)
def test_why_a_weight_stays_dense(weight, reason):
    assert why_dense(weight) == reason


def test_names_are_those_of_files():
    assert packed_names("a.weight") == ("a.weight_values", "a.weight_bitmask", "a.weight_scales")
    assert (VALUES, BITMASK) == ("weight_values", "weight_bitmask")
