"""Seconds of calls on a GPU, as replays of one CUDA graph: what Python does between launches is not in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class Replays:
    """A graph of several calls, usually one for each copy of a weight, which together exceed the caches."""

    def __init__(self, calls: Sequence[Callable[[], object]]):
        for call in (calls[0], calls[-1]):
            call()  # compile, and let libraries allocate, outside the capture
        torch.cuda.synchronize()
        self.calls = calls  # a graph does not keep what its kernels read
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()
        self.seconds()

    def seconds(self, replays: int = 1) -> float:
        """Of one call, the mean over so many replays of the graph."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (replays * len(self.calls))
