"""nn.Module -> Program, by torch.export: any module with example inputs; Hugging Face models without."""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.program import Program


def capture(model: nn.Module, example_inputs: Any = None) -> Program:
    """Trace ``model`` into a Program whose parameters are the model's own Parameter objects.

    Args:
        model: any module that torch.export takes. It is traced in eval mode (an exported graph would bake dropout in) and
            gets its mode back.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. None: made from the config of
            a Hugging Face model. The first two dimensions of every tensor (batch, sequence) stay dynamic where the model
            allows it; the notes of the Program name those that had to be fixed.

    Raises SparseForgeError naming the line of the model that torch.export could not take.
    """
    if not isinstance(model, nn.Module):
        raise SparseForgeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if any(p.is_meta for p in model.parameters()) and example_inputs is None and not hasattr(model, "config"):
        raise SparseForgeError("the model's parameters are on the meta device; load its weights first")
    if example_inputs is None:
        example_inputs = make_example_inputs(model)
    args, kwargs = as_call(example_inputs)
    modes = {m: m.training for m in model.modules()}
    try:
        with _no_cache(model):
            model.eval()
            exported, notes = _export(model, args, kwargs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return Program(exported, model, notes)


def as_call(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """A batch in any usual form (tensor, tuple or list, mapping) as positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def make_example_inputs(model: nn.Module, batch: int = 2, length: int = 12) -> dict[str, Tensor]:
    """Keyword inputs for a Hugging Face model, from its config: token ids or pixels, decoder ids where it has a decoder."""
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        raise SparseForgeError(
            f"{type(model).__name__} is not a Hugging Face model: pass example_inputs (a tensor, a tuple, or a dict of keyword inputs)"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
        return {main: torch.randn(batch, getattr(vision, "num_channels", 3), height, width, device=device).to(dtype)}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if main != "input_ids" or not getattr(text, "vocab_size", None):
        raise SparseForgeError(f"no rule makes inputs for {type(model).__name__} (main input {main!r}): pass example_inputs")
    length = min(length, getattr(text, "max_position_embeddings", None) or length)
    ids = torch.randint(0, text.vocab_size, (batch, length), device=device)
    inputs = {main: ids}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids[:, : length - 1].clone()
    return inputs


@contextlib.contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """A key/value cache is state that a training graph must not return."""
    config = getattr(model, "config", None)
    owners = [c for c in (config, *(getattr(config, k, None) for k in getattr(config, "sub_configs", {}) or {})) if c is not None]
    saved = [(c, c.use_cache) for c in owners if getattr(c, "use_cache", None) is not None]
    for owner, _ in saved:
        owner.use_cache = False
    try:
        yield
    finally:
        for owner, value in saved:
            owner.use_cache = value


def _export(model: nn.Module, args: tuple, kwargs: dict) -> tuple[torch.export.ExportedProgram, tuple[str, ...]]:
    """Export with batch and sequence dynamic; where the model forbids it, fix the sequence, then both, and say so."""
    first: Exception | None = None
    for dims, note in (((0, 1), ""), ((0,), "the sequence dimension"), ((), "batch and sequence dimensions")):
        shapes = pytree.tree_map(lambda leaf, dims=dims: _dynamic(leaf, dims), (args, kwargs))
        by_name = _name_arguments(model, *shapes)
        try:
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=by_name, strict=False)
        except Exception as error:
            first = first or error
            continue
        fixed = [note] if note else []
        notes = tuple(f"{what} had to be fixed at the example's size ({_one_line(first)})" for what in fixed if first)
        return exported, notes + tuple(_specialised(exported))
    assert first is not None
    raise SparseForgeError(_explain(model, first)) from first


def _dynamic(leaf: Any, dims: tuple[int, ...]) -> Any:
    # Dim.AUTO: dynamic unless the model itself pins it (a feature dimension, say)
    return {d: Dim.AUTO for d in dims if d < leaf.dim() and leaf.shape[d] > 1} if isinstance(leaf, Tensor) else None


def _name_arguments(model: nn.Module, arg_shapes: tuple, kwarg_shapes: dict) -> dict[str, Any] | tuple:
    """dynamic_shapes in the form that torch.export wants: by parameter name, *args and **kwargs as containers."""
    if not kwarg_shapes:
        return arg_shapes
    parameters = inspect.signature(model.forward).parameters
    named: dict[str, Any] = {}
    rest = list(arg_shapes)
    for name, parameter in parameters.items():
        if parameter.kind == parameter.VAR_POSITIONAL:
            named[name], rest = tuple(rest), []
        elif parameter.kind == parameter.VAR_KEYWORD:
            extra = {k: v for k, v in kwarg_shapes.items() if k not in parameters}
            if extra:
                named[name] = extra
        elif rest:
            named[name] = rest.pop(0)
        elif name in kwarg_shapes:
            named[name] = kwarg_shapes[name]
    return named


def _specialised(exported: torch.export.ExportedProgram) -> Iterator[str]:
    """Integer [batch, sequence] inputs whose sizes the trace pinned although they were asked to be dynamic."""
    by_name = {n.name: n for n in exported.graph.find_nodes(op="placeholder")}
    for name in exported.graph_signature.user_inputs:
        value = by_name[name].meta.get("val") if isinstance(name, str) and name in by_name else None
        if isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point():
            for what, size in zip(("batch", "sequence"), value.shape, strict=True):
                if isinstance(size, int):
                    yield f"the {what} dimension of {name} is fixed at {size} by the model"


def _one_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def _explain(model: nn.Module, error: Exception) -> str:
    """One sentence: what failed, at which line of the model, and what to try."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename and "/sparseforge_fx/" not in f.filename]
    where = f" at {own[-1].filename}:{own[-1].lineno} ({own[-1].line})" if own else ""
    if not own:  # the tracer keeps the user's stack in the message
        lines = [line.strip() for line in str(error).splitlines() if line.strip().startswith("File ")]
        outside = [line for line in lines if "/torch/" not in line]
        where = f" at {outside[-1]}" if outside else ""
    return (
        f"torch.export cannot take {type(model).__name__}{where}: {_one_line(error)}; rewrite that line without "
        "data-dependent Python control flow, or sparsify the submodule that does the work (sf.sparsify(model.part, ...))"
    )
