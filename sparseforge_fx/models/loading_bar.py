"""One progress bar while a model is loaded: ours, on a terminal, in the place of those of the libraries below."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import modeling_gguf_pytorch_utils as gguf_weights
from transformers.utils import logging


@contextlib.contextmanager
def loading_bar(name: str) -> Iterator[None]:
    """Whatever ``from_pretrained`` counts inside counts on one rich bar on standard error, which vanishes at the end.

    It pulses while nothing is counted (building the model). Where standard error is no terminal nothing is shown.
    """
    console = Console(stderr=True)
    shown = console.is_terminal

    def ours(_: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not args:  # a bar that is moved by hand
            return logging.EmptyTqdm(*args, **kwargs)
        return bar.track(args[0], task_id=task) if shown else args[0]

    with Progress(console=console, disable=not shown, transient=True) as bar:
        task = bar.add_task(f"Loading {name}", total=None)
        before = logging.set_tqdm_hook(ours)
        theirs, gguf_weights.tqdm = gguf_weights.tqdm, logging.tqdm  # this one does not ask the hook
        try:
            yield
        finally:
            gguf_weights.tqdm = theirs
            logging.set_tqdm_hook(before)
