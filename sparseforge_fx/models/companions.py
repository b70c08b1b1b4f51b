"""What stands beside the weights of a checkpoint, and neither its model nor its tokenizer writes: processors of images
and sound, the modules around a sentence encoder, the code that ``auto_map`` names, which is copied and never run, the
licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from sparseforge_fx.models.dense import Location, explained, locate

CODE = "custom_generate"  # a folder, of code that transformers' generate runs where it is allowed to
MODULES = "modules.json"  # of sentence-transformers: a list of folders, of which each may have weights
FILES = ["*processor*.json", "*feature_extractor*.json", "audio_tokenizer_config.json", "chat_template.*"]
FILES += [MODULES, "*sentence_transformers*.json", "sentence_*_config.json"]
FILES += ["*.py"]  # the modules of auto_map, and whatever those import of each other
TEXTS = ("readme.md", "license*", "licence*", "copying*", "notice*", "use_policy*")
# in any case, in a form that the hub's patterns take, too
FILES += ["".join(f"[{c}{c.upper()}]" if c.isalpha() else c for c in text) for text in TEXTS]


def companions(name: str | Path) -> list[Path]:
    """Files of a folder or hub id, and folders that its ``modules.json`` names or that hold code; none of a GGUF
    file.

    Raises SparseForgeError if the hub does not give them, or ``modules.json`` is damaged.
    """
    where = locate(name)
    if where.gguf:
        return []
    with explained(f"cannot read what stands beside the weights of {name}"):
        folder, folders = _folder(where, [*FILES, f"{CODE}/*"]), {CODE}
        found = {file for pattern in FILES for file in folder.glob(pattern) if file.is_file()}
        if folder / MODULES in found:
            listed = {str(module["path"]) for module in json.loads((folder / MODULES).read_text(encoding="utf-8"))}
            folder = _folder(where, [f"{path}/*" for path in listed if path])
            folders |= listed
        found |= {path for path in folder.iterdir() if path.is_dir() and path.name in folders}
    return sorted(found)


def _folder(where: Location, patterns: list[str]) -> Path:
    """Where the files of these names are; those of a hub id come first."""
    if Path(where.name).is_dir():
        return Path(where.name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(where.name, allow_patterns=patterns, **where.options))


def copy_companions(found: Iterable[Path], folder: Path) -> None:
    """Copy them into a folder; what it has of these names already is newer and stays."""
    for path in found:
        target = folder / path.name
        if target.exists():
            continue
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            shutil.copyfile(path, target)
