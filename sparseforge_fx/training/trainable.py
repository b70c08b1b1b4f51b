"""Which parameters a run trains: the sites, every vector (norms, biases), and, if asked for, all other matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from sparseforge_fx.graph.adapters import find_adapters
from sparseforge_fx.graph.program import Program
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.passes import LinearSite
from sparseforge_fx.passes.find_linears import eligible


def choose_trainable(program: Program, sites: Sequence[LinearSite], config: TrainedConfig) -> Callable[[], None]:
    """Set ``requires_grad`` of the source model's parameters, and drop gradients that another loss has left.

    What its owner froze stays frozen, unless all of the model is: so it comes from a loader. PEFT's own parameters
    stay as they are: their adapters are trained by PEFT. Returns a function that sets the flags back.
    """
    model = program.source
    assert isinstance(model, nn.Module)
    site_ids = {id(program.tensor(s.fqn)) for s in eligible(sites)}
    wanted = {id(p): p.requires_grad for p in model.parameters()}
    frozen_model = not any(wanted.values())
    adapters = find_adapters(model).own
    for p in model.parameters():
        beside = p.is_floating_point() and (p.dim() < 2 or config.trainable == "all") and id(p) not in adapters
        beside &= config.trains_weights and (wanted[id(p)] or frozen_model)
        p.requires_grad_(id(p) in site_ids or beside)
        p.grad = None

    def back() -> None:
        for p in model.parameters():
            p.requires_grad_(wanted.get(id(p), True))  # low-rank branches are new
            p.grad = None

    return back
