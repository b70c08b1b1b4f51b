"""What masks that move could gain by what gradients say: swaps inside the groups of an N:M model, predicted, then made.

    python examples/benchmarks/swap_gains.py DENSE SPARSE --data text.jsonl --valid valid.txt [--label NAME]

SPARSE is a plain folder of an N:M model, DENSE the model that it was made of, which teaches. At SPARSE's weights the mean
gradient g of the run's loss (over ``--sequences``) and the diagonal h of its Fisher matrix (labels drawn from the model; of
rank one over rows and columns, as single entries are noise) say what a swap is worth, as in optimal brain damage and its inverse:

    to add a pruned weight at its best value -g / h gains     g^2 / 2h
    to drop one that survives costs                            h w^2 / 2

In every group the best one that is pruned and the cheapest one that survives are compared; no new value is larger than the
median survivor's. Gradients are noisy, and the largest of many are noise above all: swaps are chosen by one half of the
sequences, what they are predicted to gain is said by the other. Then they are made, the best first, one by one and many at
once, no training behind them, and the loss of --valid is measured; beside it the same drops without the additions, and as
many drops by magnitude.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from common import language_model, save, token_ids, use
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel

from sparseforge_fx.data.tokens import tokenize
from sparseforge_fx.pattern import check_pattern, from_groups, parse_pattern, to_groups

SHARES = (0.0001, 0.001, 0.01)  # of all groups, that are swapped
SINGLES = 8  # swaps that are made one by one
FLOOR = 0.01  # of the mean of h: an input that hardly ever comes is no cheap place
Values = dict[str, Tensor]


def main(
    dense: str,
    sparse: str,
    data: Annotated[str, typer.Option(help="text source of the gradients")],
    valid: Annotated[Path, typer.Option(help="text that is scored", exists=True)],
    sequences: Annotated[int, typer.Option(min=2, help="half choose, half judge")] = 64,
    length: int = 512,
    windows: Annotated[int, typer.Option(help="of --length tokens, that are scored")] = 32,
    task: Annotated[float, typer.Option(help="what cross-entropy weighs beside the KL")] = 1.0,
    pattern: str = "2:4",
    threads: int = 0,
    label: str = "",
) -> None:
    """Measure one model; results/swap_gains/LABEL.json."""
    use(threads=threads)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    net, teacher = language_model(sparse, torch.float32), language_model(dense, torch.float32)
    shape = parse_pattern(pattern)
    weights = {f"{name}.weight": m.weight for name, m in net.named_modules() if isinstance(m, nn.Linear)}
    weights = {n: w for n, w in weights.items() if check_pattern(w != 0, shape) and bool((w == 0).any())}
    if not weights:
        raise typer.BadParameter(f"{sparse} has no linear that is {pattern}")
    corpus = tokenize(data, tokenizer, length=length, tokens=sequences * length)
    ids = [corpus.batch(k, 1, 0)["input_ids"] for k in range(sequences)]
    seen = observe(net, teacher, weights, ids, task)
    groups = {n: Swaps.of(w.detach(), seen, n, task + 1, shape) for n, w in weights.items()}
    text = token_ids(valid, tokenizer)
    scored = [text[k * length : (k + 1) * length][None] for k in range(windows)]
    record: dict[str, Any] = {
        "label": label or Path(sparse).name, "model": Path(dense).name, "sparse": Path(sparse).name, "data": Path(data).name,
        "sequences": sequences, "length": length, "windows": windows, "task": task,
        "pattern": pattern, "weights": len(weights),
        **summary(groups), "dense": held_out(teacher, teacher, scored), "before": held_out(net, teacher, scored),
        "singles": [], "after": {},
    }  # fmt: skip
    for rank in range(SINGLES):
        with changed(weights, groups, "swapped", rank, rank + 1) as told:
            record["singles"].append(told | held_out(net, teacher, scored))
    for share in SHARES:
        count = max(1, round(share * record["groups"]))
        for kind in ("swapped", "dropped", "smallest"):
            with changed(weights, groups, kind, 0, count) as told:
                record["after"].setdefault(str(share), {})[kind] = told | held_out(net, teacher, scored)
                print(share, kind, record["after"][str(share)][kind], flush=True)
    save("swap_gains", record["label"], record)


class Seen(NamedTuple):
    """Sums over the sequences of either half, by weight: gradients, their squares (of all), and the Fisher diagonal."""

    halves: tuple[Values, Values]
    squares: Values
    fisher: Values
    count: int


def observe(net: PreTrainedModel, teacher: PreTrainedModel, weights: Values, ids: list[Tensor], task: float) -> Seen:
    """Gradients of the loss, and of that of drawn labels, sequence by sequence."""
    first, second, squares, drawn = ({n: torch.zeros_like(w, requires_grad=False) for n, w in weights.items()} for _ in range(4))  # fmt: skip
    found = Seen((first, second), squares, drawn, len(ids))
    net.requires_grad_(False)
    for w in weights.values():
        w.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    for index, batch in enumerate(ids):
        total, _ = loss(net, teacher, batch, task)
        for name, g in zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True):
            found.halves[index % 2][name].add_(g)
            found.squares[name].addcmul_(g, g)
        total, _ = loss(net, teacher, batch, 1.0, drawn=generator)
        answers = batch[:, 1:].numel()  # the square of a mean over so many independent ones is so many times too small
        for name, g in zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True):
            found.fisher[name].addcmul_(g, g, value=answers)
        print(f"sequence {index + 1} of {len(ids)}", flush=True)
    return found


def loss(
    net: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor, task: float, drawn: torch.Generator | None = None
) -> tuple[Tensor, dict[str, float]]:
    """``task`` times the cross-entropy plus the KL, per token, and its parts. ``drawn``: the cross-entropy alone, of
    labels that the model draws."""
    own = net(ids).logits[:, :-1].float().log_softmax(-1)
    if drawn is not None:
        labels = torch.multinomial(own.detach().exp().flatten(0, 1), 1, generator=drawn).view(own.shape[:-1])
        return F.nll_loss(own.flatten(0, 1), labels.flatten()), {}
    with torch.no_grad():
        aim = teacher(ids).logits[:, :-1].float().log_softmax(-1)
    entropy = F.nll_loss(own.flatten(0, 1), ids[:, 1:].flatten())
    kl = F.kl_div(own, aim, log_target=True, reduction="none").sum(-1).mean()
    return task * entropy + kl, {"task": entropy.item(), "kl": kl.item()}


class Swaps(NamedTuple):
    """Of one weight, by its groups [..., M] or [...]: which place may come in at which value, and which may go."""

    value: Tensor  # [groups, M]
    add: Tensor  # index
    new: Tensor  # the value there
    drop: Tensor  # index
    cost: Tensor  # of the drop
    gain: Tensor  # of the addition, by the half that chose
    judged: Tensor  # the same by the other half
    signal: float  # sum over pruned of g g' / 2h: what all of them would gain, without noise's part
    noisy: float  # mean over pruned of g^2 in units of its noise: 1 is noise alone
    smallest: Tensor  # index of the survivor of least size

    def sizes(self) -> Tensor:
        return self.value.gather(-1, self.smallest[..., None])[..., 0].abs()

    @classmethod
    def of(cls, weight: Tensor, seen: Seen, name: str, scale: float, shape: Any) -> Swaps:
        """``scale``: how many times the Fisher matrix the loss's curvature is: once for each of its parts."""
        half = seen.count / 2
        first, second = (seen.halves[k][name] / half for k in (0, 1))
        h = seen.fisher[name] * (scale / seen.count)
        h = h.mean(1, keepdim=True) * (h.mean(0) / h.mean())  # of rank one, as K-FAC's: single entries are noise
        h = h + FLOOR * h.mean()
        most = weight[weight != 0].abs().median()
        value, one, two, h = (to_groups(t, shape) for t in (weight, first, second, h))
        noise = to_groups(seen.squares[name], shape) / seen.count / half  # of the mean of a half
        kept = value != 0
        share = (1 - noise / one.square().clamp(min=1e-38)).clamp(min=0)  # of g^2, that is no noise
        new = (-one / h * share).clamp(-most, most)
        gain = torch.where(kept, -torch.inf, -(one * new + h * new.square() / 2))
        best, add = gain.max(-1)
        at = add[..., None]
        new = new.gather(-1, at)[..., 0]
        cost, drop = torch.where(kept, h * value.square() / 2, torch.inf).min(-1)
        judged = -(two.gather(-1, at)[..., 0] * new + h.gather(-1, at)[..., 0] * new.square() / 2)
        judged = judged + (two * value).gather(-1, drop[..., None])[..., 0]  # its drop's first order, too
        pruned = ~kept
        return cls(
            value, add, new, drop, cost, best, judged, ((one * two) / (2 * h))[pruned].sum().item(),
            (one.square() / noise.clamp(min=1e-38))[pruned].mean().item(), torch.where(kept, value.abs(), torch.inf).argmin(-1),
        )  # fmt: skip


