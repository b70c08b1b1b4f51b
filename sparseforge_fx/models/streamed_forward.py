"""The answers of a model whose weights stay on disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseforge_fx.graph.capture import capture
from sparseforge_fx.methods.calibrate import Held, flat_inputs, last_uses
from sparseforge_fx.methods.streamed import Streamed
from sparseforge_fx.models.streamed import StreamedModel


class StreamedForward:
    """Called with ids [batch, sequence], it gives what the model returns. Every call reads all weights once, those of
    one block at a time: the more windows are in a batch, the fewer reads there are."""

    def __init__(self, model: StreamedModel):
        self.config = model.skeleton.config
        self.module = capture(model.skeleton).module()
        self.held = Streamed(self.module, model.fetch)
        self.last = last_uses(self.module, {})

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Any:
        run = Held(self.module, self.held)
        run.env = {}
        feed = iter(flat_inputs(self.module, {"input_ids": input_ids}))
        for node in self.module.graph.nodes:
            if node.op == "output":
                return self.module.graph.process_outputs(run.run_node(node))
            run.env[node] = next(feed) if node.op == "placeholder" else run.run_node(node)
            dead = self.last.get(node, ())
            for value in dead:
                run.env.pop(value, None)
            self.held.drop(dead)
        raise AssertionError("a graph ends with its output")
