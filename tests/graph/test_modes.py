"""eval_mode: eval inside, and each module's own mode again afterwards."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from sparseforge_fx.graph.modes import eval_mode


class Merging(nn.Linear):
    """Does more than note its mode, as some adapters do."""

    merged = False

    def train(self, mode: bool = True):
        self.merged = not mode
        return super().train(mode)


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_every_module_gets_its_own_mode_back(error):
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval(), Merging(2, 2))
    with pytest.raises(error) if error else nullcontext(), eval_mode(model):
        assert not any(m.training for m in model.modules()) and model[2].merged
        if error:
            raise error
    assert [m.training for m in model.modules()] == [True, True, False, True] and not model[2].merged


def test_a_graph_that_refuses_to_change():
    graph = torch.export.export(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval(), (torch.ones(1, 2),)).module()
    modes = [m.training for m in graph.modules()]
    with pytest.raises(NotImplementedError):
        graph.eval()
    with eval_mode(graph):
        graph(torch.ones(1, 2))
    assert [m.training for m in graph.modules()] == modes
