import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import bits, random_weight

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.gpu.planes import from_planes, places, planes_to_dense, to_planes
from sparseforge_fx.kernels.packed import pack, unpack


@settings(max_examples=60)
@given(
    st.integers(0, 9),
    st.integers(1, 80),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(0, 1000),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_both_ways_are_exact(out, width, dtype, seed, drop):
    dense = random_weight((out, width + -width % 4), dtype, seed, drop)[:, :width]
    packed = pack(dense)
    values, meta = to_planes(packed)
    back = from_planes(values, meta, width, dtype)
    assert torch.equal(bits(back.values), bits(packed.values)) and torch.equal(back.bitmask, packed.bitmask)
    assert back.in_features == width
    assert torch.equal(bits(planes_to_dense(values, meta, width, dtype)), bits(unpack(packed)))


def test_words_stand_where_the_docstring_says():
    dense = torch.zeros(1, 512, dtype=torch.bfloat16)  # 128 groups, 16 words a plane
    dense[0, 4 * 37 + 1], dense[0, 4 * 37 + 3] = 5, 7  # group 37: word 5 of plane 2
    dense[0, 4 * 99 + 2], dense[0, 4 * 99 + 3] = 1, 2  # group 99: word 3 of plane 6, stored swapped
    values, meta = to_planes(pack(dense))
    assert values.shape == (1, 8, 16) and meta.shape == (1, 16)
    assert values[0, 2, 5:6].view(torch.bfloat16).tolist() == [5, 7]
    assert values[0, 6, 3:4].view(torch.bfloat16).tolist() == [2, 1]
    first, second = places(meta)
    assert (first[0, 37], second[0, 37], first[0, 99], second[0, 99]) == (1, 3, 3, 2)
    assert meta[0, 5].item() >> 4 & 0x303 == 0x301 and meta[0, 3].item() >> 20 & 0x303 == 0x203


def test_the_bytes_are_nine_sixteenths():
    weight = random_weight((32, 11008 // 8), torch.bfloat16, 0)
    values, meta = to_planes(pack(weight))
    assert (values.nbytes + meta.nbytes) / weight.nbytes == 9 / 16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, m: to_planes(pack(torch.zeros(2, 3, 8))), r"\[out, in\]"),
        (lambda v, m: to_planes(pack(torch.zeros(2, 8, dtype=torch.int8))), "convert the weight"),
        (lambda v, m: from_planes(v, m, 65), "to_planes"),
        (lambda v, m: from_planes(v, m[:1], 64), "does not belong"),
        (lambda v, m: from_planes(v, m, 64, torch.float32), "own dtype"),
    ],
)
def test_what_does_not_belong_together_is_refused(call, message):
    values, meta = to_planes(pack(random_weight((2, 64), torch.bfloat16, 0)))
    with pytest.raises(SparseForgeError, match=message):
        call(values, meta)
