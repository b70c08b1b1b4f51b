"""The four curvature estimators, and the running average they feed.

    gauss_newton      (g^2)^T (x^2) per token; one extra GEMM on probe steps; compiles. The default.
    activation        E[x_j^2], the same for every row (Wanda's and OBD's layer-wise curvature).
    squared_gradient  the batch gradient, squared.
    hutchinson        E[v * (H v)], v Rademacher: the paper's; double backward, math attention, uncompiled.

The first two come out of probes (passes/insert_hessian_hooks.py), the third out of the weights' gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Estimator = Literal["gauss_newton", "activation", "squared_gradient", "hutchinson"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)


class Curvature:
    """h <- beta h + (1 - beta) h_hat for every weight; the first estimate is taken whole.

    ``values[name]`` is [out, in] (or [in, 1]-broadcastable for ``activation``), of the weight's dtype (float32 for
    float16), >= 0.
    """

    def __init__(self, beta: float, estimator: Estimator | None = "gauss_newton"):
        self.beta = beta
        self.estimator = estimator  # None: nothing is ever estimated
        self.values: dict[str, Tensor] = {}
        self.average: Callable[[Tensor], Tensor] | None = (
            None  # over processes, where there are several: all must choose alike
        )

    @torch.no_grad()
    def fold(self, name: str, estimate: Tensor, dtype: torch.dtype | None = None) -> None:
        """Take one estimate in, kept in ``dtype`` (default: its own). Negative entries (Hutchinson's noise) count
        as zero at once, not in the average: of a short average many entries are below zero too, and those
        weights would go whatever their size (docs/measurements.md, `hutchinson-signed`)."""
        dtype = dtype or estimate.dtype
        if self.average is not None:
            estimate = self.average(estimate)
        # clamp copies: what is kept is never the caller's tensor
        estimate = estimate.detach().clamp(min=0).to(torch.float32 if dtype == torch.float16 else dtype)
        if name in self.values:
            self.values[name].lerp_(estimate, 1 - self.beta)
        else:
            self.values[name] = estimate


def fold_on_backward(probes: Mapping[str, Tensor], curvature: Curvature) -> list:
    """Let every probe hand its gradient to ``curvature`` as soon as it is complete and free it at once; returns the
    hooks."""

    def fold(probe: Tensor, name: str) -> None:
        assert probe.grad is not None
        curvature.fold(name, probe.grad)
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


def sample_labels(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Labels [...] drawn from the model's own distribution: with them gauss_newton estimates the true Fisher."""
    flat = logits.detach().float().flatten(0, -2).softmax(-1)
    return torch.multinomial(flat, 1, generator=generator)[:, 0].reshape(logits.shape[:-1])