def summary(groups: Mapping[str, Swaps]) -> dict[str, Any]:
    """Over all groups: how many swaps pay as they were chosen, what they are predicted to gain by either half, and
    quantiles of gains, costs, and sizes."""

    def all_of(field: str) -> Tensor:
        return torch.cat([getattr(s, field).flatten() for s in groups.values()])

    gain, cost, judged, new = (all_of(f) for f in ("gain", "cost", "judged", "new"))
    kept = torch.cat([s.value[s.value != 0].abs().flatten() for s in groups.values()])
    pays = gain > cost

    def quantiles(values: Tensor) -> dict[str, float]:
        ordered = values[:: max(1, len(values) // 1_000_000)].sort().values
        return {str(q): ordered[min(len(ordered) - 1, int(q * len(ordered)))].item() for q in (0.01, 0.5, 0.99)}

    return {
        "groups": len(gain), "paying": int(pays.sum()), "chosen_gain": (gain - cost)[pays].sum().item(),
        "judged_gain": (judged - cost)[pays].sum().item(), "all_additions": sum(s.signal for s in groups.values()),
        "gradient_over_noise": sum(s.noisy for s in groups.values()) / len(groups),
        "gain": quantiles(gain), "cost": quantiles(cost), "new": quantiles(new.abs()), "kept": quantiles(kept),
    }  # fmt: skip


@contextmanager
def changed(weights: Values, groups: Mapping[str, Swaps], kind: str, first: int, end: int) -> Iterator[dict[str, Any]]:
    """Inside, the groups of these ranks have one survivor less: the cheapest, which a pruned weight replaces
    (``swapped``) or not (``dropped``), or the ``smallest``."""
    before = {n: w.detach().clone() for n, w in weights.items()}
    worth = {n: -s.sizes() if kind == "smallest" else s.gain - s.cost for n, s in groups.items()}
    ordered = torch.cat([v.flatten() for v in worth.values()]).sort(descending=True).values
    predicted = 0.0
    with torch.no_grad():
        for name, s in groups.items():
            here = (worth[name] <= ordered[first]) & (worth[name] >= ordered[end - 1])
            drop = s.smallest if kind == "smallest" else s.drop
            value = s.value.scatter(-1, drop[..., None], 0.0)
            if kind == "swapped":
                value = value.scatter(-1, s.add[..., None], s.new[..., None])
                predicted += (s.judged - s.cost)[here].sum().item()
            weights[name].copy_(from_groups(torch.where(here[..., None], value, s.value)))
    yield {"groups": end - first} | ({"predicted_gain": predicted} if kind == "swapped" else {})
    with torch.no_grad():
        for name, w in weights.items():
            w.copy_(before[name])


@torch.no_grad()
def held_out(net: PreTrainedModel, teacher: PreTrainedModel, windows: list[Tensor]) -> dict[str, float]:
    """Cross-entropy and KL in nats per token."""
    parts = [loss(net, teacher, ids, 1.0)[1] for ids in windows]
    return {key: sum(p[key] for p in parts) / len(parts) for key in ("task", "kl")}


if __name__ == "__main__":
    typer.run(main)
