"""Archives of exports: the directory of a zip file is looked at before anything of it is read."""

import copy
import json
import zipfile

import pytest

import sparseforge_fx as sf
from sparseforge_fx.deploy.export.archive import CHECKSUMS, Archive, refuse_pickles, seal
from sparseforge_fx.errors import SparseForgeError

TENSOR = {"path_name": "weight_0", "use_pickle": False, "tensor_meta": {"sizes": [{"as_int": 2}]}}


def write(path, files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(f"model/{name}", data)
    return path


def described(tensor, weight=b"12345678"):
    return {
        "data/weights/a_weights_config.json": json.dumps({"config": {"w": tensor}}),
        "data/weights/weight_0": weight,
    }


def test_sealed_and_checked(tmp_path):
    path = write(tmp_path / "a.pt2", {"one": b"1", "extra/two": b"22"})
    with pytest.raises(SparseForgeError, match="has no checksums"):
        sf.check_export(path)
    seal(path)
    sf.check_export(path)
    assert Archive(path).json(CHECKSUMS).keys() == {"one", "extra/two"}


@pytest.mark.parametrize(
    ("change", "place"),
    [({"one": b"2"}, "one"), ({"one": None}, "one"), ({"new": b"1"}, "new"), ({CHECKSUMS: b"[]"}, "no checksums by name"),
     ({CHECKSUMS: b'{"one": [1]}'}, "extra/two"), ({CHECKSUMS: b"{"}, "is damaged")],
)  # fmt: skip
def test_any_difference_is_told(tmp_path, change, place):
    seal(write(tmp_path / "a.pt2", {"one": b"1", "extra/two": b"22"}))
    archive = Archive(tmp_path / "a.pt2")
    files = {**{name: archive.read(name) for name in archive.sizes}, **change}
    write(tmp_path / "b.pt2", {name: data for name, data in files.items() if data is not None})
    with pytest.raises(SparseForgeError, match=place):
        sf.check_export(tmp_path / "b.pt2")


def test_no_zip_file_that_torch_writes(tmp_path):
    path = tmp_path / "a.pt2"
    for data in (b"", b"PK", b"PK\x05\x06" + bytes(18), b"\xff" * 1000):
        path.write_bytes(data)
        with pytest.raises(SparseForgeError, match="is no export, or it is damaged"):
            Archive(path)
    write(path, {"one": bytes(10**6)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(SparseForgeError, match="not one that torch writes"):
        Archive(path)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as archive:
        for data in (b"1", b"2"):
            archive.writestr("model/one", data)
    with pytest.raises(SparseForgeError, match="not one that torch writes"):
        Archive(path)


def test_many_files_of_the_same_bytes(tmp_path):
    """Small on the disk, large when they are read."""
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        archive.writestr("model/one", bytes(10_000))
        for i in range(9):
            info = copy.copy(archive.filelist[0])
            info.filename = f"model/{i}"
            archive.filelist.append(info)
    with pytest.raises(SparseForgeError, match="not one that torch writes"):
        Archive(tmp_path / "a.pt2")


@pytest.mark.parametrize(
    "files",
    [described({**TENSOR, "use_pickle": True}), described({**TENSOR, "path_name": "../../x"}), described(TENSOR, b""),
     described({**TENSOR, "path_name": "opaque_obj_0"}), described({**TENSOR, "tensor_meta": None}), described(None),
     {"data/weights/a_weights_config.json": "[]"}, {"data/constants/a.pt": "x"}, {"data/sample_inputs/a.pt": "x"}],
)  # fmt: skip
def test_what_torch_would_unpickle_or_make_of_nothing(tmp_path, files):
    with pytest.raises(SparseForgeError, match="in it"):
        refuse_pickles(Archive(write(tmp_path / "a.pt2", files)))


def test_plain_tensors_pass(tmp_path):
    empty = {**TENSOR, "tensor_meta": {"sizes": [{"as_int": 0}]}}
    for files in (described(TENSOR), described(empty, b""), {"data/sample_inputs/a.pt": b"", "models/a.json": b"{}"}):
        refuse_pickles(Archive(write(tmp_path / "a.pt2", files)))
