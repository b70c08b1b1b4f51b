"""Fingerprints: the same for the same weights and data wherever they lie, another one for any other."""

import torch
from torch.utils.data import DataLoader, TensorDataset

from sparseforge_fx.data.batches import as_batches
from sparseforge_fx.training.fingerprint import SAMPLE, of_batches, of_file, of_tensors


def test_one_entry_outside_the_sample_counts():
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64):
        value = torch.zeros(3, 5 * SAMPLE, dtype=dtype)
        other = value.clone()
        other[1, 7] = 1
        assert of_tensors({"a": value}) != of_tensors({"a": other})
        assert of_tensors({"a": value}) == of_tensors({"a": value.t().contiguous().t()})


def test_names_shapes_and_dtypes_count():
    value = torch.arange(6.0)
    found = {of_tensors(t) for t in ({"a": value}, {"b": value}, {"a": value.view(2, 3)}, {"a": value.half()}, {})}
    assert len(found) == 5
    assert of_tensors({"a": value, "b": value + 1}) == of_tensors({"b": value + 1, "a": value})
    assert of_tensors({"a": value, "b": value + 1}) != of_tensors({"a": value + 1, "b": value})


def test_swapped_entries_count():
    value = torch.arange(100.0)
    assert of_tensors({"a": value}) != of_tensors({"a": value.flip(0)})


def fingerprint(data, **options):
    return of_batches(as_batches(data, **{"batch_size": 2, "length": 4, "seed": 0} | options))


def test_token_data():
    ids = torch.arange(40)
    assert fingerprint(ids) == fingerprint(ids.numpy())
    assert (
        len({fingerprint(ids), fingerprint(ids + 1), fingerprint(ids, length=5), fingerprint(ids, batch_size=4)}) == 4
    )


def test_batches_of_the_user():
    data = [{"x": torch.full((2, 3), float(i)), "kind": "a", "more": [1, None]} for i in range(3)]
    assert fingerprint(data) == fingerprint([dict(d) for d in data])
    changed = [data[0], {**data[1], "kind": "b"}, data[2]]
    assert len({fingerprint(data), fingerprint(changed), fingerprint(data[::-1]), fingerprint(data[:1])}) == 4


def test_a_loader_that_shuffles_is_known_again():
    def loader():
        return DataLoader(TensorDataset(torch.arange(20.0)), batch_size=4, shuffle=True)

    assert fingerprint(loader()) == fingerprint(loader()) is not None
    assert fingerprint(loader()) != fingerprint(loader(), seed=1)


def test_batches_that_are_never_the_same_have_none():
    count = iter(range(100))

    class Augmented(list):
        def __iter__(self):
            return iter([torch.full((2,), float(next(count)))] * 2)

    assert fingerprint(Augmented([None, None])) is None


def test_of_all_entries_two_that_changed_places_count_wherever_they_are():
    value = torch.arange(5.0 * SAMPLE)
    other = value.clone()
    other[1], other[2] = value[2], value[1]  # the same sum, outside the sample
    assert of_tensors({"a": value}) == of_tensors({"a": other})
    assert of_tensors({"a": value}, sample=None) != of_tensors({"a": other}, sample=None)


def test_a_file_is_copied_on_the_way(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(256)) * 3)
    (tmp_path / "b").write_bytes(bytes(range(256)) * 2)
    assert of_file(tmp_path / "a", tmp_path / "copy") == of_file(tmp_path / "a") != of_file(tmp_path / "b")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "a").read_bytes()
