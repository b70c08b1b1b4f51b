"""The table of layouts: the ways in which a packed weight is kept for its kernels.

An entry has the way from the format on disk and back, what it refuses, whether files may hold it, and its kernels by
device. The operator (``sparse_linear.py``), files, lowering and the command line all look here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import VALUES, Format
from sparseforge_fx.kernels.gpu import cusparselt, cutlass
from sparseforge_fx.kernels.gpu.planes import from_planes, why_not_planes
from sparseforge_fx.kernels.gpu.planes_linear import as_planes, as_words, planes_dense, planes_product, tune_planes
from sparseforge_fx.kernels.packed import Packed
from sparseforge_fx.kernels.pairs import as_pairs, from_pairs, pairs_dense, pairs_dense_on_cpu, pairs_product
from sparseforge_fx.kernels.pairs import why_not as why_not_pairs
from sparseforge_fx.kernels.rows import rows_dense, rows_dense_on_cpu, rows_product_on_cpu


class Kernel(NamedTuple):
    """How a device works with a layout.

    Attributes:
        dense: (values, meta, in_features, scales) -> weight [out, in]; float32 where there are scales.
        linear: (x [rows, in], values, meta, in_features, bias, activation, scales) -> [rows, out], or None where
            ``dense`` followed by ``F.linear`` serves better.
    """

    dense: Callable[[Tensor, Tensor, int, Tensor | None], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor, int, Tensor | None, str, Tensor | None], Tensor | None] = lambda *_: None


class Layout(NamedTuple):
    """One layout: a weight is two tensors, ``values`` and ``meta``, beside its scales, which are the same in all.

    Attributes:
        convert: the packed weight -> (values, meta).
        restore: (values, meta, in_features, scales) -> the packed weight, which unpacks to the same bits.
        kernels: by type of device, those made for it.
        elsewhere: the kernel of all other devices; None: there is none.
        limits: (out, in, dtype, device, format): why its kernels cannot take such a weight of a model in that dtype.
        takes: values of 2:4 weights that there are kernels for.
        takes_dense: dense weights of these values, too.
        by_rows: the rows of both tensors are the outputs', so that weights of one width can be stacked.
        durable: the same for all GPUs and versions of libraries: it may be written to a file.
        tune: (x, values, meta, in_features, scales): search the kernel's configuration before it is timed.
    """

    name: str
    convert: Callable[[Packed], tuple[Tensor, Tensor]]
    restore: Callable[..., Packed]
    kernels: Mapping[str, Kernel]
    elsewhere: Kernel | None = None
    limits: Callable[[int, int, torch.dtype, torch.device, Format], str | None] = lambda *_: None
    takes: tuple[str, ...] = ("float",)
    takes_dense: bool = False
    by_rows: bool = True
    durable: bool = True
    tune: Callable[[Tensor, Tensor, Tensor, int, Tensor | None], object] = lambda *_: None

    def knows(self, form: Format) -> bool:
        """Whether a weight of this format can be kept in it."""
        return form.values in self.takes and (form.is_sparse or self.takes_dense)

    def convert_each(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """(values, meta) of a packed weight, or of every one of a stack of them, [experts, ...]."""
        if packed.values.dim() == 2 or self.name == "rows":
            return self.convert(packed)
        parts = zip(packed.values, packed.bitmask, _each(packed.scales, len(packed.values)), strict=True)
        values, meta = zip(*(self.convert(Packed(v, b, packed.in_features, s)) for v, b, s in parts), strict=True)
        return torch.stack(values), torch.stack(meta)

    def restore_each(self, values: Tensor, meta: Tensor, in_features: int, scales: Tensor | None) -> Packed:
        """The stack of packed weights that :meth:`convert_each` made these of."""
        if self.name == "rows":
            return self.restore(values, meta, in_features, scales)
        parts = zip(values, meta, _each(scales, len(values)), strict=True)
        each = [self.restore(v, m, in_features, s) for v, m, s in parts]
        values, bitmask = (torch.stack(tensors) for tensors in zip(*(p[:2] for p in each), strict=True))
        return Packed(values, bitmask, in_features, scales)

    def refuses(self, out: int, width: int, dtype: torch.dtype, device: torch.device, form: Format) -> str | None:
        """Why its kernels cannot take a weight [out, width] in this format, of a model in ``dtype``; None where they
        can."""
        if not self.knows(form):
            return f"the layout {self.name} has no kernels for {form}"
        return self.limits(out, width, dtype, device, form)


def _each(scales: Tensor | None, experts: int) -> Iterable[Tensor | None]:
    return [None] * experts if scales is None else scales


def _from_planes(values: Tensor, meta: Tensor, in_features: int, scales: Tensor | None = None) -> Packed:
    return from_planes(as_words(values), meta, in_features, values.dtype, scales)


#: what is on disk: the CPU's kernels read it as it is
ROWS = Layout(
    "rows",
    lambda packed: (packed.values, packed.bitmask),
    Packed,
    {"cpu": Kernel(rows_dense_on_cpu, rows_product_on_cpu)},
    elsewhere=Kernel(rows_dense),
    takes=VALUES,
    takes_dense=True,
)
#: few bits on CPUs
PAIRS = Layout(
    "pairs",
    as_pairs,
    from_pairs,
    {"cpu": Kernel(pairs_dense_on_cpu, pairs_product)},
    elsewhere=Kernel(pairs_dense),
    limits=why_not_pairs,
    takes=("int8", "int4"),
)
#: decoding on a GPU, by Triton
PLANES = Layout(
    "planes",
    as_planes,
    _from_planes,
    {"cuda": Kernel(planes_dense, planes_product)},
    elsewhere=Kernel(planes_dense, planes_product),
    limits=lambda _out, _width, _dtype, _device, form: why_not_planes(form),
    takes=VALUES,
    tune=tune_planes,
)
#: prefill on sparse tensor cores, sm_80 and later
CUSPARSELT = Layout(
    "cusparselt",
    cusparselt.as_blob,
    cusparselt.from_blob,
    {"cuda": Kernel(cusparselt.blob_dense, cusparselt.blob_product)},
    limits=cusparselt.why_not,
    takes=("float", "int8"),
    by_rows=False,
    durable=False,
    tune=cusparselt.tune,
)
#: the same, sm_80 to sm_89
CUTLASS = Layout(
    "cutlass",
    cutlass.as_cutlass,
    cutlass.from_cutlass,
    {"cuda": Kernel(cutlass.cutlass_dense, cutlass.cutlass_product)},
    limits=cutlass.why_not,
    by_rows=False,
    durable=False,
)
#: by name; of a device's own, the first serves every number of rows, and is taken where nothing is measured
LAYOUTS = {layout.name: layout for layout in (ROWS, PAIRS, PLANES, CUSPARSELT, CUTLASS)}

#: what needs no measuring: the first that takes a weight serves every number of rows as well as any other
NATIVE = ("pairs", "rows", "planes", "cusparselt", "cutlass")


def kernel_of(layout: str, device: torch.device) -> Kernel:
    """How that device works with the layout of that name. Raises SparseForgeError if it does not."""
    entry = LAYOUTS.get(layout)
    found = None if entry is None else entry.kernels.get(device.type, entry.elsewhere)
    if found is None:
        raise SparseForgeError(f"no kernel for a packed weight of layout '{layout}' on {device.type}: repack it")
    return found


def layouts_of(device: torch.device) -> tuple[Layout, ...]:
    """Those with kernels made for this type of device."""
    return tuple(layout for layout in LAYOUTS.values() if device.type in layout.kernels)


def native_layout(device: torch.device, form: Format, out: int, width: int, dtype: torch.dtype) -> Layout:
    """What a weight [out, width] that comes from a file is kept in on this device, in a model that computes in
    ``dtype``."""
    own = (LAYOUTS[name] for name in NATIVE if device.type in LAYOUTS[name].kernels)
    return next((layout for layout in own if layout.refuses(out, width, dtype, device, form) is None), ROWS)


def find_target(name: str, device: torch.device) -> tuple[Layout, ...]:
    """The layouts of the target of that name; ``auto``: that of the device which the weights are on."""
    targets = list(dict.fromkeys(kind for layout in LAYOUTS.values() for kind in layout.kernels))
    if name not in ("auto", *targets):
        raise SparseForgeError(f"unknown target {name!r}; choose auto, {', '.join(targets)}")
    kind = device.type if name == "auto" else name
    if kind not in targets:
        raise SparseForgeError(f"there are no sparse kernels for {kind}; move the model to one of {', '.join(targets)}")
    if kind != device.type:
        raise SparseForgeError(f"the model is on {device.type} and the target is {kind}: move the model first")
    return layouts_of(device)
