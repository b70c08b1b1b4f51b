"""AdamW with a term for masked weights that joins after the first moment: AST's and CAST's optimizers.

    u <- beta1 u + (1 - beta1) g        u~ = u + term        v <- beta2 v + (1 - beta2) u~^2
    w <- w - lr wd w - lr (u~ / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

The term never enters u, so that it does not outlive a mask that lets the weight go; it does enter v, which both papers
take from u~ instead of g, for kept weights too. Parameters without a mask get AdamW's own update.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseforge_fx.methods.weights import MaskedWeight


def decay_groups(parameters: Sequence[nn.Parameter], weight_decay: float = 0.0, **options: Any) -> list[Any]:
    """What an optimizer takes: the parameters, in two groups where there is a weight decay: vectors have none."""
    del options
    vectors = [p for p in parameters if p.dim() < 2]
    if not weight_decay or not vectors:
        return list(parameters)
    matrices = [p for p in parameters if p.dim() >= 2]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


class MaskedAdamW(torch.optim.Optimizer):
    """The update above; a subclass says what the term is. Parameters without a mask get AdamW's update.

    Args:
        parameters: tensors; vectors get no weight decay.
        weights: which of them have masks; a mask is read when a step is made, so it may change in between.
        lr, betas, eps, weight_decay: as of torch.optim.AdamW.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        weights: Sequence[MaskedWeight],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        groups = decay_groups(parameters, weight_decay)
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._masked = {id(w.weight): w for w in weights}

    @abstractmethod
    def masked_update(self, weight: Tensor, mask: Tensor, first_moment: Tensor) -> Tensor:
        """u~ of a weight with a mask (1: kept), a tensor of its own."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; as of any torch optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                t = int(state["step"])
                first, second = state["exp_avg"], state["exp_avg_sq"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                first.lerp_(p.grad, 1 - beta1)
                owner = self._masked.get(id(p))
                if owner is None:
                    update = first
                    second.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                else:
                    update = self.masked_update(p, owner.mask, first)
                    second.mul_(beta2).addcmul_(update, update, value=1 - beta2)
                scale = (second / (1 - beta2**t)).sqrt_().add_(group["eps"])
                p.addcdiv_(update, scale, value=-group["lr"] / (1 - beta1**t))
        return loss


class AnnealedDecayAdamW(MaskedAdamW):
    """AST's optimizer: u~ = u + lambda (1 - m) w (arXiv 2407.20584, eqs. 20-23).

    ``decay`` is asked for lambda at every step. (The released code computes ~mask of an integer mask, which makes the
    term -lambda w on pruned and -2 lambda w on kept weights; the paper's sign is meant here.)
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        weights: Sequence[MaskedWeight],
        decay: Callable[[], float],
        **options: Any,
    ):
        super().__init__(parameters, weights, **options)
        self._decay = decay

    def masked_update(self, weight: Tensor, mask: Tensor, first_moment: Tensor) -> Tensor:
        return first_moment.addcmul(1 - mask.to(weight.dtype), weight, value=self._decay())


class AdamS(MaskedAdamW):
    """CAST's optimizer: u~ = u if kept, else (1 - a) u + a lambda sign(w), a = t / T (arXiv 2509.25996).

    An L1 decay whose share in the step grows with the run: at its end, pruned candidates feel nothing but the decay.
    ``share`` is asked for a at every step; ``l1`` is lambda.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        weights: Sequence[MaskedWeight],
        share: Callable[[], float],
        l1: float,
        **options: Any,
    ):
        super().__init__(parameters, weights, **options)
        self._share, self._l1 = share, l1

    def masked_update(self, weight: Tensor, mask: Tensor, first_moment: Tensor) -> Tensor:
        share = self._share()
        pruned = first_moment.mul(1 - share).add_(weight.sign(), alpha=share * self._l1)
        return torch.where(mask.bool(), first_moment, pruned)
