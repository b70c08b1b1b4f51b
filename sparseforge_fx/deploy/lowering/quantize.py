"""``quantize``: linears in 8 or 4 bits, dense or 2:4 as they are, packed in place."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparseforge_fx.data.batches import as_batches, count_rows, is_text
from sparseforge_fx.data.reading import Reader, example_of
from sparseforge_fx.deploy.lowering.modules import SparseLinear, find_replaceable, replace, weight_of
from sparseforge_fx.errors import AS_IT_WAS, SparseForgeError, add_sentence
from sparseforge_fx.formats import Format
from sparseforge_fx.graph.capture import as_call, capture
from sparseforge_fx.kernels.packed import DTYPES, pack_codes
from sparseforge_fx.methods.layerwise import round_layer_by_layer
from sparseforge_fx.methods.rounding import Rounded, Values, codes_of, format_of, round_weight
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.passes import find_linears, run_passes, train_passes
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.insert_soft_masks import mask_name
from sparseforge_fx.pattern import TWO_FOUR, Unstructured, check_pattern
from sparseforge_fx.ranges import Count, checked


@checked
@torch.no_grad()
def quantize(
    model: nn.Module,
    data: Any = None,
    *,
    values: Values = "int8",
    scales: Mapping[str, Tensor] | None = None,
    exclude: Sequence[str] = (),
    tokenizer: Any = None,
    calibration: Count = 64,
    length: Count = 512,
    batch_size: Count = 4,
    seed: int = 0,
    example_inputs: Any = None,
) -> dict[str, Any]:
    """Give every nn.Linear and Conv1D of ``model`` integer weights, in place: what is 2:4 stays 2:4, the rest dense.

    With data, each layer is rounded so that it answers what the rounded layers before it give it as the model answers
    now (methods/rounding.py). Without, each weight gets its own nearest values, which costs far more at 4 bits.

    Args:
        data: calibration text, token ids or batches, as for :func:`sparseforge_fx.sparsify`.
        values: ``int8`` (one scale per output), ``int4`` (one per 32 inputs) or ``int4/128``.
        scales: those of weights that lie on a grid already, by weight, as ``sparsify(values=...)`` gives them: their
            codes are exact.
        exclude: globs over module names that stay as they are. Output layers and routers are linears like others.
        calibration: sequences of the data that are looked at, of ``length`` tokens each, ``batch_size`` at a time.

    Returns ``{"values", "quantized": {module: format}, "skipped": {module: reason}, "notes"}``.
    Raises SparseForgeError for unknown values, or if nothing can be quantised; the model then is as it was.
    """
    format = format_of(values)
    if not format.is_quantized:
        raise SparseForgeError("values float are what the model has: choose int8, int4 or int4/128")
    modules, skipped = find_replaceable(model)
    packed = (name for name, module in model.named_modules() if isinstance(module, SparseLinear))
    skipped |= dict.fromkeys(packed, "packed already: quantise before lowering")
    formats: dict[str, Format] = {}
    for name, module in modules.items():
        weight = weight_of(module)
        if any(fnmatchcase(name, glob) for glob in exclude):
            skipped[name] = "excluded by name"
        elif weight.is_meta or weight.dtype not in DTYPES:
            skipped[name] = f"a weight of {weight.dtype} on {weight.device}"
        elif (against := format.why_not(weight.shape[1])) is not None:
            skipped[name] = against
        else:
            sparse = weight.shape[1] % 4 == 0 and check_pattern(weight, TWO_FOUR)
            formats[name] = format._replace(pattern="2:4" if sparse else "dense")
    if not formats:
        reasons = "; ".join(f"{n}: {r}" for n, r in list(skipped.items())[:4]) or "it has no linear layer"
        raise SparseForgeError(f"nothing to quantise: {reasons}")
    known = {n: scales[f"{n}.weight"] for n in formats if scales is not None and f"{n}.weight" in scales}
    notes = [] if data is not None or not tokenizer else ["tokenizer is given and not used: there is no data"]
    walked, rounded = {n: f for n, f in formats.items() if n not in known}, {}
    with _as_it_was(model, modules, formats) as weights:
        if data is not None and walked:
            batches = _first(data, tokenizer, calibration, length=length, batch_size=batch_size, seed=seed)
            rounded, told = _walk(model, weights, walked, batches, example_inputs)
            notes += told
        for name, form in formats.items():
            weight = weights[name].t() if isinstance(modules[name], Conv1D) else weights[name]
            found = rounded.get(name) or (
                codes_of(weight, known[name], form) if name in known else round_weight(weight, form)
            )
            old = modules[name]
            new = SparseLinear(
                pack_codes(found.codes, found.scales, form), old.bias, transposed=isinstance(old, Conv1D),
                dtype=old.weight.dtype,
            )  # fmt: skip
            replace(model, name, new.train(old.training))
    return {
        "values": values,
        "quantized": {name: str(form) for name, form in formats.items()},
        "skipped": skipped,
        "notes": notes,
    }


def _first(data: Any, tokenizer: Any, sequences: int, **how: Any) -> list[Any]:
    batches = as_batches(data, tokenizer, tokens=sequences * how["length"] if is_text(data) else None, **how)
    rows = itertools.accumulate((count_rows(b) for b in batches.first_pass()), initial=0)
    return [batch for batch, before in zip(batches.first_pass(), rows, strict=False) if before < sequences]


def _walk(
    model: nn.Module, weights: Mapping[str, Tensor], formats: Mapping[str, Format], batches: list[Any], example: Any
) -> tuple[dict[str, Rounded], list[str]]:
    """The modules that the data reaches, rounded layer by layer; and what the report should say."""
    program = capture(model, example if example is not None else _example(model, batches[0]))
    reader = Reader(program)
    names = {id(value): name for name, value in weights.items() if name in formats}
    sites = find_linears(program, Unstructured(0.5), include=["*"])
    for site in eligible(sites):
        if id(program.tensor(site.fqn)) not in names:
            site.reason = "not asked for"
    masked, _ = run_passes(program, train_passes(sites))
    found = [
        MaskedWeight(s.fqn, masked.tensor(s.fqn), masked.tensor(mask_name(s.fqn)), s.reduction_dim)
        for s in eligible(sites)
    ]
    owner = {w.fqn: names[id(program.tensor(w.fqn))] for w in found}
    readings = [reader.read(*as_call(batch)) for batch in batches]
    rounded, told = round_layer_by_layer(masked, found, readings, {f: formats[n] for f, n in owner.items()})
    unread = sorted(set(formats) - set(owner.values()))
    notes = [f"{owner[fqn]}: {text}" for fqn, text in told.items()] + list(reader.notes)
    notes += [f"{name}: the graph does not read it as a linear's weight: its own nearest values" for name in unread]
    return {owner[fqn]: value for fqn, value in rounded.items()}, notes


def _example(model: nn.Module, batch: Any) -> Any:
    """None for token ids alone, of which capture makes better ones."""
    inputs = example_of(model, batch)
    return None if isinstance(inputs, Mapping) and set(inputs) <= {"input_ids", "attention_mask"} else inputs


@contextmanager
def _as_it_was(
    model: nn.Module, modules: Mapping[str, Any], names: Mapping[str, Format]
) -> Iterator[dict[str, nn.Parameter]]:
    """Gives the weights by module; they and the modules are put back if not all could be done."""
    weights = {name: modules[name].weight for name in names}
    copies = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        yield weights
    except BaseException as error:
        add_sentence(error, AS_IT_WAS)
        for name, weight in weights.items():
            weight.copy_(copies[name])
            if model.get_submodule(name) is not modules[name]:
                replace(model, name, modules[name])
        raise
