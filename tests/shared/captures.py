"""One capture for all models that are built alike: tracing takes most of the time of a test of a tiny transformer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from sparseforge_fx.graph.capture import capture, has_no_values
from sparseforge_fx.graph.exported import Exported

#: who asks for captures; all are imported before the first is changed, lest one begin with a stand-in and keep it
USERS = [f"deploy.export.{name}" for name in ("export", "generation")]
USERS += ["deploy.lowering.lower", "deploy.lowering.routings", "models.streamed_forward", "graph.capture"]
USERS += ["data.capturing", "training.prepare"]
#: folders of tests whose models are many, or whose subject captures are; elsewhere a capture is a step on the way
FOR_THEMSELVES = ("graph", "tests")
LARGEST = 4_000_000  # weights of a model that is kept
PLAIN = (bool, int, float, str, type(None))

_programs: dict[Any, Exported] = {}


def _described(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad, leaf.stride(), has_no_values(leaf)
    return leaf if isinstance(leaf, PLAIN) else id(leaf)


def _key(model: nn.Module, example: Any, dynamic: bool) -> Any:
    """All that a trace can see of a model of transformers, and nothing of its weights' values. None: not to be kept."""
    if not isinstance(model, PreTrainedModel) or torch.is_autocast_enabled("cpu"):
        return None
    if sum(p.numel() for p in model.parameters()) > LARGEST:
        return None
    modules, numbers = [], {}
    for name, module in model.named_modules():
        own = vars(module)
        if not type(module).__module__.startswith(("torch.nn.", "transformers.")) or "forward" in own:
            return None  # an adapter, or a forward of someone's own
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations"):
            return None
        scalars = tuple(sorted((k, v) for k, v in own.items() if k != "training" and isinstance(v, PLAIN)))
        modules.append((name, type(module), type(module).forward, scalars))
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    held = tuple((name, _described(t), numbers.setdefault(id(t), len(numbers))) for name, t in tensors)  # ties, too
    config = model.config
    ways = (config._attn_implementation, getattr(config, "_experts_implementation", None))
    leaves, tree = pytree.tree_flatten(example)
    return (
        tuple(modules), held, config.to_json_string(use_diff=False), ways, tuple(map(_described, leaves)), str(tree),
        dynamic, torch.get_default_dtype(),
    )  # fmt: skip


def capture_alike(model: nn.Module, example_inputs: Any = None, *, dynamic: bool = True) -> Exported:
    """What capture gives. Of a model that is built as one before it was, that one's graph over its own tensors."""
    key = _key(model, example_inputs, dynamic)
    if key is None:
        return capture(model, example_inputs, dynamic=dynamic)
    if key not in _programs:
        program = capture(model, example_inputs, dynamic=dynamic)
        _programs[key] = program.copy()
        return program
    program = _programs[key].copy()
    program.source = model
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for table in (program.exported.state_dict, program.exported.constants):
        table.update((name, tensors[name]) for name in table if name in tensors)
    return program


def share_captures(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """By default for the whole of a process, which a test has started."""
    for module in [importlib.import_module(f"sparseforge_fx.{name}") for name in USERS]:
        put(module, "capture", capture_alike)


@pytest.fixture(scope="module", autouse=True)
def captures_alike(request):
    """Whatever captures does so once for all models that are built alike."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name not in FOR_THEMSELVES:
            share_captures(patch.setattr)
        yield
