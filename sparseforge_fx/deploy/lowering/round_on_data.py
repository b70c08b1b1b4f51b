"""Weights of a model in few bits, rounded on data: from modules to the layer-wise walk over the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparseforge_fx.data.capturing import capture_for
from sparseforge_fx.data.reading import Reader
from sparseforge_fx.formats import Format
from sparseforge_fx.graph.capture import as_call
from sparseforge_fx.methods.layerwise import round_layer_by_layer
from sparseforge_fx.methods.rounding import Rounded
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.passes import find_linears, run_passes, train_passes
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.insert_soft_masks import mask_name
from sparseforge_fx.pattern import Unstructured


def round_on_data(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    formats: Mapping[str, Format],
    batches: list[Any],
    example_inputs: Any = None,
) -> tuple[dict[str, Rounded], list[str]]:
    """Codes and scales [out, in] of the modules that the data reaches, and what the report should say.

    Args:
        weights: of the modules in ``formats``, by module, as the model stores them. They are written: each as it is
            rounded, for the next to see.
        batches: of data/batches.py.
        example_inputs: to capture with, where the batches do not serve.
    """
    program = capture_for(model, batches[0], example_inputs)
    reader = Reader(program, labels=False)
    modules = {id(weights[name]): name for name in formats}
    sites = find_linears(program, Unstructured(0.5), include=["*"])
    for site in eligible(sites):
        if id(program.tensor(site.fqn)) not in modules:
            site.reason = "not asked for"
    masked, _ = run_passes(program, train_passes(sites))
    found = [
        MaskedWeight(s.fqn, masked.tensor(s.fqn), masked.tensor(mask_name(s.fqn)), s.reduction_dim)
        for s in eligible(sites)
    ]
    owner = {w.fqn: modules[id(program.tensor(w.fqn))] for w in found}
    readings = [reader.read(*as_call(batch)) for batch in batches]
    rounded, told = round_layer_by_layer(masked, found, readings, {f: formats[n] for f, n in owner.items()})
    notes = [f"{owner[fqn]}: {text}" for fqn, text in told.items()] + [*program.notes, *reader.notes]
    unread = sorted(set(formats) - set(owner.values()))
    notes += [f"{name}: the graph does not read it as a linear's weight: its own nearest values" for name in unread]
    return {owner[fqn]: value for fqn, value in rounded.items()}, notes
