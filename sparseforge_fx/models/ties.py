"""A linear whose weight is an embedding's, too: which linears are so, and how the two are parted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


def tied_heads(model: nn.Module) -> dict[str, str]:
    """Name of each linear that shares its weight with one embedding, and with nothing else -> the embedding's name.

    Only these can have a weight of their own: a configuration's ``tie_word_embeddings`` ties all or nothing, so that a
    model which ties more is left as it is.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append((name, module))
    found = {}
    for pair in owners.values():
        linears = [name for name, module in pair if type(module) in (nn.Linear, Conv1D)]
        embeddings = [name for name, module in pair if isinstance(module, nn.Embedding)]
        if len(linears) == len(embeddings) == 1 and len(pair) == 2:
            found[linears[0]] = embeddings[0]
    return {n: e for n, e in found.items() if all(len(m.all_tied_weights_keys) == 1 for m in _declaring(model, n))}


def part(model: nn.Module, name: str) -> None:
    """Let the configuration of a transformers model say that the linear of that name has a weight of its own, so that
    nothing ties it again."""
    for module in list(_declaring(model, name)):
        module.all_tied_weights_keys = {}
        module.config.tie_word_embeddings = False


def join(model: nn.Module, name: str) -> None:
    """The way back of :func:`part`: let the configuration say that the linear of that name shares its embedding's
    weight, as it does again."""
    for path, module in model.named_modules():
        if not getattr(module, "_tied_weights_keys", None):
            continue
        own: Any = module
        before, own.config.tie_word_embeddings = getattr(own.config, "tie_word_embeddings", False), True
        ties = own.get_expanded_tied_weights_keys()
        if f"{name}.weight".removeprefix(f"{path}." if path else "") in ties:
            own.all_tied_weights_keys = ties
        else:
            own.config.tie_word_embeddings = before


@contextmanager
def untied(model: nn.Module) -> Iterator[dict[str, str]]:
    """Every tied head has a weight of its own, a copy, from here on: gives :func:`tied_heads`. Tied again if the block
    ends in an error."""
    found = tied_heads(model)
    before: list[tuple[Any, Any, Any]] = []
    heads = {name: model.get_submodule(name) for name in found}
    weights = {name: head.weight for name, head in heads.items()}
    try:
        for name, head in heads.items():
            before += [(m, m.all_tied_weights_keys, m.config.tie_word_embeddings) for m in _declaring(model, name)]
            own = model.get_parameter(f"{name}.weight")
            head.weight = nn.Parameter(own.detach().clone(), own.requires_grad)
            part(model, name)
        yield found
    except BaseException:
        for name, head in heads.items():
            head.weight = weights[name]
        for module, keys, tied in reversed(before):
            module.all_tied_weights_keys, module.config.tie_word_embeddings = keys, tied
        raise


def _declaring(model: nn.Module, name: str) -> Iterator[Any]:
    """The transformers models in ``model`` that tie the weight of the module of that name."""
    for path, module in model.named_modules():
        ties = getattr(module, "all_tied_weights_keys", None) or {}
        if f"{name}.weight".removeprefix(f"{path}." if path else "") in {*ties, *ties.values()}:
            yield module
