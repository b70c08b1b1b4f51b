"""A picture of a model's linears: their bytes, dense and sparse."""

from __future__ import annotations

import io
from collections.abc import Sequence


def draw(bars: Sequence[tuple[str, float, float, str]], pattern: str) -> str:
    """An SVG file's text.

    Args:
        bars: (weights, megabytes dense, megabytes sparse, what stands beside them); of those that stay dense both
            numbers are the same.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.42 * len(bars)), layout="constrained")
    axis = figure.subplots()
    names, dense, sparse, told = zip(*bars, strict=True) if bars else ((), (), (), ())
    stays = [before == after for before, after in zip(dense, sparse, strict=True)]
    axis.barh(names, dense, color=["#b9bcc4" if s else "#c9dcf2" for s in stays], label="dense, bf16")
    axis.barh(names, [0 if s else v for s, v in zip(stays, sparse, strict=True)], color="#1d5fa8", label=pattern)
    for place, (value, text) in enumerate(zip(dense, told, strict=True)):
        axis.annotate(text, (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel("MB")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8)
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "linears", "font.family": "sans-serif"}):
        metadata = {"Date": None, "Title": f"Linears of a model, {pattern}"}
        figure.savefig(written, format="svg", bbox_inches="tight", metadata=metadata)
    return written.getvalue()
