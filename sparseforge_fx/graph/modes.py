"""Eval mode for as long as something is looked at or measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it, ``model`` is in eval mode; afterwards every module of it has its own mode back.

    Modules from torch.export refuse to change: their mode was fixed when they were captured.
    """
    was_training = model.training
    modes = [(module, module.training) for module in model.modules()]
    with suppress(NotImplementedError):
        model.eval()
    try:
        yield
    finally:
        with suppress(NotImplementedError):
            model.train(was_training)  # some modules do more than note their mode
        for module, mode in modes:  # train() gave all of them one
            module.training = mode
