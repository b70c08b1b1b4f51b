"""The quick reader of GGUF headers gives what gguf's own gives."""

import struct

import gguf
import numpy as np
import pytest
from tiny_checkpoint import tiny_llama, write_gguf

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.models import dense as models
from sparseforge_fx.models.gguf import quick_reader


def write(path, endianess=gguf.GGUFEndian.LITTLE):
    writer = gguf.GGUFWriter(str(path), "llama", endianess=endianess)
    writer.add_token_list(["a", "", "ß日", "a longer one"])
    writer.add_token_scores([0.5, -1.0, float("-inf")])
    writer.add_token_types([1, 2, 3])
    writer.add_array("some.flags", [True, False])
    writer.add_array("some.big", [2**20, -1])
    writer.add_array("some.nested", [[1, 2], [3, 4]])
    writer.add_string("some.empty", "abcd")
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    order = "<" if endianess is gguf.GGUFEndian.LITTLE else ">"
    empty = struct.pack(f"{order}IIQ", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32, 0)  # not to be written so
    text = struct.pack(f"{order}IQ", gguf.GGUFValueType.STRING, 4) + b"abcd"
    path.write_bytes(path.read_bytes().replace(text, empty))
    return path


@pytest.mark.parametrize("endianess", list(gguf.GGUFEndian))
def test_every_field_is_the_same(tmp_path, endianess):
    file = write(tmp_path / "x.gguf", endianess)
    theirs = gguf.GGUFReader(file)
    with quick_reader():
        ours = gguf.GGUFReader(file)
    assert gguf.GGUFReader is type(theirs) and type(ours) is not type(theirs)
    assert list(ours.fields) == list(theirs.fields) and "some.nested" in ours.fields
    assert theirs.fields["some.empty"].types == [gguf.GGUFValueType.ARRAY]
    for name, field in theirs.fields.items():
        other = ours.fields[name]
        assert (other.offset, other.types, other.data) == (field.offset, field.types, field.data), name
        assert len(other.parts) == len(field.parts)
        for one, two in zip(other.parts, field.parts, strict=True):
            assert one.dtype == two.dtype and np.array_equal(one, two, equal_nan=False), name
    assert np.array_equal(ours.tensors[0].data, theirs.tensors[0].data)


def test_whatever_reads_a_model_reads_it_quickly(tmp_path, monkeypatch):
    write_gguf(tmp_path / "tiny.gguf", tiny_llama())

    def slow(*_):
        raise AssertionError("gguf's own reader was used")

    monkeypatch.setattr(gguf.GGUFReader, "__init__", slow)
    with pytest.raises(SparseForgeError, match="reader was used"):
        models.load_dense(tmp_path / "tiny.gguf")
    monkeypatch.undo()
    calls = []
    parts = gguf.GGUFReader._get_field_parts
    monkeypatch.setattr(gguf.GGUFReader, "_get_field_parts", lambda *a: calls.append(1) or parts(*a))
    models.load_dense(tmp_path / "tiny.gguf")
    assert 0 < len(calls) < 260  # less than one a token


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_file_that_ends_in_its_header_is_one_sentence(tmp_path, share):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    content = file.read_bytes()
    file.write_bytes(content[: int(share * content.index(b"token_embd.weight"))])
    with pytest.raises(SparseForgeError, match="cannot read the configuration"):
        models.load_dense(file)
