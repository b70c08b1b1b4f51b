"""AST's and CAST's updates against their equations, worked out by hand, and against torch's AdamW where they meet."""

import copy

import pytest
import torch
from torch import nn

from sparseforge_fx.methods.optimizers import AdamS, AnnealedDecayAdamW
from sparseforge_fx.methods.weights import MaskedWeight


def masked(values, mask):
    weight = nn.Parameter(torch.tensor(values, dtype=torch.float64))
    return weight, MaskedWeight("w", weight, torch.tensor(mask, dtype=torch.float64), 1)


def run(optimizer, weight, gradients):
    path = []
    for g in gradients:
        weight.grad = torch.full_like(weight, g)
        optimizer.step()
        path.append(weight.detach().clone().flatten().tolist())
    return path


def test_ast_two_steps_by_hand():
    """Eqs. 20-23 with b = (.9, .95), lr 1e-3, wd .1, lambda .01, w 0.5, g = .1 then -.2; pruned first, kept second."""
    weight, owner = masked([[0.5, 0.5]], [[0.0, 1.0]])
    optimizer = AnnealedDecayAdamW([weight], [owner], lambda: 0.01, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    first, second = run(optimizer, weight, [0.1, -0.2])
    assert first == pytest.approx([0.489950007, 0.489950010], abs=1e-9)
    assert second == pytest.approx([0.492731512, 0.495401856], abs=1e-9)
    assert optimizer.state[weight]["exp_avg"].flatten().tolist() == pytest.approx([-0.011, -0.011])  # no decay in u


def test_cast_two_steps_by_hand():
    """AdamS with b = (.9, .999), lr 1e-3, lambda .01, T = 10: the first step has a = 0, the second a = 0.1."""
    weight, owner = masked([[0.5, 0.5]], [[0.0, 1.0]])
    steps = iter([0.0, 0.1])
    share = {"a": 0.0}
    optimizer = AdamS([weight], [owner], lambda: share["a"], 0.01, lr=1e-3, betas=(0.9, 0.999))
    path = []
    for g in (0.1, -0.2):
        share["a"] = next(steps)
        path += run(optimizer, weight, [g])
    assert path[0][0] == path[0][1]
    assert path[1] == pytest.approx([0.494948611, 0.495507417], abs=1e-9)


@pytest.mark.parametrize("kind", ["ast", "cast"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_parameters_without_a_mask_get_adamw(kind, weight_decay):
    torch.manual_seed(0)
    plain = nn.Parameter(torch.randn(3, 5))
    twin = nn.Parameter(plain.detach().clone())
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": weight_decay}
    mine = (
        AnnealedDecayAdamW([plain], [], lambda: 0.5, **options)
        if kind == "ast"
        else AdamS([plain], [], lambda: 0.5, 0.1, **options)
    )
    theirs = torch.optim.AdamW([twin], eps=1e-8, **options)
    for _ in range(5):
        plain.grad = torch.randn_like(plain)
        twin.grad = plain.grad.clone()
        mine.step()
        theirs.step()
    torch.testing.assert_close(plain, twin, rtol=1e-5, atol=1e-6)


def test_without_a_gradient_only_pruned_weights_shrink_at_a_pace_that_lambda_does_not_set():
    paths = []
    for decay in (1e-4, 1e-1):
        weight, owner = masked([[0.5, -0.5, 0.5]], [[0.0, 0.0, 1.0]])
        optimizer = AnnealedDecayAdamW([weight], [owner], lambda decay=decay: decay, lr=1e-3)
        paths.append(run(optimizer, weight, [0.0] * 5))
    assert all(row[2] == 0.5 for row in paths[0])
    pruned = [row[0] for row in paths[0]]
    assert all(a > b for a, b in zip([0.5, *pruned], pruned, strict=False))
    assert [row[1] for row in paths[0]] == pytest.approx([-p for p in pruned])
    assert paths[0][-1] == pytest.approx(paths[1][-1], rel=1e-3)


def test_l1_pulls_only_from_the_second_step_on_and_not_at_zero():
    weight, owner = masked([[0.5, 0.0]], [[0.0, 0.0]])
    share = {"a": 0.0}
    optimizer = AdamS([weight], [owner], lambda: share["a"], 0.01, lr=1e-3)
    assert run(optimizer, weight, [0.0])[0] == [0.5, 0.0]
    share["a"] = 0.5
    assert run(optimizer, weight, [0.0])[0][0] < 0.5 and weight[0, 1] == 0


def test_a_mask_may_change_between_steps():
    weight, owner = masked([[0.5, 0.5]], [[1.0, 1.0]])
    optimizer = AnnealedDecayAdamW([weight], [owner], lambda: 0.1, lr=1e-3)
    run(optimizer, weight, [0.0])
    owner.mask[0, 0] = 0
    assert run(optimizer, weight, [0.0])[0][0] < 0.5 == weight[0, 1]


def test_state_goes_through_a_state_dict():
    def fresh():
        weight, owner = masked([[0.5, 0.5]], [[0.0, 1.0]])
        return weight, AnnealedDecayAdamW([weight], [owner], lambda: 0.01, lr=1e-3)

    weight, optimizer = fresh()
    run(optimizer, weight, [0.1, 0.2])
    other, resumed = fresh()
    with torch.no_grad():
        other.copy_(weight)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert run(optimizer, weight, [0.3]) == run(resumed, other, [0.3])


def test_a_closure_and_a_parameter_without_a_gradient():
    weight, owner = masked([[0.5, 0.5]], [[0.0, 1.0]])
    optimizer = AnnealedDecayAdamW([weight], [owner], lambda: 0.01)
    assert optimizer.step(lambda: 7) == 7 and weight.tolist() == [[0.5, 0.5]]
