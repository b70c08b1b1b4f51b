"""``merge_lora``: LoRA adapters into a sparse model whose pattern stays, or kept beside it, with a report."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparseforge_fx.deploy.lowering.modules import SparseLinear, weight_of
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.models.ties import part
from sparseforge_fx.pattern import TWO_FOUR, check_pattern

MODES = ("masked", "separate")


class _Site(NamedTuple):
    """A weight and what training would add to it.

    Attributes:
        base: the linear of the model. source: PEFT's layer around it, or the trained copy of ``modules_to_save``.
        adapters: names of the adapters, none for a trained copy.
    """

    name: str
    base: Any
    source: Any
    adapters: list[str]

    @property
    def weight(self) -> Tensor:
        """As its module has it: [out, in], or [in, out] of a Conv1D."""
        return self.base.weight.detach()

    def update(self) -> Tensor:
        """What training adds to the weight, float32, in its shape: scale * B A, summed over the adapters."""
        if not self.adapters:
            return self.source.weight.detach().float() - self.weight.float()
        return sum(self.source.get_delta_weight(name).detach().float() for name in self.adapters)  # type: ignore[return-value]


@torch.no_grad()
def merge_lora(peft_model: Any, mode: str = "masked", *, adapters: Sequence[str] | None = None) -> dict[str, Any]:
    """Merge LoRA adapters of PEFT so that no zero of the model's weights is lost, in place.

    Args:
        peft_model: a PeftModel around a model with 2:4 linears: dense nn.Linear or Conv1D, or packed.
        mode: "masked" adds scale * B A only where a weight is not zero (a weight without zeros takes all of it),
            packs packed ones anew, and takes the adapters out: ``peft_model.get_base_model()`` is plain then. A weight
            that another module has, too (a tied head), is merged into a copy of its own, and the tie ends.
            "separate" changes nothing: outputs stay exactly those of training, the adapters are computed beside.
        adapters: their names; None: the active ones.

    Returns the report: ``{"mode", "adapters", "outside", "sites": [{"name", "out", "in", "weight", "pattern",
    "done", "outside"}]}``. "outside" is the norm of the part of an update that falls on zeros over the norm of all of
    it, from 0 to 1: what "masked" drops. The report of "separate" says it before anything is dropped.
    Raises SparseForgeError, with nothing changed: PEFT is missing, no PeftModel, no such adapter, one that is merged
    already, one that is no plain LoRA of linear layers (DoRA, target_parameters), NaN or inf in an update, or zeros
    in all of them; for "masked" a weight that is packed in codes, or one of several ties.
    """
    if mode not in MODES:
        raise SparseForgeError(f"unknown mode {mode!r}: choose 'masked' or 'separate'")
    names, sites = _sites(peft_model, adapters)
    others = _ready(peft_model.get_base_model(), sites) if mode == "masked" else {}
    rows, inside, outside = [], 0.0, 0.0
    for site in sites:
        weight, update = site.weight, site.update()
        total = update.square().sum(dtype=torch.float64).item()
        lost = update[weight == 0].square().sum(dtype=torch.float64).item()
        if not total < float("inf"):
            raise SparseForgeError(f"the update of '{site.name}' has NaN or inf: train the adapter anew")
        outside, inside = outside + lost, inside + total - lost
        rows.append(_row(site, mode, lost, total, others.get(site.name, [])))
    if not outside + inside:
        raise SparseForgeError(
            f"the adapter {', '.join(names)} changes no weight: it is not trained, or was made for another model"
        )
    if mode == "masked":
        for site in sites:
            if site.name in others:
                site.base.weight = nn.Parameter(site.weight.clone(), site.base.weight.requires_grad)
            _add(site)
        if adapters is not None:  # whose trained copies of modules stay
            peft_model.base_model.set_adapter(names)
        peft_model.unload()
        _part(peft_model.get_base_model())
    return {"mode": mode, "adapters": names, "outside": _share(outside, outside + inside), "sites": rows}


def _ready(base: nn.Module, sites: Sequence[_Site]) -> dict[str, list[str]]:
    """Raise for what "masked" cannot merge. Returns which other modules have the weight of a site, where any has."""
    others = {}
    for site in sites:
        if getattr(site.base, "weight_scales", None) is not None:
            raise SparseForgeError(
                f"'{site.name}' is packed in {site.base.format}, whose codes take no update: merge into the dense "
                "model and quantise that, or keep it beside (mode 'separate')"
            )
        shared = site.base._parameters.get("weight")
        having = [(n, m) for n, m in base.named_modules() if shared is not None and m is not site.base]
        found = [n for n, m in having if any(p is shared for p in m._parameters.values())]
        if found and site.adapters:  # a trained copy has a weight of its own already
            others[site.name] = [n.removesuffix(".base_layer").removesuffix(".original_module") for n in found]
    if others and any(len(getattr(m, "all_tied_weights_keys", None) or {}) > 1 for m in base.modules()):
        raise SparseForgeError(
            f"the weight of '{next(iter(others))}' is one of several that the model ties, and a configuration can only "
            "part all of them: keep the adapter beside (mode 'separate')"
        )
    return others


def _part(base: nn.Module) -> None:
    """Let a configuration say so where what it ties has parted, by a merge or as a copy that was trained whole."""
    for module in base.modules():
        ties: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
        ends = [operator.attrgetter(*pair)(module) for pair in ties.items()]
        if ends and all(one is not other for one, other in ends):
            part(module, next(iter(ties)).removesuffix(".weight"))


def _row(site: _Site, mode: str, lost: float, total: float, others: list[str]) -> dict[str, Any]:
    packed = isinstance(site.base, SparseLinear)
    weight = weight_of(site.base)
    done = "kept beside" if mode == "separate" else "merged where the weight is not zero" if lost else "merged whole"
    if others:
        done += f", in a copy of its own: {', '.join(others)} had the same weight"
    return {
        "name": site.name,
        "out": weight.shape[0],
        "in": weight.shape[1],
        "weight": "packed" if packed else "dense",
        "pattern": "2:4" if _exact(weight) else None,
        "done": done,
        "outside": _share(lost, total),
    }


def _exact(weight: Tensor) -> bool:
    return check_pattern(weight, TWO_FOUR)


def _share(part: float, whole: float) -> float:
    return (part / whole) ** 0.5 if whole else 0.0


def _add(site: _Site) -> None:
    weight = site.weight
    if not site.adapters:  # PEFT puts the trained copy in the place of the original
        site.source.weight.data[weight == 0] = 0
        return
    merged = torch.where(weight == 0, 0, weight.float() + site.update()).to(weight.dtype)
    for name in site.adapters:
        if site.source.lora_bias.get(name):
            site.base.bias.data += site.source.lora_B[name].bias * site.source.scaling[name]
    if isinstance(site.base, SparseLinear):
        site.base.replace_weight(merged)
    else:
        site.base.weight.data.copy_(merged)


def _sites(peft_model: Any, adapters: Sequence[str] | None) -> tuple[list[str], list[_Site]]:
    """The names of the adapters, and where they change weights."""
    try:
        from peft import PeftModel
        from peft.tuners.lora import Embedding, Linear, LoraLayer
        from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
    except ImportError as error:
        raise SparseForgeError("LoRA needs PEFT: pip install 'sparseforge-fx[lora]', or peft itself") from error
    if not isinstance(peft_model, PeftModel):
        raise SparseForgeError(f"{type(peft_model).__name__} is no PeftModel: give what peft.get_peft_model returned")
    names = list(peft_model.active_adapters if adapters is None else adapters)
    if unknown := [name for name in names if name not in peft_model.peft_config]:
        raise SparseForgeError(f"there is no adapter {unknown[0]!r}: choose from {', '.join(peft_model.peft_config)}")
    base = peft_model.get_base_model()
    sites, inner = [], []
    for path, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            inner += [(path, module)]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise SparseForgeError(f"'{path}' has trainable tokens, which are not merged: keep the adapter beside")
        elif isinstance(module, LoraLayer):
            here = [name for name in names if name in (*module.lora_A, *module.lora_embedding_A)]
            if here:
                sites.append(_checked(_Site(path, module.get_base_layer(), module, here), Linear | Embedding))
    for path, wrapper in inner:
        name = next((name for name in names if name in wrapper.modules_to_save), None)
        if name is not None:
            sites += _trained_copies(path, wrapper.original_module, wrapper.modules_to_save[name])
    if not sites:
        raise SparseForgeError(f"no linear layer has the adapter {', '.join(names)}: nothing to merge")
    return names, sites


def _trained_copies(path: str, original: nn.Module, trained: nn.Module) -> list[_Site]:
    """2:4 linears that ``modules_to_save`` trained whole. Packed ones are frozen, and one of zeros is a new head."""
    return [
        _Site(f"{path}.{name}".rstrip("."), module, trained.get_submodule(name), [])
        for name, module in original.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module.weight.any() and _exact(weight_of(module))
    ]


def _checked(site: _Site, plain: Any) -> _Site:
    layer, where = site.source, f"'{site.name}'"
    if not isinstance(layer, plain):
        raise SparseForgeError(f"{where} is a {type(layer).__name__}, no linear layer: keep its adapter beside")
    if layer.merged:
        raise SparseForgeError(f"{where} has a merged adapter: call unmerge_adapter() of the PeftModel first")
    if variants := set(site.adapters) & set(layer.lora_variant):
        kind = type(layer.lora_variant[variants.pop()]).__name__
        raise SparseForgeError(f"{where} has a {kind}, no plain LoRA: keep its adapter beside")
    if any(layer.lora_bias.get(name) for name in site.adapters) and site.base.bias is None:
        raise SparseForgeError(f"{where} has no bias for the adapter's (lora_bias=True): keep it beside")
    return site
