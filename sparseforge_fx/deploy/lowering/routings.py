"""How many experts of each stack a token goes to, of a model under its modules: asked of its graph."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.passes import find_linears
from sparseforge_fx.passes.find_routing import Routing, find_routing
from sparseforge_fx.pattern import Unstructured


def find_routings(model: nn.Module, stacks: Collection[str]) -> tuple[dict[str, Routing], dict[str, str]]:
    """Of the 3-D parameters of these names, and of those whose routing the graph does not tell, why.

    The model is captured on inputs that are made from its config, if there is a stack at all.
    """
    if not stacks:
        return {}, {}
    try:
        program = capture(model, dynamic=False)
    except SparseForgeError as error:
        told = f"how many experts a token goes to is not known ({error}): gate=False packs it untimed"
        return {}, dict.fromkeys(stacks, told)
    sites = {id(program.tensor(s.fqn)): s for s in find_linears(program, Unstructured(0.5), include=["*"])}
    found: dict[str, Routing] = {}
    reasons: dict[str, str] = {}
    for name in stacks:
        site = sites.get(id(model.get_parameter(name)))
        routing = find_routing(program, site) if site is not None and site.uses else None
        if routing is None:
            reasons[name] = "the model's graph does not multiply by it: gate=False packs it untimed"
        else:
            found[name] = routing
    return found, reasons
