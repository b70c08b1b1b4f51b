"""Weights close together on large pages: the same values, each a tensor of its own."""

import errno
import gc
import mmap
import weakref

import pytest
import torch

from sparseforge_fx.kernels import huge_pages
from sparseforge_fx.kernels.huge_pages import PAGE, on_huge_pages

needs_pages = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no such call")


def weights():
    generator = torch.Generator().manual_seed(0)
    sizes = [(700, 900), (3,), (1024, 1024), (5, 7, 11)]
    floats = [torch.randn(size, generator=generator) for size in sizes]
    return [*floats, floats[2].bfloat16(), floats[2].to(torch.int8), floats[0] > 0]


@needs_pages
def test_values_and_dtypes_stay_and_each_has_its_own_storage():
    given = weights()
    found = list(on_huge_pages(given))
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)
    for old, new in zip(given, found, strict=True):
        assert torch.equal(old, new) and old.dtype == new.dtype and new.is_contiguous()
        assert new.data_ptr() != old.data_ptr() and new.data_ptr() % 64 == 0
        assert new.untyped_storage().nbytes() == new.nbytes  # nothing else is saved with it
    first, last = found[0].data_ptr(), found[-1].data_ptr() + found[-1].nbytes
    assert first % PAGE == 0 and last - first < sum(t.nbytes for t in given) + 64 * len(given)
    found[0].zero_()
    assert torch.equal(found[1], given[1]) and not torch.equal(found[0], given[0])


@needs_pages
def test_what_cannot_lie_there_is_given_as_it_is():
    large = torch.randn(1024, 1024)
    odd = [torch.empty(0), large.t(), large[:, ::2], large.to("meta"), torch.nn.Parameter(large.clone())]
    odd += [large.clone().share_memory_(), large.to_sparse_csr()]
    found = list(on_huge_pages([odd[0], large, *odd[1:]]))
    assert found[1] is not large and torch.equal(found[1], large)
    assert all(a is b for a, b in zip(odd, [found[0], *found[2:]], strict=True))


def test_less_than_a_page_stays_where_it_is():
    small = [torch.randn(10), torch.randn(20)]
    assert all(a is b for a, b in zip(on_huge_pages(small), small, strict=True))


@needs_pages
def test_no_more_than_a_region_exists_twice(monkeypatch):
    monkeypatch.setattr(huge_pages, "REGION", 2 * PAGE)
    alive = weakref.WeakSet()

    def read():
        for _ in range(6):
            tensor = torch.ones(PAGE // 4)
            alive.add(tensor)
            yield tensor
            del tensor

    kept = []
    for moved in on_huge_pages(read()):
        kept.append(moved)
        gc.collect()
        assert len([t for t in alive if all(t is not k for k in kept)]) <= 3
    assert len(kept) == 6 and all(bool((k == 1).all()) for k in kept)


@needs_pages
def test_memory_goes_with_the_last_tensor():
    (moved,) = on_huge_pages([torch.ones(PAGE)])
    view, gone = moved[5:], weakref.ref(moved)
    del moved
    assert gone() is None and bool((view == 1).all())


@needs_pages
@pytest.mark.parametrize("refused", ["mmap", "madvise"])
def test_where_the_system_refuses(monkeypatch, refused):
    """A kernel that was built without such pages says EINVAL, an address space that is full ENOMEM."""

    class Refusing(mmap.mmap):
        def __new__(cls, *args, **kwargs):
            if refused == "mmap":
                raise OSError(errno.ENOMEM, "Cannot allocate memory")
            return super().__new__(cls, *args, **kwargs)

        def madvise(self, *_):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    given = [*weights(), torch.ones(PAGE)]
    assert all(a is b for a, b in zip(on_huge_pages(given), given, strict=True))


def test_where_the_system_has_no_such_call(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    given = weights()
    assert all(a is b for a, b in zip(on_huge_pages(given), given, strict=True))
