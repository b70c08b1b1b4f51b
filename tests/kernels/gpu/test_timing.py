"""Replays of a CUDA graph."""

import gc

import pytest
import torch

from sparseforge_fx.kernels.gpu.timing import Replays


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_a_graph_reads_is_kept_as_long_as_the_graph():
    places = torch.zeros(1 << 20, dtype=torch.long, device="cuda")
    table, out = torch.ones(1, device="cuda"), torch.empty(1 << 20, device="cuda")
    run = Replays([lambda places=places: torch.index_select(table, 0, places, out=out)])
    del places
    gc.collect()
    torch.full((1 << 20,), 1 << 40, device="cuda")  # would take the indices' place
    assert run.seconds(3) > 0 and out.eq(1).all()
