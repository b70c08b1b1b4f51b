"""Does a value that was read from a file fit?"""

import copy

import torch

from sparseforge_fx.methods.misfit import misfit


def test_misfit_names_the_place():
    wanted = {"a": [torch.zeros(2), 1.0], "b": {"c": "x"}}
    assert misfit(copy.deepcopy(wanted), wanted, "state") is None
    assert misfit({"a": [torch.zeros(2), 1], "b": {"c": "y"}}, wanted, "state") is None
    assert misfit({"a": [torch.zeros(3), 1.0], "b": {"c": "x"}}, wanted, "state") == (
        "state[a][0] is float32 [3] instead of float32 [2]"
    )
    assert misfit({"a": [torch.zeros(2), 1.0], "b": {}}, wanted, "state") == "state[b] lacks c"
    assert misfit({"a": wanted["a"], "b": {"c": 1}}, wanted, "state") == "state[b][c] is of type int instead of str"
