"""The five curvature estimators, and the running average they feed.

    gauss_newton      (g^2)^T (x^2) per token, g the gradient of the run's own loss; one extra GEMM on probe steps;
                      compiles. The default.
    fisher            the same with labels drawn from the model itself: the true Fisher, per answer; one further forward
                      and backward pass on probe steps.
    activation        E[x_j^2], the same for every row (Wanda's and OBD's layer-wise curvature).
    squared_gradient  the batch gradient, squared.
    hutchinson        |v * (H v)|, v Rademacher: the paper's; double backward, math attention, uncompiled.

The first three are sums over tokens that come out of probes (passes/insert_hessian_hooks.py), by micro-batch.
The others are made of something with a sign, which is averaged over micro-batches and processes before it is squared,
or before its absolute value is taken: they then are what one process with one large batch estimates. Hutchinson's noise
is thousands of times the diagonal, so of few probes half of all averages are below zero whatever the diagonal: to cut
them, one by one or on average, prunes blindly (docs/measurements.md). The mean absolute value grows with the norm of
the Hessian's row instead, and is never zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Estimator = Literal["gauss_newton", "fisher", "activation", "squared_gradient", "hutchinson"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
#: estimator -> the kind of probe that it comes out of; the others need none
PROBES = {"gauss_newton": "gauss_newton", "fisher": "gauss_newton", "activation": "activation"}
DRAWN = ("fisher", "hutchinson")  # the estimators of labels, or vectors, that are drawn


class Curvature:
    """h <- beta h + (1 - beta) h_hat for every weight; the first estimate is taken whole, or h starts at zero.

    ``values[name]`` is [out, in] (or [in, 1]-broadcastable for ``activation``), of the weight's dtype (float32 for
    float16), >= 0, and the same on all processes after :meth:`close`. ``tokens[name]`` says of a stack how many tokens
    of all processes each expert's estimates are of; it is filled by whoever probes (training/expert_counters.py).
    """

    def __init__(
        self,
        beta: float,
        estimator: Estimator | None = "gauss_newton",
        vectors: int = 1,
        start: Literal["first", "zero"] = "first",
    ):
        self.beta = beta
        self.first_weight = 1.0 if start == "first" else 1 - beta
        self.estimator = estimator  # None: nothing is ever estimated
        self.vectors = vectors  # random ones of a hutchinson probe
        self.values: dict[str, Tensor] = {}
        self.tokens: dict[str, list[int]] = {}
        self._open: dict[str, float] = {}  # what a further part of this step's estimate weighs

    @torch.no_grad()
    def fold(self, name: str, estimate: Tensor, dtype: torch.dtype | None = None) -> None:
        """Take one step's whole estimate in, >= 0, kept in ``dtype`` (default: its own)."""
        self._open.pop(name, None)
        self.add(name, estimate, dtype)
        del self._open[name]

    @torch.no_grad()
    def add(self, name: str, part: Tensor, dtype: torch.dtype | None = None) -> None:
        """As :meth:`fold`, of one of several parts (a micro-batch, a random vector) that are summed until
        :meth:`close`."""
        dtype = dtype or part.dtype
        part = part.detach().to(torch.float32 if dtype == torch.float16 else dtype)
        if name not in self.values:
            self._open[name] = self.first_weight
            self.values[name] = part * self.first_weight  # never the caller's tensor
        elif name in self._open:
            self.values[name].add_(part, alpha=self._open[name])
        else:
            self._open[name] = 1 - self.beta
            self.values[name].lerp_(part, 1 - self.beta)

    @torch.no_grad()
    def add_signed(self, parts: Mapping[str, Tensor], weights: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Take in what this process knows of something with a sign (of any subset of ``weights``): gradients for
        ``squared_gradient``, v * (H v) for ``hutchinson``. Every process calls it with the same ``weights``."""
        finish = Tensor.square if self.estimator == "squared_gradient" else Tensor.abs
        for name, mean in mean_over_processes(parts, weights):
            self.add(name, finish(mean) * scale, weights[name].dtype)

    @torch.no_grad()
    def close(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """The step's estimate is complete: bring what the probes folded to its mean over the processes. An average of
        averages is the average over all; once a step, in one order, whichever weights saw a token on which process.

        ``weights``: what has a curvature, by name, of the shape of its value. Every process gives the same. None: what
        came in were means over all.
        """
        if weights is not None and self.estimator in PROBES and processes() > 1:
            for name, mean in mean_over_processes(self.values, weights):
                dtype = self.values[name].dtype if name in self.values else weights[name].dtype
                self.values[name] = mean.to(dtype)
        self._open.clear()


def processes() -> int:
    """How many share the data: the size of torch.distributed's default group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_of_processes(value: Tensor) -> float:
    """The mean of what each process has of a number."""
    if processes() > 1:
        value = value.detach().double()
        dist.all_reduce(value)
        value /= processes()
    return float(value)


def mean_over_processes(values: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 mean) of what any process has, one at a time; who lacks it counts as zeros. What nobody has is
    left out. ``weights`` gives names, shapes and the device, alike on every process."""
    count = processes()
    if count == 1:
        yield from ((name, values[name].float()) for name in weights if name in values)
        return
    device = next(iter(weights.values())).device
    known = torch.tensor([name in values for name in weights], dtype=torch.int32, device=device)
    dist.all_reduce(known, dist.ReduceOp.MAX)
    for (name, weight), somewhere in zip(weights.items(), known.tolist(), strict=True):
        if somewhere:
            mine = values.get(name)
            total = torch.zeros(weight.shape, device=device) if mine is None else mine.detach().float().clone()
            dist.all_reduce(total)
            yield name, total.div_(count)


def scale_of(curvature: Curvature) -> float:
    """What makes the mean over processes of what probes say the sum that one process has of all their micro-batches:
    its losses would be so many times smaller, and their squares come in."""
    return {"gauss_newton": 1 / processes(), "activation": processes()}.get(curvature.estimator or "", 1)


def fold_on_backward(probes: Mapping[str, Tensor], curvature: Curvature) -> list:
    """Let every probe hand its gradient to ``curvature`` as soon as it is complete and free it at once; returns the
    hooks."""
    scale = scale_of(curvature)

    def fold(probe: Tensor, name: str) -> None:
        assert probe.grad is not None
        curvature.add(name, probe.grad if scale == 1 else probe.grad * scale)
        probe.grad = None

    return [p.register_post_accumulate_grad_hook(lambda p, n=name: fold(p, n)) for name, p in probes.items()]  # type: ignore[misc]


def hutchinson_diagonal(
    loss: Callable[[], Tensor],
    weights: Mapping[str, Tensor],
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Diagonal of the loss's Hessian by weight: mean over ``samples`` of v * (H v), v in {-1, 1}.

    Args:
        loss: computes the scalar loss from ``weights`` (which require grad); called once, under math attention, as
            fused attention has no second derivative.

    Returns tensors of the weights' shapes, unbiased, possibly negative; weights that have no part in the loss are
    left out. Each sample costs a backward through the backward.
    Source: Hutchinson's estimator as in arXiv 2605.06402, section 3.
    """
    names, tensors = list(weights), list(weights.values())
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        grads = torch.autograd.grad(loss(), tensors, create_graph=True, allow_unused=True)
        total = {
            n: torch.zeros_like(g, dtype=torch.float32) for n, g in zip(names, grads, strict=True) if g is not None
        }
        for index in range(samples):
            signs = [
                torch.randint(0, 2, t.shape, generator=generator, device=t.device).mul_(2).sub_(1).to(t.dtype)
                for t in tensors
            ]
            inner = sum((g.float() * v.float()).sum() for g, v in zip(grads, signs, strict=True) if g is not None)
            if not isinstance(inner, Tensor) or not inner.requires_grad:  # a loss that is linear in the weights
                break
            products = torch.autograd.grad(inner, tensors, retain_graph=index + 1 < samples, allow_unused=True)
            for name, v, hv in zip(names, signs, products, strict=True):
                if hv is not None and name in total:
                    total[name] += (v * hv).float() / samples
    return total
