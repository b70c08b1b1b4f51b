"""What the training loop asks of a method. Methods know masks and weights, never architectures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.config import MethodConfig
from sparseforge_fx.methods.curvature import Curvature
from sparseforge_fx.methods.experts import EXPERT_TOKENS
from sparseforge_fx.methods.misfit import misfit
from sparseforge_fx.methods.one_shot import LAYERWISE
from sparseforge_fx.methods.optimizers import decay_groups
from sparseforge_fx.methods.rounding import Values
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import Pattern, distance_from_binary, hard_mask, to_groups
from sparseforge_fx.ranges import Count, CountFromZero, Positive

#: fields of a config that say how a run begins, and nothing of how it goes on
STARTING = ("start", "reorder", "reconstruct", "reconstruct_lr", "every_token")
SAMPLE = 1 << 13  # mask entries of a weight that the curves are taken from


def add_up(counts: Sequence[Tensor]) -> int:
    """The sum of scalars; a GPU is waited for once, not once for each."""
    return int(torch.stack([count.to(counts[0].device) for count in counts]).sum()) if counts else 0


@dataclass(frozen=True)
class TrainedConfig(MethodConfig, ABC):
    """A trained method's constants.

    Attributes:
        steps: optimizer steps of the whole run.
        start: ``dense``, or the layer-wise method whose masks and survivors the run starts from; ``magnitude``: the
            weights as they are, with its masks, which are those of a model that is N:M already.
        values: what the survivors are kept in. Unless ``float``, the start puts them on that grid
            (methods/rounding.py), and they train rounded, with straight-through gradients; masks must be final then.
        reorder: of a layer-wise start that moves weights: let channels change places where the graph allows it, so that
            groups lose less (methods/reorder.py); masks must be final then.
        reconstruct, reconstruct_lr: passes over the calibration data in which every repeated block learns, after a
            layer-wise start and before the run, to hand on what the dense one does, and AdamW's rate there
            (methods/reconstruct.py), and once more if ``values`` are rounded; masks must be final then.
        expert_tokens: an expert of a mixture that saw fewer tokens is judged by magnitude: in a layer-wise start, and
            where curvature scores weights.
        every_token: a layer-wise start calibrates every expert on all tokens, not on those that are routed to it.
        trainable: what trains beside the weights with masks, as far as its owner has not frozen it: ``vectors`` (norms,
            biases), or ``all``, so that embeddings, the head and every other matrix train, too.
    """

    trains_weights: ClassVar[bool] = True  # False: the model is frozen, the method's own parameters train
    by_gradient: ClassVar[bool] = True  # False: no backward pass, ``observe`` is all
    own_optimizer: ClassVar[bool] = False  # True: part of the method is in the optimizer, no other will do
    prunes_on_the_way: ClassVar[bool] = True  # False: until the end, masks are scales or drawn anew for every step

    steps: Count = field(kw_only=True)
    start: Literal["dense", "magnitude", "wanda", "sparsegpt", "alps"] = "dense"
    values: Values = field(default="float", kw_only=True)
    reorder: bool = field(default=False, kw_only=True)
    reconstruct: CountFromZero = field(default=0, kw_only=True)
    reconstruct_lr: Positive = field(default=1e-3, kw_only=True)
    expert_tokens: Count = field(default=EXPERT_TOKENS, kw_only=True)
    every_token: bool = field(default=False, kw_only=True)
    trainable: Literal["vectors", "all"] = field(default="vectors", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.choose("start", ("dense", "magnitude", *LAYERWISE))
        self.choose("trainable", ("vectors", "all"))
        if self.trainable == "all" and not self.trains_weights:
            raise SparseForgeError(
                "trainable 'all' is for methods that train weights, and this one trains masks alone: leave it out"
            )
        self.choose("values", get_args(Values))
        if self.values != "float" and not self.starts_fixed:
            raise SparseForgeError(
                f"values {self.values!r} need masks that are final from the start on: take sparseforge's preset "
                "alps+kd with quench_end=0, or round after training: sf.quantize"
            )

        self.check_reorder(self.reorder)
        if self.reorder and not (self.starts_fixed and self.start in ("sparsegpt", "alps")):
            raise SparseForgeError(
                "reorder is for masks that are final from the start on, from sparsegpt or alps: take sparseforge's "
                "preset alps+kd with quench_end=0"
            )

        if self.reconstruct and not self.starts_fixed:
            raise SparseForgeError(
                "reconstruct is for masks that are final from the start on: take sparseforge's preset alps+kd with "
                "quench_end=0"
            )

        vain = "every_token" if self.every_token and self.start not in LAYERWISE else None
        vain = vain or ("expert_tokens" if self.expert_tokens != EXPERT_TOKENS and not self.counts_tokens else None)
        if vain is not None:
            raise SparseForgeError(
                f"{vain} is for a layer-wise start, and this run starts from {self.start!r}: leave it out, or "
                "take one (start='alps'), as sparseforge's preset alps+kd does"
            )

    @property
    def idle(self) -> dict[str, str]:
        return super().idle | ({} if self.reconstruct else {"reconstruct_lr": "reconstruct is 0"})

    @property
    def calibrates(self) -> bool:
        """Does the start look at data?"""
        return self.start in LAYERWISE or self.reconstruct > 0 or self.values != "float"

    @property
    def counts_tokens(self) -> bool:
        """Does it matter how many tokens an expert of a mixture sees?"""
        return self.start in LAYERWISE

    @property
    def starts_fixed(self) -> bool:
        """Are the masks of the start those of the end?"""
        return False

    @abstractmethod
    def build(self, weights: Sequence[MaskedWeight]) -> TrainedMethod:
        """The method with these constants over these weights."""


class TrainedMethod(ABC):
    """Decides masks while a model trains. Steps count from 0; ``after_step(k)`` follows optimizer step k."""

    #: what a resumed run needs beside the tensors of :meth:`held`: names of attributes with plain values
    plain: tuple[str, ...] = ("step", "fixed", "flip_rate")

    def __init__(self, config: TrainedConfig, weights: Sequence[MaskedWeight]):
        self.config: Any = config  # each method reads the fields of its own
        self.pattern: Any = config.pattern
        self.steps = config.steps
        self.weights = list(weights)
        self.curvature: Curvature | None = None  # a method that wants probes has one
        self.mean_curvature: dict[str, float] = {}  # by weight, as it was when the masks became final
        self.step = 0
        self.fixed = False  # masks are hard and final
        self.flip_rate = 0.0
        self._final: dict[str, float] = {}  # metrics of masks that are final
        self.hooks: list[Any] = []  # on the model's weights; removed when the run is over

    def progress(self, step: int) -> float:
        return step / self.steps

    # -- what the loop calls -----------------------------------------------------------------------------------------
    def start_from(self, dense: dict[str, Tensor]) -> None:
        """Weights and masks hold the solution of ``config.start``; ``dense`` is what the weights were."""
        del dense

    def wants_curvature(self, step: int) -> bool:
        """Must the backward of this step estimate curvature?"""
        del step
        return False

    def optimizer(self, parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
        """What trains the weights; options are AdamW's ``lr``, ``betas`` and ``weight_decay``, which vectors (norms,
        biases) have no part in."""
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters)  # one pass over the tensors
        return torch.optim.AdamW(decay_groups(parameters, **options), fused=fused, **options)

    def parameters(self) -> list[nn.Parameter]:
        """What the method itself trains, beside or instead of the model."""
        return []

    def observe(self, loss: Tensor, again: Callable[[], Tensor]) -> None:
        """Hear of the loss of a micro-batch; ``again`` gives that of the same one with the masks as they then are."""
        del loss, again

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Bring the masks from step ``step`` to the next one."""
        self.step = step + 1
        if not self.fixed:
            self.advance(self.progress(self.step))

    @abstractmethod
    def advance(self, progress: float) -> None:
        """Masks for the next step; ``progress`` is the share of the run that is over."""

    @torch.no_grad()
    def fix(self) -> None:
        """Make the masks hard, for good."""
        for w in self.weights:
            w.mask.copy_(self.harden(w))
        self.fixed, self._final = True, {}

    def harden(self, w: MaskedWeight) -> Tensor:
        """The hard mask nearest to the present one; where that never moved, not the first N but the largest."""
        moved = int((w.mask != 1).sum())
        scores = w.mask if (moved if w.part is None else w.part.sums(moved)[0]) else w.weight.abs()
        return hard_mask(scores, self.pattern, w.dim)

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """The current values of the curves."""
        if self._final:
            return dict(self._final)
        sample = torch.cat([self.sample(w.mask, w.dim).flatten() for w in self.weights]).float()
        far = len(sample) and distance_from_binary(sample) * len(sample)
        found = {
            "mask_distance_from_binary": self.rate(far, len(sample)),
            "flip_rate": 0.0 if self.fixed else self.flip_rate,
            "density": self.rate(sample.sum(dtype=torch.float64).item(), len(sample)),
        }
        if self.fixed:  # a large model's masks are a tenth of a second to look at
            self._final = found
        return found

    def rate(self, some: float, whole: float) -> float:
        """The share that ``some`` is of ``whole``, of all parts where processes share the weights."""
        if self.weights and (part := self.weights[0].part) is not None:
            some, whole = part.sums(some, whole)
        return some / max(1, whole)

    def sample(self, mask: Tensor, dim: int) -> Tensor:
        """Whole groups from the first rows, [groups, M]: enough for a curve, too few to slow a step."""
        rows = mask.movedim(dim, -1)
        each = rows.shape[:-2].numel() * rows.shape[-1]  # of each expert of a stack; a part may have none
        rows = rows[..., : max(1, SAMPLE // max(1, each)), :]
        return to_groups(rows, self.pattern).flatten(0, -2) if isinstance(self.pattern, Pattern) else rows

    # -- resuming ----------------------------------------------------------------------------------------------------
    def held(self) -> dict[str, dict[str, Tensor]]:
        """Tensors beside weights and masks, by kind and weight: they move with the model and are saved with it."""
        return {} if self.curvature is None else {"curvature": self.curvature.values}

    def move(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of device or dtype to what is held."""
        for tensors in self.held().values():
            for fqn, value in tensors.items():
                if isinstance(value, nn.Parameter):
                    value.data = change(value.data).to(value.dtype)  # in place: an optimizer may hold it
                else:
                    tensors[fqn] = change(value)

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside weights and masks: tensors and plain values only."""
        return {
            "config": self.config.describe(),
            "plain": {name: getattr(self, name) for name in self.plain},
            "held": {kind: {fqn: t.detach() for fqn, t in tensors.items()} for kind, tensors in self.held().items()},
        }

    def check_state(self, state: Any) -> None:
        """Raise SparseForgeError, with nothing changed, unless ``state`` is what :meth:`state` can give in a run with
        these constants."""
        mine = self.state()
        wrong = misfit(dict.fromkeys(state) if isinstance(state, dict) else state, dict.fromkeys(mine), "method")
        if wrong is None and not isinstance(state["config"], dict):
            wrong = "method[config] is no dictionary"
        if wrong is None:
            theirs = state["config"]
            constants = {k: v for k, v in mine["config"].items() if k not in STARTING}  # a start is over by then
            changed = [f"{k} {theirs.get(k)} instead of {v}" for k, v in constants.items() if v != theirs.get(k)]
            if changed:
                raise SparseForgeError(
                    f"the saved training state was made with {', '.join(changed)}; delete it to start anew"
                )
            fixed = {k: v for k, v in mine.items() if k not in ("config", "held")}
            wrong = misfit({k: state[k] for k in fixed}, fixed, "method") or self._wrong_held(state, mine["held"])
        if wrong is not None:
            raise SparseForgeError(f"the saved training state is damaged ({wrong}); delete it to start anew")

    def _wrong_held(self, state: dict[str, Any], mine: dict[str, dict[str, Tensor]]) -> str | None:
        """What is wrong with saved tensors. There may be more than now, as many come on the way, and none of a kind
        that was freed when the masks were fixed."""
        held, of = state["held"], {w.fqn: w for w in self.weights}
        kinds = dict.fromkeys(held) if isinstance(held, dict) else held
        if wrong := misfit(kinds, dict.fromkeys(mine), "method[held]"):
            return wrong
        for kind, tensors in held.items():
            freed = tensors == {} and state["plain"]["fixed"]
            if not isinstance(tensors, dict) or not (freed or set(mine[kind]) <= set(tensors)):
                return f"method[held][{kind}] lacks some of its tensors"
            for fqn, value in tensors.items():
                name = f"method[held][{kind}][{fqn}]"
                if fqn in mine[kind]:
                    if wrong := misfit(value, mine[kind][fqn], name):
                        return wrong
                elif fqn not in of or not self._may_hold(of[fqn], value):
                    return f"{name} fits no weight"
        return None

    def _may_hold(self, w: MaskedWeight, value: Any) -> bool:
        """Can this be kept for a weight later in a run: a value or a mark for each entry, input, or sampled entry?"""
        shapes = (w.mask.shape, w.mask.shape[w.dim : w.dim + 1], self.sample(w.mask, w.dim).shape)
        dtypes = (w.mask.dtype, torch.float32, torch.bool)
        return isinstance(value, Tensor) and value.shape in shapes and value.dtype in dtypes

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """What :meth:`state` gave. Raises SparseForgeError, with nothing changed, as :meth:`check_state` does."""
        self.check_state(state)
        self._final = {}
        for name in self.plain:
            setattr(self, name, state["plain"][name])
        devices = {w.fqn: w.mask.device for w in self.weights}
        for kind, tensors in self.held().items():
            for fqn in set(tensors) - set(state["held"][kind]):
                del tensors[fqn]
            for fqn, value in state["held"][kind].items():
                if fqn in tensors:
                    tensors[fqn].copy_(value)  # in place: an optimizer may read it
                else:
                    tensors[fqn] = value.to(devices[fqn], copy=True)
