"""Masks learned as distributions over frozen weights: MaskLLM and MaskPro.

MaskLLM (arXiv 2409.17481): one logit per legal pattern of a group; the forward pass sees the Gumbel-softmax mixture
of the patterns, whose gradient (that of the masked weight, times the weight) trains the logits.
MaskPro (arXiv 2506.12876): one logit per weight; N weights of a group are drawn without replacement, and the logits
follow the policy gradient of the drawn mask's loss minus that of the first mask. No backward pass.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.methods.base import TrainedConfig, TrainedMethod
from sparseforge_fx.methods.curvature import mean_of_processes
from sparseforge_fx.methods.weights import MaskedWeight
from sparseforge_fx.pattern import Pattern, all_patterns, from_groups, hard_mask, to_groups
from sparseforge_fx.ranges import AtLeastZero, CountFromZero, Positive, Share


class LearnedMasks(TrainedMethod):
    """Frozen weights, a logit tensor per weight, masks that are drawn anew for every step."""

    def __init__(self, config: TrainedConfig, weights: Sequence[MaskedWeight]):
        super().__init__(config, weights)
        self.generator = torch.Generator().manual_seed(config.seed)  # type: ignore[attr-defined]
        self.logits: dict[str, nn.Parameter] = {}

    def parameters(self) -> list[nn.Parameter]:
        return list(self.logits.values())

    @torch.no_grad()
    def start_from(self, dense: dict[str, Tensor]) -> None:
        """The start's masks are where learning begins; its weights are not taken over."""
        for w in self.weights:
            w.weight.copy_(dense[w.fqn])
        self._begin()

    def _first_mask(self, w: MaskedWeight) -> Tensor:
        """Mask that learning begins at, [out, groups, M]: the start's, or that of magnitude."""
        return to_groups(self.harden(w), self.pattern, w.dim)

    def _uniform(self, like: Tensor) -> Tensor:
        """Uniform noise in (0, 1) from the method's own generator: runs and resumed runs draw alike on any device."""
        return torch.rand(like.shape, generator=self.generator).clamp_(1e-20).to(like.device)

    @abstractmethod
    def _begin(self) -> None:
        """The first logits and masks, from the present masks."""

    @abstractmethod
    def _draw(self) -> None:
        """Masks for the next step."""

    @abstractmethod
    def _likeliest(self, w: MaskedWeight) -> Tensor:
        """The mask that the logits prefer, [out, groups, M]."""

    @torch.no_grad()
    def fix(self) -> None:
        if self.fixed:
            return
        for w in self.weights:
            w.mask.copy_(from_groups(self._likeliest(w), w.dim))
        self.fixed = True

    def advance(self, progress: float) -> None:
        if progress >= 1:
            self.fix()
        else:
            self._draw()

    def held(self) -> dict[str, dict[str, Tensor]]:
        return {**super().held(), "logits": dict(self.logits)}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "generator": self.generator.get_state()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.generator.set_state(state["generator"])


# -- MaskLLM -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MaskLLMConfig(TrainedConfig):
    """Constants of MaskLLM (its table 7).

    Attributes:
        prior: strength of the first mask in the logits (alpha, eq. 10).
        spread: standard deviation of the first logits.
        temperature_start, temperature_end, scale_start, scale_end: of the Gumbel softmax, and of the logits in it;
            both go linearly.
        keep_large: factor on sum (w m)^2, which the loss rewards (eq. 8).
        lr_scale: the logits' learning rate, as a multiple of the run's.
        seed: of the first logits and of all masks that are drawn; a recipe gives its own.
    """

    trains_weights: ClassVar[bool] = False
    own_optimizer: ClassVar[bool] = True
    prunes_on_the_way: ClassVar[bool] = False

    prior: AtLeastZero = 3.0
    spread: AtLeastZero = 0.01
    temperature_start: Positive = 4.0
    temperature_end: Positive = 0.05
    scale_start: Positive = 100.0
    scale_end: Positive = 500.0
    keep_large: AtLeastZero = 1e-5
    lr_scale: Positive = 1.0
    seed: CountFromZero = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pattern, Pattern) or self.pattern.m > 8:
            raise SparseForgeError(
                f"maskllm has a logit for every legal mask of a group, too many or none for {self.pattern}: "
                "take N:M with M up to 8, or maskpro"
            )

    def build(self, weights: Sequence[MaskedWeight]) -> MaskLLM:
        return MaskLLM(self, weights)


