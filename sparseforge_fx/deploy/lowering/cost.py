"""The cost gate: weights timed in their formats on the machine that will run them; packed stays where it wins."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from sparseforge_fx.deploy.lowering.cost_table import Shape, Table, Timing, load_table
from sparseforge_fx.deploy.lowering.measure import measure
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import DENSE, PACKED, Format
from sparseforge_fx.kernels.layouts import Layout, layouts_of
from sparseforge_fx.progress import counted

#: token counts (batch x sequence) that matter where nobody says others: decoding, small batches, a prompt
TOKENS = (1, 8, 64, 2048)
NOISE = 0.03  # a ratio within 3 % of one is neither a gain nor a loss


def check_request(
    tokens: Sequence[int] | None, table: str | Path | Table | None, untimed: str | None = None
) -> tuple[Sequence[int], Table | None]:
    """The token counts, :data:`TOKENS` where none are given, and the table, read if it is a file.

    Args:
        untimed: what packs all weights without asking, ``gate=False``; None: they are timed.

    Raises SparseForgeError if ``tokens`` is not a list of token counts, or what would be asked is given beside
    ``untimed``.
    """
    for name, given in (("tokens", tokens), ("table", table)):
        if untimed is not None and given is not None:
            raise SparseForgeError(f"{name} is for timing, and {untimed} packs all 2:4 weights untimed: leave it out")
    if tokens is None:
        tokens = TOKENS
    counts = tokens if isinstance(tokens, Iterable) else [tokens]
    if not counts or not all(isinstance(count, int) and count >= 1 for count in counts):
        raise SparseForgeError(f"tokens is {tokens!r}: give a list of token counts of at least 1")
    return tokens, load_table(table) if isinstance(table, str | Path) else table


def unasked(tokens: Sequence[int] | None, table: str | Path | Table | None, left: bool) -> list[str]:
    """What to say of a request where no weights are ``left`` to be timed."""
    given = [] if left else [name for name, value in (("tokens", tokens), ("table", table)) if value is not None]
    return [f"{name} is given and not used: all 2:4 linears are packed already" for name in given]


def timings(
    shapes: Iterable[Shape],
    tokens: Sequence[int],
    device: torch.device,
    layouts: Sequence[Layout],
    known: Table | None,
) -> Table:
    """What the table knows of these shapes, and of their rivals, or, without a table, what is measured now: stacks of
    experts on CPUs alone, as a product that asks for its offsets fits no CUDA graph."""
    wanted = dict.fromkeys(s for shape in shapes for s in (shape, shape.rival) if s is not None)
    if known is not None:
        return {shape: known.get(shape, {}) for shape in wanted}
    by_size: dict[tuple, list[Shape]] = {}
    for shape in wanted:
        if shape.routing is None or device.type == "cpu":
            by_size.setdefault((*shape[:3], shape.routing), []).append(shape)
    found: Table = {}
    with counted("timing products", len(by_size)) as advance:
        for together in by_size.values():
            found |= measure(together, tokens, device, layouts)
            advance()
    return {shape: found.get(shape, {}) for shape in wanted}


def formats_of(device: torch.device) -> tuple[Format, ...]:
    """All that there are kernels for on this device, beside dense in the model's own dtype."""
    layouts = layouts_of(device)
    return tuple(form for form in PACKED if any(layout.knows(form) for layout in layouts))


def gains(table: Table, shape: Shape, layout: str, rival: Shape | None) -> dict[int, float]:
    """By tokens: how many times as fast a weight is as the best dense one of the rival's bits, or without one as that
    of the model's own dtype."""
    rows = table.get(shape, {}).get(layout, {})
    if rival is None:
        return {tokens: row.ratio for tokens, row in rows.items()}
    rivals = table.get(rival, {}).values()
    best = {t: min(by_tokens[t].packed_us for by_tokens in rivals if t in by_tokens) for r in rivals for t in r}
    return {tokens: best[tokens] / row.packed_us for tokens, row in rows.items() if tokens in best}


def verdict(ratios: dict[int, float], tokens: Sequence[int], rival: str = "dense") -> str | None:
    """None where the weight wins: faster at one of the token counts, slower at none. Otherwise the reason against."""
    missing = [t for t in tokens if t not in ratios]
    if missing:
        return f"not measured at {', '.join(map(str, missing))} tokens"
    worst = min(tokens, key=ratios.__getitem__)
    best = max(tokens, key=ratios.__getitem__)
    if ratios[worst] < 1 - NOISE:
        return f"slower than {rival} at {worst} tokens ({ratios[worst]:.2f}x)"
    if ratios[best] <= 1 + NOISE:
        return f"no faster than {rival} (at best {ratios[best]:.2f}x, at {best} tokens)"
    return None


def choose(
    table: Table, shape: Shape, layouts: Sequence[Layout], tokens: Sequence[int]
) -> tuple[Layout, None] | tuple[None, str]:
    """The layout that gains most over all token counts (geometric mean) among those that :func:`verdict` lets pass;
    without one, the reasons against all."""
    known = [layout for layout in layouts if layout.name in table.get(shape, {})] or list(layouts[:1])
    rival = shape.rival
    if rival is not None and not any(layout.knows(rival.format) for layout in layouts):
        rival = None  # nobody could take it instead on this device
    ratios = {layout.name: gains(table, shape, layout.name, rival) for layout in known}
    beside = str(DENSE if rival is None else rival.format)
    reasons = {name: verdict(found, tokens, beside) for name, found in ratios.items()}
    passing = [layout for layout in known if reasons[layout.name] is None]
    if passing:
        mean = {o.name: statistics.geometric_mean(ratios[o.name][t] for t in tokens) for o in passing}
        return max(passing, key=lambda layout: mean[layout.name]), None
    said = reasons.items()
    return None, "; ".join(f"{name}: {reason}" for name, reason in said) if len(said) > 1 else str(reasons.popitem()[1])


def of_one_layout(found: Iterable[dict[int, Timing]], tokens: Sequence[int]) -> dict[int, Timing]:
    """Of a weight's layouts that which takes least (geometric mean): it is kept in one for all token counts."""
    return min(found, key=lambda by: statistics.geometric_mean(by[t].packed_us for t in tokens))
