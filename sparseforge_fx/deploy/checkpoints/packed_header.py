"""The header of a packed checkpoint: what ``quantization_config`` in config.json says."""

from __future__ import annotations

from typing import Any, NamedTuple

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.packed import BITMASK, FORMAT_VERSION, METHOD, VALUES

MOST_MODULES = 1 << 17  # of a model, whatever its files say
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # of packed weights


class Site(NamedTuple):
    """A packed linear: W [out, in], dtype as in ``torch``."""

    out_features: int
    in_features: int
    dtype: str

    @property
    def padded(self) -> int:
        """Columns of the packed weight: ``in`` in whole bytes of the bitmask."""
        return self.in_features + -self.in_features % 8

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Its tensors in the file: suffix -> (safetensors dtype, shape)."""
        dtype = next(k for k, v in DTYPES.items() if v == self.dtype)
        return {
            VALUES: (dtype, (self.out_features, self.padded // 2)),
            BITMASK: ("U8", (self.out_features, self.padded // 8)),
        }


class Header(NamedTuple):
    """``quantization_config`` of a packed checkpoint, checked.

    Attributes:
        modules: packed linears by module name.
        model_modules: modules of all kinds in the model that was packed, or None: not known.
        files: SHA-256 of each weight file by file name, or None: not known.
    """

    modules: dict[str, Site]
    model_modules: int | None = None
    files: dict[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """What stands in config.json."""
        modules = {n: {"shape": [s.out_features, s.in_features], "dtype": s.dtype} for n, s in self.modules.items()}
        known = {"model_modules": self.model_modules, "files": self.files}
        known = {name: value for name, value in known.items() if value is not None}
        return {"quant_method": METHOD, "format_version": FORMAT_VERSION, "pattern": "2:4", "modules": modules, **known}

    @property
    def most_modules(self) -> int:
        """No model of this checkpoint has more: other heads and other versions of its class may add a few."""
        return MOST_MODULES if self.model_modules is None else min(2 * self.model_modules + 100, MOST_MODULES)

    @property
    def sentinel(self) -> str:
        """An empty tensor that stands where a dense weight would. A loader that does not know our quant_method stops at
        its shape; without it, transformers goes on with random weights for those that it misses."""
        return f"{min(self.modules)}.weight"

    @classmethod
    def from_json(cls, raw: Any) -> Header:
        """Raises SparseForgeError that names the entry which is wrong."""
        if not isinstance(raw, dict) or raw.get("quant_method") != METHOD:
            method = raw.get("quant_method") if isinstance(raw, dict) else None
            raise SparseForgeError(
                f"quant_method {short(method)} is not '{METHOD}': load it with the tool that wrote it"
            )
        version = raw.get("format_version")
        if type(version) is not int or version < 1:
            raise SparseForgeError(f"format_version {short(version)} is no version: the checkpoint is damaged")
        if version > FORMAT_VERSION:
            raise SparseForgeError(
                f"the checkpoint has format version {short(version)} and this sparseforge_fx knows {FORMAT_VERSION}: "
                "update sparseforge_fx"
            )
        if raw.get("pattern") != "2:4":
            raise SparseForgeError(f"pattern {short(raw.get('pattern'))} is not '2:4', the only one that is packed")
        modules, count, files = raw.get("modules"), raw.get("model_modules"), raw.get("files")
        if not isinstance(modules, dict) or not modules:
            raise SparseForgeError("the header lists no packed modules: the checkpoint is damaged")
        if unknown := set(raw) - {"quant_method", "format_version", "pattern", "modules", "model_modules", "files"}:
            raise SparseForgeError(f"the header has an unknown entry {short(min(unknown))}: the checkpoint is damaged")
        sites = {str(name): _site(str(name), entry) for name, entry in modules.items()}
        if files is not None and not (
            isinstance(files, dict) and all(isinstance(v, str) and len(v) == 64 for v in files.values())
        ):
            raise SparseForgeError("the header's 'files' are not SHA-256 sums by file name: the checkpoint is damaged")
        if count is not None and (type(count) is not int or not len(sites) < count <= MOST_MODULES):
            raise SparseForgeError(f"the header's model_modules {short(count)} is no such number: it is damaged")
        return cls(sites, count, files)


def _site(name: str, entry: Any) -> Site:
    shape = entry.get("shape") if isinstance(entry, dict) and set(entry) == {"shape", "dtype"} else None
    if not isinstance(shape, list) or len(shape) != 2 or any(type(n) is not int or n < 1 for n in shape):
        raise SparseForgeError(
            f"the header's entry of module {short(name)} has no shape [out, in] and dtype: it is damaged"
        )
    if shape[1] % 4:
        raise SparseForgeError(f"module {short(name)} has {shape[1]} inputs, no multiple of 4: the header is damaged")
    if entry["dtype"] not in DTYPES.values():
        raise SparseForgeError(
            f"module {short(name)} has dtype {short(entry['dtype'])}, not one of {', '.join(DTYPES.values())}"
        )
    return Site(shape[0], shape[1], entry["dtype"])


def short(value: Any) -> str:
    """For a sentence: what nobody vouches for, in no more than 120 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "(a very large number)"
    return text if len(text) <= 120 else text[:117] + "..."