class MaskLLM(LearnedMasks):
    """Logits [patterns, out, groups], trained through the Gumbel softmax.

    Patterns come first: a softmax along six neighbours in memory is not vectorised.
    """

    def __init__(self, config: MaskLLMConfig, weights: Sequence[MaskedWeight]):
        super().__init__(config, weights)
        self._noise: dict[str, Tensor] = {}
        self._rewarded: set[str] = set()  # weights whose size is in this step's gradient already
        for w in weights:
            self.hooks.append(w.weight.register_hook(lambda g, w=w, live=w.weight: self._learn(w, live, g)))
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        c = self.config
        for w in self.weights:
            first = self._first_mask(w).float()
            legal = all_patterns(self.pattern, first.device)
            logits = torch.randn(len(legal), *first.shape[:-1], generator=self.generator).to(first.device) * c.spread
            likeness = (first @ legal.t()).movedim(-1, 0) / self.pattern.n * 2 - 1  # -1: disjoint, 1: the same
            logits += c.prior * logits.std() * likeness
            self.logits[w.fqn] = nn.Parameter(logits)
        self._draw()

    def optimizer(self, parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
        return super().optimizer(parameters, **{**options, "lr": options["lr"] * self.config.lr_scale})

    def _sharpness(self) -> tuple[float, float]:
        """Factors on the logits and on the noise at the present step."""
        c, progress = self.config, self.progress(self.step)
        heat = c.temperature_start + (c.temperature_end - c.temperature_start) * progress
        return (c.scale_start + (c.scale_end - c.scale_start) * progress) / heat, 1 / heat

    def _shares(self, w: MaskedWeight) -> Tensor:
        """Each pattern's share in the soft mask that the present noise gives, [patterns, out * groups]."""
        on_logits, on_noise = self._sharpness()
        height = on_logits * self.logits[w.fqn] + on_noise * self._noise[w.fqn].float()
        height = (height - height.amax(0)).clamp(min=-60)  # shares of e^-90 are denormal numbers: CPUs crawl over them
        return height.softmax(0).flatten(1)

    def _mixture(self, w: MaskedWeight, shares: Tensor) -> Tensor:
        """The soft mask of these shares, in the weight's shape."""
        groups = shares.t() @ all_patterns(self.pattern, shares.device)
        return from_groups(groups.view(*self.logits[w.fqn].shape[1:], -1), w.dim)

    @torch.no_grad()
    def _draw(self) -> None:
        self._rewarded.clear()
        for w in self.weights:
            self._noise[w.fqn] = -(-self._uniform(self.logits[w.fqn]).log()).log()
            w.mask.copy_(self._mixture(w, self._shares(w)))

    @torch.no_grad()
    def _learn(self, w: MaskedWeight, live: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the masked weight -> that of the logits; the weight itself learns nothing."""
        if self.fixed:
            return gradient
        shares = self._shares(w)
        value = live.detach().float()
        wanted = gradient.float() * value  # of the mask
        if w.fqn not in self._rewarded:  # once per step, whatever the number of micro-batches
            self._rewarded.add(w.fqn)
            wanted -= 2 * self.config.keep_large * value.square() * self._mixture(w, shares)
        pull = all_patterns(self.pattern, wanted.device) @ to_groups(wanted, self.pattern, w.dim).flatten(0, -2).t()
        pull = (pull - (pull * shares).sum(0)) * shares * self._sharpness()[0]  # through the softmax
        logits = self.logits[w.fqn]
        pull = pull.view_as(logits)
        logits.grad = pull if logits.grad is None else logits.grad + pull
        return torch.zeros_like(gradient)

    def _likeliest(self, w: MaskedWeight) -> Tensor:
        return all_patterns(self.pattern, w.mask.device)[self.logits[w.fqn].argmax(0)]

    def held(self) -> dict[str, dict[str, Tensor]]:
        return {**super().held(), "noise": self._noise}


# -- MaskPro -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MaskProConfig(TrainedConfig):
    """Constants of MaskPro.

    Attributes:
        certainty: the first mask's logits, the others' being 0.
        memory: of the moving average of the loss residual.
        logit_lr: learning rate of the plain gradient step, in the place of the run's own.
        seed: of all masks that are drawn; a recipe gives its own.
    """

    trains_weights: ClassVar[bool] = False
    by_gradient: ClassVar[bool] = False
    own_optimizer: ClassVar[bool] = True
    prunes_on_the_way: ClassVar[bool] = False

    certainty: AtLeastZero = 10.0
    memory: Share = 0.99
    logit_lr: Positive = 50.0
    seed: CountFromZero = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.pattern, Pattern) or self.pattern.n > 4:
            raise SparseForgeError(
                f"maskpro sums over the orders in which the kept weights of a group are drawn; {self.pattern} has too "
                "many or no groups: take N:M with N up to 4"
            )

    @property
    def idle_in_a_run(self) -> dict[str, str]:
        why = dict.fromkeys(("lr", "weight_decay"), "maskpro takes plain gradient steps at its own rate, logit_lr")
        return why | {"activation_checkpointing": "maskpro has no backward pass"}

    def build(self, weights: Sequence[MaskedWeight]) -> MaskPro:
        return MaskPro(self, weights)


def log_probability(logits: Tensor, mask: Tensor, n: int) -> Tensor:
    """Log-probability that N draws without replacement from softmax(logits) give just this mask, in any order.

    Args:
        logits: [..., M]; mask: [..., M] with N ones. Returns [...]; differentiable, exact (summed over the N! orders).
    """
    # along a group's few neighbours in memory all of this takes several times as long
    log_p = logits.movedim(-1, 0).contiguous().log_softmax(0)
    kept = mask.movedim(-1, 0).to(torch.int8).contiguous()
    place = kept.cumsum(0, dtype=torch.int8) * kept  # 1 for the first that is kept, 2 for the second, ...
    chosen = [(log_p * (place == k).to(log_p.dtype)).sum(0) for k in range(1, n + 1)]
    orders = []
    for order in permutations(range(n)):
        total, gone = torch.zeros_like(chosen[0]), torch.zeros_like(chosen[0])
        for k in order:
            total = total + chosen[k] - torch.log1p(-gone.clamp(max=1 - 1e-7))
            gone = gone + chosen[k].exp()
        orders.append(total)
    return torch.stack(orders).logsumexp(0)


class MaskPro(LearnedMasks):
    """Logits per weight, trained by the loss of drawn masks."""

    plain = (*TrainedMethod.plain, "average")

    def __init__(self, config: MaskProConfig, weights: Sequence[MaskedWeight]):
        super().__init__(config, weights)
        self.first: dict[str, Tensor] = {}
        self.average = 0.0
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        for w in self.weights:
            self.first[w.fqn] = self._first_mask(w)
            self.logits[w.fqn] = nn.Parameter(self.config.certainty * self.first[w.fqn].float())
        for w in self.weights:  # the first step looks at the first mask itself
            w.mask.copy_(from_groups(self.first[w.fqn], w.dim))

    @torch.no_grad()
    def _draw(self) -> None:
        for w in self.weights:  # the N largest of logit + Gumbel noise are N draws without replacement
            logits = self.logits[w.fqn]
            drawn = hard_mask(logits - (-self._uniform(logits).log()).log(), self.pattern)
            w.mask.copy_(from_groups(drawn, w.dim))

    def optimizer(self, parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
        del options  # plain gradient steps, at a rate of their own
        return torch.optim.SGD(parameters, lr=self.config.logit_lr)

    def observe(self, loss: Tensor, again: Callable[[], Tensor]) -> None:
        """One term of the policy gradient: (loss - the first mask's loss - its average) d log P / d logits."""
        drawn = {w.fqn: w.mask.clone() for w in self.weights}
        with torch.no_grad():
            for w in self.weights:
                w.mask.copy_(from_groups(self.first[w.fqn], w.dim))
            residual = mean_of_processes(loss - again())  # the mask and its likelihood are the same on all
            for w in self.weights:
                w.mask.copy_(drawn[w.fqn])
        self.average = self.config.memory * self.average + (1 - self.config.memory) * residual
        for w in self.weights:
            logits = self.logits[w.fqn]
            mask = to_groups(drawn[w.fqn], self.pattern, w.dim)
            with torch.enable_grad():
                likely = log_probability(logits, mask, self.pattern.n).sum()
            (mine,) = torch.autograd.grad(likely, logits)
            mine = mine * (residual - self.average)
            logits.grad = mine if logits.grad is None else logits.grad + mine

    def _likeliest(self, w: MaskedWeight) -> Tensor:
        return hard_mask(self.logits[w.fqn], self.pattern)

    def held(self) -> dict[str, dict[str, Tensor]]:
        return {**super().held(), "first": self.first}
