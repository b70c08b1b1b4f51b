"""Exports as zip archives: checksums of all that is in them, and a look at what nobody vouches for before torch does.

torch compares nothing: a file with flipped bits is a model with other weights.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparseforge_fx.deploy.checkpoints.packed_files import MOST_JSON
from sparseforge_fx.errors import SparseForgeError, one_line

CHECKSUMS = "extra/sparseforge_checksums.json"
_PLAIN = re.compile(r"(weight|tensor)_\d+")  # what torch reads as bytes; the others are unpickled
_BLOCK = 1 << 20


class Archive:
    """An archive whose directory makes sense: nothing in it inflates, and nothing is there twice.

    Names are without the folder that all members are in. Raises SparseForgeError that names the file.

    Attributes:
        sizes: bytes of every member by name.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._explained():
            with zipfile.ZipFile(path) as file:
                members = file.infolist()
            self.root = members[0].filename.partition("/")[0] + "/"
            self.sizes = {m.filename.removeprefix(self.root): m.file_size for m in members}
            plain = all(m.compress_type == zipfile.ZIP_STORED and m.file_size == m.compress_size for m in members)
            if not plain or len(self.sizes) < len(members) or sum(self.sizes.values()) > path.stat().st_size:
                raise ValueError("its directory is not one that torch writes")

    def read(self, name: str) -> bytes:
        """A small member."""
        with self._explained(), zipfile.ZipFile(self.path) as file:
            if self.sizes[name] > MOST_JSON:
                raise ValueError(f"{name} has {self.sizes[name]} bytes")
            return file.read(self.root + name)

    def json(self, name: str) -> Any:
        """What a small member holds."""
        with self._explained():
            return json.loads(self.read(name))

    def digests(self) -> dict[str, str]:
        """SHA-256 of every member by name."""
        with self._explained(), zipfile.ZipFile(self.path) as file:
            found = {}
            for name in self.sizes:
                digest = hashlib.sha256()
                with file.open(self.root + name) as member:
                    while block := member.read(_BLOCK):
                        digest.update(block)
                found[name] = digest.hexdigest()
            return found

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except SparseForgeError:
            raise
        except Exception as error:  # an open set: whatever zipfile and json make of any bytes
            raise SparseForgeError(
                f"{self.path} is no export, or it is damaged ({one_line(error)}): export it anew"
            ) from error


def seal(path: Path) -> None:
    """Add the checksums of all that is in an archive, as one more member."""
    archive = Archive(path)
    digests = archive.digests()
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(zipfile.ZipInfo(archive.root + CHECKSUMS), json.dumps(digests, indent=0))


def check_export(path: str | Path) -> None:
    """Compare a file of :func:`sparseforge_fx.export` or ``export_generator`` with the checksums in it.

    Neither ``torch.export.load`` nor ``aoti_load_package`` does. They tell of damage, not of intent: who changes a file
    on purpose changes the checksums, too.

    Raises SparseForgeError naming the file and what of it is not as it was written.
    """
    archive = Archive(Path(path))
    if CHECKSUMS not in archive.sizes:
        raise SparseForgeError(f"{path} has no checksums: export it anew")
    written = archive.json(CHECKSUMS)
    found = archive.digests()
    del found[CHECKSUMS]
    if not isinstance(written, dict):
        raise SparseForgeError(f"{path} has no checksums by name: export it anew")
    if wrong := sorted(name for name in {*found, *written} if found.get(name) != written.get(name)):
        raise SparseForgeError(f"{path} is not what was written ({wrong[0][:120]!r} differs): copy or export it anew")


def refuse_pickles(archive: Archive) -> None:
    """Raise SparseForgeError for what ``load_pt2`` would unpickle of exported programs, or allocate from nothing."""
    for name in archive.sizes:
        folder, _, leaf = name.rpartition("/")
        if folder == "data/sample_inputs" and archive.sizes[name]:
            raise SparseForgeError(f"{archive.path} has a pickle in it ({leaf}): export it anew")
        if folder not in ("data/weights", "data/constants") or _PLAIN.fullmatch(leaf):
            continue
        content = archive.json(name) if leaf.endswith("_config.json") else None
        entries = content.get("config") if isinstance(content, dict) else None
        if not isinstance(entries, dict) or not all(_is_plain(archive, folder, entry) for entry in entries.values()):
            raise SparseForgeError(f"{archive.path} has something else than tensors in it ({leaf}): export it anew")


def _is_plain(archive: Archive, folder: str, entry: Any) -> bool:
    """Is this the description of a tensor whose bytes are in the archive?"""
    try:
        size = archive.sizes[f"{folder}/{entry['path_name']}"]
        shape = [length["as_int"] for length in entry["tensor_meta"]["sizes"]]
        return entry["use_pickle"] is False and bool(_PLAIN.fullmatch(entry["path_name"])) and (size > 0 or 0 in shape)
    except (KeyError, TypeError):
        return False
