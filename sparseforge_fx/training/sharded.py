"""One model over several processes, by FSDP2: each has a part of every weight, of its mask, curvature, master, moments.

Enabled as accelerate's users do it: ``accelerate launch --use_fsdp --fsdp_version 2 ...``, or an Accelerator with a
FullyShardedDataParallelPlugin. The blocks that the graph repeats are sharded one by one, the rest as one; masks are
gathered and let go with their weights. A dense model that was given is loaded by every process, and cut up when it is
captured; at the end the first process gathers the result, weight by weight, and the models of the others stay empty, as
all do where a run fails: there is a saved state to go on from. Of a checkpoint on disk (in_parts.py) each process reads
its part, and has it at the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.fx import GraphModule

from sparseforge_fx.data.reading import Reading
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.graph.module_tree import BlockModule, with_block_modules
from sparseforge_fx.methods.base import TrainedConfig
from sparseforge_fx.methods.curvature import Curvature, scale_of
from sparseforge_fx.methods.part import Part, local
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.passes import LinearSite, Pass, run_passes
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.passes.insert_expert_counters import counters_of
from sparseforge_fx.passes.insert_hessian_hooks import probe_name
from sparseforge_fx.passes.insert_soft_masks import mask_name
from sparseforge_fx.pattern import Pattern
from sparseforge_fx.training.expert_counters import ExpertCounters
from sparseforge_fx.training.in_parts import InParts, one_element

#: how a model is
SHARED = "by several processes that share it (accelerate launch --use_fsdp --fsdp_version 2)"
ESTIMATOR = "gauss_newton"  # the one whose estimate is a sum over tokens, of the weight's shape


def mask_of_ones(weight: Tensor) -> Tensor:
    """A mask that takes the memory of one element until its block is cut up."""
    return weight.new_ones(()).expand(weight.shape)


class Sharding:
    """How a run's model lies over the processes. Raises SparseForgeError for what cannot be trained so.

    Args:
        plugin: accelerate's, with the user's choices.
        device: of this process.
        in_parts: where weights come from that are still on disk.
    """

    def __init__(self, plugin: FullyShardedDataParallelPlugin, device: torch.device, in_parts: InParts | None = None):
        self.in_parts = in_parts
        self.mesh: DeviceMesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self.reshard = plugin.reshard_after_forward
        #: do blocks compute again backwards what lies between them?
        self.computes_again = bool(plugin.activation_checkpointing)

    def check(self, config: TrainedConfig, sites: Sequence[LinearSite], **others: bool) -> None:
        """Raise SparseForgeError for a method, an option or a weight that cannot be trained in parts."""
        curvature = getattr(config, "curvature", ESTIMATOR)
        reasons = {
            f"the method {type(config).__name__.removesuffix('Config')} has an optimizer of whole weights; take "
            "sparseforge, gmp or imp": config.own_optimizer,
            f"start {config.start!r} is for masks that are final from then on; take preset='alps+kd' with "
            "quench_end=0, or preset='annealed'": config.start not in ("dense", "magnitude"),
            "blocks learn in whole models alone; take reconstruct=0": config.reconstruct > 0,
            f"the pattern {config.pattern} has no groups; take N:M": not isinstance(config.pattern, Pattern),
            f"values {config.values!r} need a layer-wise start; take values='float'": config.values != "float",
            f"the curvature {curvature} is not gathered in parts; take {ESTIMATOR}": curvature != ESTIMATOR,
            **{f"{name.replace('_', ' ')} is for whole models; leave it out": asked for name, asked in others.items()},
        }
        if wrong := next((reason for reason, holds in reasons.items() if holds), None):
            raise SparseForgeError(f"under FSDP {wrong}, or run without --use_fsdp")
        for site in eligible(sites):
            self.placement(site.shape, site.reduction_dim, config.pattern, site.fqn)  # type: ignore[arg-type]

    def placement(self, shape: Sequence[int], dim: int, pattern: Pattern, fqn: str) -> Shard:
        """Along which dimension a weight is cut so that no group of M is. Raises SparseForgeError where none does."""
        count = self.mesh.size()
        if dim != 0:
            return Shard(0)
        if shape[1] % count == 0:
            return Shard(1)
        if -(-shape[0] // count) % pattern.m == 0:
            return Shard(0)
        raise SparseForgeError(
            f"under FSDP {fqn} {list(shape)} cannot be cut into {count} parts without cutting groups of {pattern.m}: "
            f"take a number of processes that divides {shape[1]}, or exclude it"
        )

    def shard(
        self,
        module: GraphModule,
        sites: Sequence[LinearSite],
        pattern: Pattern,
        whole: Sequence[nn.Parameter] = (),
        fetch: Callable[[str], Tensor] | None = None,
    ) -> tuple[GraphModule, dict[str, nn.Parameter]]:
        """``module`` in blocks that FSDP2 has cut up, and its parameters by name, in the order that they
        had; ``whole`` are left as they are. ``fetch``: their values, if they have none."""
        order = [name for name, _ in module.named_parameters()] + [name for name, _ in module.named_buffers()]
        buffers = {name for name, _ in module.named_buffers()}
        masks = [mask_name(s.fqn) for s in eligible(sites)]
        for name in masks:  # in one order: it is that of FSDP2's messages
            if name not in buffers:
                continue
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            mask = owner._buffers.pop(leaf)
            assert mask is not None  # FSDP2 cuts parameters alone
            owner.register_parameter(leaf, nn.Parameter(mask, requires_grad=False))
        placed: dict[str, Shard] = {}
        for site in eligible(sites):
            placement = self.placement(site.shape, site.reduction_dim, pattern, site.fqn)  # type: ignore[arg-type]
            placed |= {site.fqn: placement, mask_name(site.fqn): placement}
        tree = with_block_modules(module)
        names: dict[nn.Module, dict[str, str]] = {b: b.names for b in tree.modules() if isinstance(b, BlockModule)}
        found: dict[str, nn.Parameter] = {}
        kept = {id(p) for p in whole}
        for block in [*names, tree]:
            own = names.get(block, {})
            lent: list[nn.Parameter] = []
            for name, p in block.named_parameters():
                if isinstance(p, DTensor) or id(p) in kept:
                    continue
                if 0 in p.stride() and own.get(name, name) in masks:
                    p.data = p.data.contiguous()
                elif fetch is not None:
                    p.data = fetch(own.get(name, name)).to(p.device)
                    lent.append(p)
            reshard = {} if block is tree else {"reshard_after_forward": self.reshard}
            way = partial(_way, {id(p): placed.get(own.get(name, name)) for name, p in block.named_parameters()})
            fully_shard(block, mesh=self.mesh, shard_placement_fn=way, ignored_params=set(whole), **reshard)
            for p in lent:  # the block has copies of its parts
                p.data = one_element(p)
        for block in names:
            found |= {names[block][name]: p for name, p in block.named_parameters()}
        inside = {id(p) for p in found.values()}
        found |= {name: p for name, p in tree.named_parameters() if id(p) not in inside}
        return tree, {name: found[name] for name in order if name in found}


def _way(ways: dict[int, Shard | None], parameter: nn.Parameter) -> Shard | None:
    return ways.get(id(parameter))


class Shards:
    """A soft-masked model cut up: what runs, and what this process has of every weight and mask.

    The source model's parameters are empty from then on: :meth:`give_back` fills them.

    Args:
        masked: the program with its masks; from here on its state holds the parts.
        probing: from it to the program with probes.
    """

    def __init__(
        self,
        sharding: Sharding,
        masked: Exported,
        probing: Sequence[Pass],
        sites: Sequence[LinearSite],
        pattern: Pattern,
    ):
        self.sharding, self._sites, self._pattern = sharding, sites, pattern
        module = run_passes(masked, probing)[0].module()
        names = [site.fqn for site in eligible(sites)]
        self.probes = {fqn: module.get_parameter(probe_name(fqn)) for fqn in names}
        for probe in self.probes.values():
            probe.requires_grad_(False)  # but in the steps that estimate
        fetch = None if sharding.in_parts is None else sharding.in_parts.weight
        self.counters = counters_of(module, names)
        for counter in self.counters.values():
            counter.requires_grad_(False)
        whole = [*self.probes.values(), *self.counters.values()]
        self.module, self.parameters = sharding.shard(module, sites, pattern, whole, fetch)
        self.weights = []
        for site in eligible(sites):
            weight, mask = self.parameters[site.fqn], self.parameters[mask_name(site.fqn)]
            assert isinstance(weight, DTensor) and isinstance(mask, DTensor)
            here = local(weight), local(mask)
            masked.state[site.fqn], masked.state[mask_name(site.fqn)] = here
            self.weights.append(MaskedWeight(site.fqn, *here, site.reduction_dim, Part.of(weight)))

    def teacher(self, module: GraphModule) -> GraphModule:
        """The dense model, cut up in the same way."""
        fetch = None if self.sharding.in_parts is None else self.sharding.in_parts.taught
        return self.sharding.shard(module, self._sites, self._pattern, fetch=fetch)[0]

    @torch.no_grad()
    def empty(self, source: Exported) -> None:
        """Let go of the whole weights."""
        for value in source.state.values():
            if isinstance(value, nn.Parameter):
                value.data = value.data.new_empty(0)

    @torch.no_grad()
    def give_back(self, source: Exported) -> None:
        """Gather one weight after the other for the source model of the first process; the others' stay empty. A model
        that was on disk gets the parts, on every process."""
        if self.sharding.in_parts is not None:
            self.sharding.in_parts.take(source, self.parameters)
            return
        for fqn, value in source.state.items():
            if fqn in self.parameters and isinstance(value, nn.Parameter):
                whole = self.parameters[fqn].full_tensor()  # type: ignore[attr-defined]
                if self.sharding.mesh.get_rank() == 0:
                    value.data = whole


class ShardedProbe:
    """The probes of a sharded model: each process hears of its own tokens, and keeps its part of the mean over all.

    They stand in the graph that trains, and are asked in the steps that estimate alone. As :class:`CurvatureProbe`.
    """

    rides, run, module = True, None, None

    def __init__(self, shards: Shards, curvature: Curvature):
        self.curvature, self._probes, self._mesh = curvature, shards.probes, shards.sharding.mesh
        self._counters = ExpertCounters(shards.counters, curvature)
        self._scale = scale_of(curvature) / self._mesh.size()
        self._ask(True)  # a hook wants a tensor that has a gradient
        self._hooks = [
            self._probes[w.fqn].register_post_accumulate_grad_hook(partial(self._fold, w)) for w in shards.weights
        ]
        self.forget()

    def _fold(self, w: MaskedWeight, probe: Tensor) -> None:
        assert probe.grad is not None and w.part is not None
        total = DTensor.from_local(probe.grad, self._mesh, [Partial()], run_check=False)
        probe.grad = None
        part = total.redistribute(placements=[Shard(w.part.dim)]).to_local() * self._scale
        self.curvature.add(w.fqn, part)

    def keep(self, batch: Reading) -> None:
        """A micro-batch of a step that estimates begins."""
        del batch
        self._ask(True)

    def complete(self, step: int, loss: Callable[[Any, Reading], Tensor]) -> None:
        """The step's estimates are complete."""
        self.curvature.close()
        self._counters.complete()

    def forget(self) -> None:
        """The step is over."""
        self._counters.forget()
        self._ask(False)

    def _ask(self, wanted: bool) -> None:
        for asked in (*self._probes.values(), *self._counters.parameters.values()):
            asked.requires_grad_(wanted)

    def release(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._probes = {}


def sharding_of(accelerator: Accelerator, notes: list[str], in_parts: InParts | None = None) -> Sharding | None:
    """What the user has asked accelerate for; None: no FSDP. On CPUs accelerate itself leaves it out. ``notes`` gains a
    sentence where it was asked for in vain."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    plugin = plugin or (FullyShardedDataParallelPlugin() if asked_for() else None)
    if plugin is None:
        return None
    if plugin.fsdp_version != 2:
        raise SparseForgeError("FSDP 1 keeps weights where masks do not see them: take FSDP 2 (--fsdp_version 2)")
    if accelerator.num_processes == 1:
        notes.append("FSDP was asked for and does nothing: there is one process to share the model")
        return None
    _check_plugin(plugin, accelerator.mixed_precision)
    if plugin.auto_wrap_policy is not None:
        notes.append("FSDP's auto_wrap_policy is not used: the blocks that the graph repeats are sharded one by one")
    notes.append("the report does not tell how much of each weight was kept and moved: the processes share them")
    return Sharding(plugin, accelerator.device, in_parts)


def _check_plugin(plugin: FullyShardedDataParallelPlugin, precision: str) -> None:
    """Raise SparseForgeError for what masks do not go with."""
    if plugin.cpu_offload and isinstance(plugin.cpu_offload, bool | CPUOffloadPolicy):
        raise SparseForgeError(
            "FSDP's offload_params leaves masks and thresholds without their GPU: leave it out; "
            "optimizer='adamw8bit' saves six bytes a weight"
        )
    policy = plugin.mixed_precision_policy  # accelerate makes one of its own mixed precision, which is autocast here
    if precision == "no" and policy not in (None, MixedPrecisionPolicy()):
        raise SparseForgeError(
            "FSDP's mixed_precision_policy gives a captured graph tensors of other dtypes than it has: take "
            "mixed_precision='bf16', or a model in bfloat16"
        )
    if plugin.ignored_modules is not None:
        raise SparseForgeError("FSDP's ignored_modules name modules that the graph does not have: use exclude=")


def asked_for() -> bool:
    """Has the launcher been told to share the model?"""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
