"""The header of a packed checkpoint: what ``quantization_config`` in config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import DENSE, FINE, Format, parse_format
from sparseforge_fx.kernels.packed import BITMASK, FORMAT_VERSION, METHOD, SCALES, VALUES, packed_names
from sparseforge_fx.scales import scales_like

#: versions of headers without stacks of experts, without formats of stacks, without embeddings, and without scales of
#: 8 bits
WITHOUT_STACKS, OF_FLOATS, OF_LINEARS, OF_WIDE_SCALES = 2, 3, 4, 5
MOST_MODULES = 1 << 17  # of a model, whatever its files say
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # of packed weights
_HELD = {"I8": torch.int8, "U8": torch.uint8, "F16": torch.float16, "F32": torch.float32}
_CODES = {dtype: code for code, dtype in _HELD.items()}


class Site(NamedTuple):
    """A packed linear: W [out, in], the dtype that it computes in as in ``torch``, its format."""

    out_features: int
    in_features: int
    dtype: str
    format: Format = Format("2:4")

    @property
    def padded(self) -> int:
        """Places of a row: ``in`` in whole bytes of the bitmask."""
        return self.in_features + -self.in_features % 8

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Its tensors in the file: suffix -> (safetensors dtype, shape)."""
        out, format = self.out_features, self.format
        floating = next(k for k, v in DTYPES.items() if v == self.dtype)
        dtype = {"float": floating, "int8": "I8", "int4": "U8"}[format.values]
        width = self.padded // (2 if format.is_sparse else 1) // (2 if format.values == "int4" else 1)
        bitmask = self.padded // 8 if format.is_sparse else 0
        tensors: dict[str, tuple[str, tuple[int, ...]]] = {
            VALUES: (dtype, (out, width)),
            BITMASK: ("U8", (out, bitmask)),
        }
        if format.is_quantized:
            dtype_of_scales, columns = scales_like(format, self.in_features)
            tensors[SCALES] = _CODES[dtype_of_scales], (out, columns)
        return tensors

    def empty(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The same tensors, uninitialised; floating values in the dtype of the model that they are for."""
        floats = VALUES if not self.format.is_quantized else None
        return {
            leaf: torch.empty(shape, dtype=dtype if leaf == floats else _HELD[code])
            for leaf, (code, shape) in self.tensors().items()
        }


class Stack(NamedTuple):
    """A packed stack of experts: of each, a matrix [out, in] in the format of all.

    Attributes:
        transposed: the model stores it [experts, in, out].
    """

    experts: int
    site: Site
    transposed: bool

    @property
    def in_features(self) -> int:
        return self.site.in_features

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Of the model's parameter."""
        out, width = self.site.out_features, self.site.in_features
        return (self.experts, width, out) if self.transposed else (self.experts, out, width)

    def tensors(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Its tensors in the file: name -> (safetensors dtype, shape); the last one stands where the dense weight
        would."""
        each = zip(packed_names(name), self.site.tensors().values(), strict=False)
        found = {leaf: (code, (self.experts, *shape)) for leaf, (code, shape) in each}
        floating = next(k for k, v in DTYPES.items() if v == self.site.dtype)
        return {**found, name: (floating, (0,))}

    def empty(self, dtype: torch.dtype) -> list[Tensor]:
        """Values, bitmask and scales, if it has these, uninitialised, for a model of that dtype."""
        return [t[None].expand(self.experts, -1, -1).contiguous() for t in self.site.empty(dtype).values()]


class Header(NamedTuple):
    """``quantization_config`` of a packed checkpoint, checked.

    Attributes:
        modules: packed linears and embeddings by module name.
        model_modules: modules of all kinds in the model that was packed, or None: not known.
        files: SHA-256 of each weight file by file name, or None: not known.
        stacks: packed stacks of experts by the weight's name (since version 3; in few bits since version 4).
        embeddings: which of ``modules`` are embeddings, each with the head that has its weight, too, or None (since
            version 5).
    """

    modules: dict[str, Site]
    model_modules: int | None = None
    files: dict[str, str] | None = None
    stacks: Mapping[str, Stack] = MappingProxyType({})
    embeddings: Mapping[str, str | None] = MappingProxyType({})

    def to_json(self) -> dict[str, Any]:
        """What stands in config.json."""
        modules = {
            n: {"shape": [s.out_features, s.in_features], "dtype": s.dtype, "format": str(s.format)}
            for n, s in self.modules.items()
        }
        formats = [s.format for s in (*self.modules.values(), *(stack.site for stack in self.stacks.values()))]
        fine = any(form.group == FINE for form in formats)
        floats = not any(s.site.format.is_quantized for s in self.stacks.values()) and not self.embeddings and not fine
        stacks = {
            n: {"shape": list(s.stored_shape), "dtype": s.site.dtype, "transposed": s.transposed}
            | ({} if floats else {"format": str(s.site.format)})
            for n, s in self.stacks.items()
        }
        known: dict[str, Any] = {"model_modules": self.model_modules, "files": self.files}
        known |= {"stacks": stacks or None, "embeddings": dict(self.embeddings) or None}
        known = {name: value for name, value in known.items() if value is not None}
        # older readers keep theirs
        version = WITHOUT_STACKS if not stacks else OF_FLOATS if floats else OF_LINEARS
        version = FORMAT_VERSION if fine else OF_WIDE_SCALES if self.embeddings else version
        return {"quant_method": METHOD, "format_version": version, "modules": modules, **known}

    @property
    def most_modules(self) -> int:
        """No model of this checkpoint has more: other heads and other versions of its class may add a few."""
        return MOST_MODULES if self.model_modules is None else min(2 * self.model_modules + 100, MOST_MODULES)

    @property
    def sentinel(self) -> str | None:
        """An empty tensor that stands where a dense weight would. A loader that does not know our quant_method stops at
        its shape; without it, transformers goes on with random weights for those that it misses. None where there are
        stacks alone, each of which has such a tensor."""
        return f"{min(self.modules)}.weight" if self.modules else None

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
        if version == 1 and raw.get("pattern") != "2:4":  # of all modules; since then each has a format
            raise SparseForgeError(f"pattern {short(raw.get('pattern'))} is not '2:4', the only one that is packed")
        modules, count, files = raw.get("modules"), raw.get("model_modules"), raw.get("files")
        if not isinstance(modules, dict) or not (modules or raw.get("stacks")):
            raise SparseForgeError("the header lists no packed modules: the checkpoint is damaged")
        known = {"quant_method", "format_version", "modules", "model_modules", "files"}
        known |= {"stacks"} if version > WITHOUT_STACKS else set()
        known |= {"embeddings"} if version > OF_LINEARS else set()
        if unknown := set(raw) - known - ({"pattern"} if version == 1 else set()):
            raise SparseForgeError(f"the header has an unknown entry {short(min(unknown))}: the checkpoint is damaged")
        sites = {str(name): _site(str(name), entry, version) for name, entry in modules.items()}
        if files is not None and not (
            isinstance(files, dict) and all(isinstance(v, str) and len(v) == 64 for v in files.values())
        ):
            raise SparseForgeError("the header's 'files' are not SHA-256 sums by file name: the checkpoint is damaged")
        if count is not None and (type(count) is not int or not len(sites) < count <= MOST_MODULES):
            raise SparseForgeError(f"the header's model_modules {short(count)} is no such number: it is damaged")
        stacks = raw.get("stacks", {})
        if not isinstance(stacks, dict) or (WITHOUT_STACKS < version <= OF_LINEARS and not stacks):
            raise SparseForgeError("the header's 'stacks' lists no packed stacks: it is damaged")
        of_stacks = {str(n): _stack(str(n), entry, version) for n, entry in stacks.items()}
        every = {**sites, **{name: stack.site for name, stack in of_stacks.items()}}
        fine = [name for name, site in every.items() if site.format.group == FINE]
        if bool(fine) != (version > OF_WIDE_SCALES):
            found = f"has format {every[fine[0]].format}" if fine else "has no format that is new in it"
            raise SparseForgeError(f"a header of version {version} {found}: it is damaged")
        return cls(sites, count, files, of_stacks, _embeddings(raw.get("embeddings", {}), sites, version))


def _site(name: str, entry: Any, version: int) -> Site:
    entries = {"shape", "dtype"} if version == 1 else {"shape", "dtype", "format"}
    shape = entry.get("shape") if isinstance(entry, dict) and set(entry) == entries else None
    if not isinstance(shape, list) or len(shape) != 2 or any(type(n) is not int or n < 1 for n in shape):
        raise SparseForgeError(
            f"the header's entry of module {short(name)} has no {', '.join(sorted(entries))}: it is damaged"
        )
    text = entry.get("format", "2:4")
    try:
        format = parse_format(text)
    except SparseForgeError as error:
        raise SparseForgeError(f"module {short(name)} has format {short(text)}, which there is not: update") from error
    if str(format) != text or format == DENSE:
        raise SparseForgeError(
            f"module {short(name)} has format {short(text)}, in which nothing is packed: it is damaged"
        )
    if (against := format.why_not(shape[1])) is not None and not format.is_sparse:
        raise SparseForgeError(f"module {short(name)} of format {text}: {against}: the header is damaged")
    if format.is_sparse and shape[1] % 4:
        raise SparseForgeError(f"module {short(name)} has {shape[1]} inputs, no multiple of 4: the header is damaged")
    if entry["dtype"] not in DTYPES.values():
        raise SparseForgeError(
            f"module {short(name)} has dtype {short(entry['dtype'])}, not one of {', '.join(DTYPES.values())}"
        )
    if against is not None:
        raise SparseForgeError(f"module {short(name)} of format {text}: {against}: the header is damaged")
    return Site(shape[0], shape[1], entry["dtype"], format)


def _stack(name: str, entry: Any, version: int) -> Stack:
    entries = ["shape", "dtype", "transposed", *(["format"] if version > OF_FLOATS else [])]
    shape = entry.get("shape") if isinstance(entry, dict) and set(entry) == set(entries) else None
    if not isinstance(shape, list) or len(shape) != 3 or type(shape[0]) is not int or shape[0] < 1:
        raise SparseForgeError(
            f"the header's entry of the stack {short(name)} has no {', '.join(entries)}: it is damaged"
        )
    transposed = entry["transposed"]
    if type(transposed) is not bool or "." not in name:
        raise SparseForgeError(f"the header's stack {short(name)} is no parameter of a module: it is damaged")
    matrix = [*reversed(shape[1:])] if transposed else shape[1:]
    one = {"shape": matrix, "dtype": entry["dtype"], "format": entry.get("format", "2:4")}
    return Stack(shape[0], _site(name, one, WITHOUT_STACKS), transposed)


def _embeddings(entry: Any, sites: Mapping[str, Site], version: int) -> dict[str, str | None]:
    if not isinstance(entry, dict) or (version == OF_WIDE_SCALES and not entry):
        raise SparseForgeError("the header's 'embeddings' names none: it is damaged")
    heads = [head for head in entry.values() if head is not None]
    for name, head in entry.items():
        site = sites.get(name)
        if site is None or site.format.is_sparse or not site.format.is_quantized:
            raise SparseForgeError(f"the header has the embedding {short(name)} in no format of one: it is damaged")
        if head is not None and (not isinstance(head, str) or head in sites or heads.count(head) > 1):
            raise SparseForgeError(f"the header ties {short(head)} to {short(name)}, which cannot be: it is damaged")
    return {str(name): head for name, head in entry.items()}


def short(value: Any) -> str:
    """For a sentence: what nobody vouches for, in no more than 120 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "(a very large number)"
    return text if len(text) <= 120 else text[:117] + "..."
