"""The files of a packed checkpoint, and checks of what nobody vouches for.

Nothing here builds a model or interprets a weight: what a file claims is compared with
its size and with the header before anything is allocated for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sparseforge_fx.deploy.checkpoints.packed_header import Header, short
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.packed import BITMASK, SCALES, VALUES

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_JSON = 100 << 20  # bytes of a json file or header; safetensors has the same limit
# what transformers and PEFT would load from the folder, too or instead
_LOADED = ("*.safetensors", "*.safetensors.index.json", "adapter_*", "pytorch_model*", "tf_model*", "flax_model*")
_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
_BYTES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}


class Stored(NamedTuple):
    """What a file says of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    file: str


def check_folder(folder: Path) -> tuple[dict[str, Any], Header]:
    """config.json and header of a packed checkpoint all of whose files fit each other; reads no weights.

    Checksums are left to the quantizer, which also serves ``from_pretrained`` and needs to read the files only once.

    Raises SparseForgeError that names the file, tensor or entry which does not.
    """
    config = read_json(folder / "config.json")
    if config.get("quantization_config") is None:
        raise SparseForgeError(f"{folder} is no packed checkpoint: config.json has no quantization_config")
    header = Header.from_json(config["quantization_config"])
    classes = config.get("architectures")
    if not isinstance(classes, list | None) or not all(isinstance(name, str) for name in classes or ()):
        raise SparseForgeError(f"architectures {short(classes)} of config.json are no names of classes: it is damaged")
    stored = check_weights(folder, header, checksums=False)
    for name, layers in _layer_counts(config):  # some configurations make lists so long before a model is built
        if layers > _explained(stored):
            raise SparseForgeError(
                f"config.json tells of {short(layers)} layers ({name}), but there are {len(stored)} tensors: "
                "it is damaged"
            )
    return config, header


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint: one, or those of its index. None is outside of the folder, and the folder has
    no others that a loader would take. Raises SparseForgeError otherwise."""
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = shard_files(folder)
    else:
        raise SparseForgeError(f"{folder} has neither {SINGLE} nor {INDEX}: copy the checkpoint anew")
    own = {path.name for path in files} | ({INDEX} if files != [single] else set())
    for path in sorted(p for pattern in _LOADED for p in folder.glob(pattern) if p.name not in own):
        raise SparseForgeError(
            f"{path} is no file of the packed checkpoint in its folder, but a loader would take it: move it to another "
            "folder, or copy the checkpoint anew"
        )
    return files


def shard_files(folder: Path) -> list[Path]:
    """The files that an index names. Raises SparseForgeError if they are not of its own folder."""
    names = sorted({*_weight_map(folder / INDEX).values()})
    for name in names:
        if name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise SparseForgeError(
                f"{folder / INDEX} names {short(name)}, no safetensors file of its own folder: it is not opened"
            )
        if not (folder / name).is_file():
            raise SparseForgeError(f"the shard {short(name)} is missing from {folder}: copy the checkpoint anew")
    return [folder / name for name in names]


def check_weights(folder: Path, header: Header, *, checksums: bool = True) -> dict[str, Stored]:
    """The tensors of a checkpoint by name: those of the packed modules are there, as the header has them, each once.

    Raises SparseForgeError otherwise or, with ``checksums``, if a file's bytes do not have that of the header.
    """
    paths = weight_files(folder)
    stored: dict[str, Stored] = {}
    for path in paths:
        if header.files is None and not _at_home(path):
            raise SparseForgeError(
                f"{path} is a link out of its folder, and the header has no checksum of it: copy the file there"
            )
        for name, info in read_tensors(path).items():
            if name in stored:
                raise SparseForgeError(
                    f"tensor {short(name)} is in both {stored[name].file} and {info.file}: remove one"
                )
            stored[name] = info
    if paths != [folder / SINGLE]:
        claimed = _weight_map(folder / INDEX).items()
        if wrong := {name for name, _ in {(name, info.file) for name, info in stored.items()} ^ claimed}:
            raise SparseForgeError(
                f"{folder / INDEX} and its files disagree about tensor {short(min(wrong))}: copy the checkpoint anew"
            )
    if header.files is not None:
        if wrong := header.files.keys() ^ {p.name for p in paths}:
            raise SparseForgeError(
                f"the weight files are not those of the header: {short(min(wrong))} is in one of the two only"
            )
        for path in paths if checksums else ():
            if sha256(path) != header.files[path.name]:
                raise SparseForgeError(f"{path} is not what was written (its SHA-256 differs): copy it anew")
    if (header.model_modules or 0) > _explained(stored):
        raise SparseForgeError(
            f"the header tells of {header.model_modules} modules, but there are {len(stored)} tensors: it is damaged"
        )
    expected = {f"{n}.{suffix}": info for n, site in header.modules.items() for suffix, info in site.tensors().items()}
    for name, stack in header.stacks.items():
        expected |= stack.tensors(name)
    for name, (dtype, shape) in expected.items():
        found = stored.get(name)
        if found is None:
            raise SparseForgeError(f"tensor {short(name)} is missing from the checkpoint: copy it anew")
        if (found.dtype, found.shape) != (dtype, shape):
            raise SparseForgeError(
                f"tensor {short(name)} is {found.dtype} {short(list(found.shape))}, but the header "
                f"wants {dtype} {list(shape)}: the checkpoint is damaged"
            )
    for name, info in stored.items():
        if name.endswith((f".{VALUES}", f".{BITMASK}", f".{SCALES}")) and name not in expected:
            raise SparseForgeError(
                f"tensor {short(name)} belongs to no packed module of the header: the checkpoint is damaged"
            )
        if name.endswith(".weight") and name.removesuffix(".weight") in header.modules and info.shape != (0,):
            raise SparseForgeError(f"tensor {short(name)} is there packed and dense: the checkpoint is damaged")
    return stored


def read_tensors(path: Path) -> dict[str, Stored]:
    """The header of a safetensors file. Its tensors fill the file: none can claim more bytes than there are."""
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_JSON):
            raise SparseForgeError(f"{path} is no safetensors file or is cut short: copy it anew")
        entries = _parse(file.read(length), path)
    entries.pop("__metadata__", None)
    spans, stored = [], {}
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise SparseForgeError(f"{path}: tensor {short(name)} has no dtype, shape and offsets: copy the file anew")
        shape, span = entry["shape"], entry["data_offsets"]
        if not (_counts(shape) and _counts(span) and len(span) == 2 and str(entry["dtype"]) in _BYTES):
            raise SparseForgeError(
                f"{path}: tensor {short(name)} has a dtype, shape or offsets of no sense: copy the file anew"
            )
        if len(shape) > 16 or math.prod(shape) * _BYTES[entry["dtype"]] != span[1] - span[0]:
            raise SparseForgeError(
                f"{path}: tensor {short(name)} of shape {short(shape)} does not fit its offsets: copy the file anew"
            )
        spans.append(tuple(span))
        stored[name] = Stored(entry["dtype"], tuple(shape), path.name)
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise SparseForgeError(f"{path}: tensors overlap or leave a gap at byte {short(first)}: copy the file anew")
        end = last
    if end != size - 8 - length:
        raise SparseForgeError(
            f"{path}: {short(end)} bytes of tensors are announced, {size - 8 - length} are there: copy it anew"
        )
    return stored


def read_json(path: Path) -> dict[str, Any]:
    """An object from a json file. Raises SparseForgeError: missing, too large, not json, a key twice."""
    with _opened(path) as file:
        if os.fstat(file.fileno()).st_size > MOST_JSON:
            raise SparseForgeError(f"{path} has more than {MOST_JSON >> 20} MiB: it is no file of a checkpoint")
        return _parse(file.read(), path)


def digests(files: Iterable[Path]) -> dict[str, str]:
    """SHA-256 by file name."""
    return {path.name: sha256(path) for path in sorted(files)}


def sha256(path: Path) -> str:
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    found = content.get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise SparseForgeError(f"{index} has no weight_map of file names: copy the checkpoint anew")
    if not isinstance(content.get("metadata"), dict):
        raise SparseForgeError(f"{index} has no metadata, which loaders want: copy the checkpoint anew")
    return found


def _at_home(path: Path) -> bool:
    """Is the file in its folder? The hub's cache has links there, from snapshots/<commit> to blobs."""
    home, target = path.parent.resolve(), path.resolve().parent
    caches = [place.parents[1] / "blobs" for place in (home, *home.parents) if place.parent.name == "snapshots"]
    return target == home or target in caches


def _explained(stored: dict[str, Stored]) -> int:
    """Modules or layers of any model with these tensors; there are a few without tensors, not many."""
    return 16 * len(stored) + 100


def _layer_counts(config: Any, depth: int = 0) -> Iterator[tuple[str, int]]:
    """Entries that count layers, by the custom of their names."""
    for name, value in config.items() if isinstance(config, dict) and depth < 8 else ():
        if type(value) is int and name.endswith(("layer", "layers")):
            yield name, value
        yield from _layer_counts(value, depth + 1)


def _opened(path: Path) -> Any:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError
        return open(path, "rb")
    except (OSError, ValueError) as error:
        raise SparseForgeError(f"cannot read {short(str(path))} ({type(error).__name__}): check the path") from error


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            name = next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))
            raise SparseForgeError(f"{path} has the entry {short(name)} twice: copy it anew")
        return found

    try:
        found = json.loads(data, object_pairs_hook=once)
    except SparseForgeError:
        raise
    except (ValueError, RecursionError) as error:
        raise SparseForgeError(
            f"{path} holds no json where it should ({type(error).__name__}): copy it anew"
        ) from error
    if not isinstance(found, dict):
        raise SparseForgeError(f"{path} holds no json object: copy it anew")
    return found


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
