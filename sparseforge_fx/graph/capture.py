"""nn.Module -> program, by torch.export: any module with example inputs; Hugging Face models without."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.fx.config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv, is_concrete_int
from torch.utils import _pytree as pytree

from sparseforge_fx.errors import SparseForgeError, one_line
from sparseforge_fx.graph.backwards import functions_called, tell_backwards
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.graph.forward import spelled_out, unwrapped
from sparseforge_fx.graph.grouped_experts import grouped_experts
from sparseforge_fx.graph.leftovers import nothing_kept
from sparseforge_fx.graph.modes import eval_mode


def capture(model: nn.Module, example_inputs: Any = None, *, dynamic: bool = True) -> Exported:
    """Trace ``model`` into a program whose parameters are the model's own Parameter objects.

    Args:
        model: any module that torch.export takes. It is traced in eval mode (an exported graph would bake dropout in)
            and without a key/value cache, and gets its modes and settings back.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. None: made from the config
            of a Hugging Face model. The first two dimensions of every tensor (batch, sequence) stay dynamic where the
            model allows it; the notes of the program name those that had to be fixed, and what has a backward of its
            own, which the graph has not.
        dynamic: False fixes both at the example's sizes, keeps no lines of the model's source beside the nodes, and
            compiles the graph when it is first run: a small part of the time, for who only looks at the graph.

    Raises SparseForgeError naming the line of the model that torch.export could not take, and what to try.
    """
    model = unwrapped(model)
    lazy = next((n for n, p in model.named_parameters() if nn.parameter.is_lazy(p)), None)
    if lazy is not None:
        raise SparseForgeError(f"{lazy} of {type(model).__name__} has no size yet: call the model once, on any data")
    _leave_inference_mode(model)
    args, kwargs = as_call(make_example_inputs(model) if example_inputs is None else example_inputs)
    # compiled parts run as they were written; inference tensors could not be traced
    eagerly, traceable = torch.compiler.set_stance("force_eager"), torch.inference_mode(False)
    with (
        _no_cache(model), traceable, torch.enable_grad(), eagerly, spelled_out(model, kwargs), eval_mode(model),
        grouped_experts(model),
    ):  # fmt: skip
        args, kwargs = pytree.tree_map(trainable_input, (args, kwargs))
        with contextlib.nullcontext() if dynamic else _nodes_alone(), functions_called() as functions:
            exported, notes = _export(model, args, kwargs, dynamic)
    _let_dtypes_be(exported)
    return Exported(exported, model, (*notes, *tell_backwards(model, functions)))


def without_values(model: nn.Module, device: torch.device | str = "cpu") -> None:
    """Turn weights and buffers, wherever they are, into tensors on a device that have a shape alone, so that the model
    is captured as it runs there. (On the meta device a model may take another way.)"""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    made: dict[int, Tensor] = {}  # tied weights stay tied
    with mode:
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, value in table.items():
                    if value is None:
                        continue
                    if id(value) not in made:
                        fake = torch.empty(value.shape, dtype=value.dtype, device=device)
                        made[id(value)] = nn.Parameter(fake) if isinstance(value, nn.Parameter) else fake
                    table[name] = made[id(value)]  # type: ignore[assignment]


def has_no_values(value: Tensor) -> bool:
    """Is it one of :func:`without_values`?"""
    return isinstance(value, FakeTensor) or isinstance(value.data, FakeTensor)


def _leave_inference_mode(model: nn.Module) -> None:
    """Weights that were made under torch.inference_mode can neither be written nor trained: ordinary copies can."""
    copies: dict[int, Tensor] = {}  # tied weights stay tied
    with torch.no_grad():
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, value in table.items():
                    if value is not None and value.is_inference():
                        if id(value) not in copies:
                            copy = value.clone()
                            is_parameter = isinstance(value, nn.Parameter)
                            copies[id(value)] = nn.Parameter(copy, value.requires_grad) if is_parameter else copy
                        table[name] = copies[id(value)]  # type: ignore[assignment]


def as_call(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """A batch in any usual form (tensor, tuple or list, mapping) as positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def make_example_inputs(model: nn.Module, batch: int = 2, length: int = 12) -> dict[str, Tensor]:
    """Keyword inputs for a Hugging Face model, from its config: token ids or pixels, and decoder ids if it decodes.

    The same on every call; the global random state is left alone.
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        wanted = "a tensor, a tuple, or a dict of keyword inputs"
        raise SparseForgeError(f"{name} is not a Hugging Face model: pass example_inputs ({wanted})")
    first = next(model.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        pixels = torch.randn(batch, getattr(vision, "num_channels", 3), height, width, generator=generator)
        return {main: pixels.to(first.device, first.dtype)}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if main != "input_ids" or not getattr(text, "vocab_size", None):
        raise SparseForgeError(f"no rule makes inputs for {name} (main input {main!r}): pass example_inputs")
    length = min(length, getattr(text, "max_position_embeddings", None) or length)
    ids = torch.randint(0, text.vocab_size, (batch, length), generator=generator).to(first.device)
    if getattr(config, "is_encoder_decoder", False):
        return {main: ids, "decoder_input_ids": ids[:, : length - 1].clone()}
    return {main: ids}


@contextlib.contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """A key/value cache is state that a training graph must not return."""
    configs: dict[int, Any] = {
        id(c): c for c in (getattr(m, "config", None) for m in model.modules())
    }  # parts may hold copies
    saved = [(c, c.use_cache) for c in configs.values() if getattr(c, "use_cache", None) is not None]
    for owner, _ in saved:
        owner.use_cache = False
    try:
        yield
    finally:
        for owner, value in saved:
            owner.use_cache = value


@contextlib.contextmanager
def _nodes_alone() -> Iterator[None]:
    """Where each node comes from in the source, and code of a graph after every step of an export, take nearly half of
    its time."""
    before = getattr(torch.fx.config, "do_not_emit_stack_traces", False)  # torch 2.11 does not ask
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        with _use_lazy_graph_module(True):
            yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export prints half-traced graphs and warns about its own internals; what matters is in the exception."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def _export(model: nn.Module, args: tuple, kwargs: dict, dynamic: bool) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Export with batch and sequence dynamic; where the model forbids it, fix the sequence, then both, and say so."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise SparseForgeError(f"example_inputs do not fit {type(model).__name__}.forward: {error}") from error
    first: Exception | None = None
    attempts = [((0, 1), ""), ((0,), "the sequence dimension"), ((), "batch and sequence dimensions")]
    attempts = attempts if dynamic else attempts[-1:]
    wider, called = (_doubled(model, args, kwargs) if dynamic else None), False
    while attempts:
        dims, fixed = attempts.pop(0)
        call = (args, kwargs) if wider is None or not dims else wider
        named = inspect.signature(model.forward).bind(*call[0], **call[1]).arguments
        shapes = pytree.tree_map(lambda leaf, dims=dims: _dynamic(leaf, dims), dict(named)) if dims else None
        try:
            with _quiet(), nothing_kept(model) as made:
                example = pytree.tree_map(_alias, call)
                exported = torch.export.export(model, *example, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # an open set: whatever the model's own code and the tracer raise
            if not called and _runs(model, call):  # what the first call of a model imports or makes is there now
                attempts.insert(0, (dims, fixed))
            else:
                first = first or error
            called = True
            continue
        if made and not called and _runs(model, call):  # buffers that are there now
            called = True
            attempts.insert(0, (dims, fixed))
            continue
        told = tuple(_specialised(exported, dims))
        if wider is not None and dims and told:  # a size that the model fixes is the example's own
            wider = None
            attempts.insert(0, (dims, fixed))
            continue
        why = (f"{fixed} had to be fixed at the example's size ({one_line(first)})",) if first else ()
        return exported, why + told
    assert first is not None
    raise SparseForgeError(_explain(model, args, kwargs, first)) from first


def _let_dtypes_be(exported: ExportedProgram) -> None:
    """Without the assertions that stand before each cast and hold what is cast to the example's dtype: under mixed
    precision it has another one."""
    for node in list(exported.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            exported.graph.erase_node(node)
    exported.graph_module.recompile()


def trainable_input(leaf: Any) -> Any:
    """Tensors made under torch.inference_mode cannot be traced or trained on; their copies can."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _doubled(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The inputs with each row twice where all have one row, and likewise single positions of ids: a size of one would
    be taken for a constant. None where nothing is single, or the model does not take it."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()]
    rows = bool(tensors) and all(t.shape[0] == 1 for t in tensors)
    single = any(_are_ids(t) and t.shape[1] == 1 for t in tensors)
    if not rows and not single:
        return None

    def twice(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        leaf = leaf.repeat(2, *[1] * (leaf.dim() - 1)) if rows else leaf
        return leaf.repeat(1, 2) if single and _are_ids(leaf) and leaf.shape[1] == 1 else leaf

    wider = pytree.tree_map(twice, (args, kwargs))
    return wider if _runs(model, wider) else None


def _runs(model: nn.Module, call: tuple[tuple, dict]) -> bool:
    """Does the model itself take these inputs?"""
    try:
        with torch.no_grad(), _quiet():
            model(*call[0], **call[1])
    except Exception:  # an open set: whatever the model raises
        return False
    return True


def _are_ids(leaf: Tensor) -> bool:
    return leaf.dim() == 2 and not leaf.is_floating_point()


def _alias(leaf: Any) -> Any:
    # a failed export leaves marks of dynamic sizes on its inputs, which the next attempt would obey
    return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _dynamic(leaf: Any, dims: tuple[int, ...]) -> Any:
    # Dim.AUTO: dynamic unless the model itself pins it (a feature dimension, say)
    if not isinstance(leaf, Tensor):
        return None
    if 1 in dims and not leaf.is_floating_point():
        dims = tuple(range(leaf.dim()))  # of ids and masks every dimension counts something
    return {d: Dim.AUTO for d in dims if d < leaf.dim() and leaf.shape[d] > 1}


def _specialised(exported: ExportedProgram, dims: tuple[int, ...]) -> Iterator[str]:
    """Sizes that the trace pinned although they were asked to be dynamic: every batch, and the sequence of ids."""
    by_name = {n.name: n for n in exported.graph.find_nodes(op="placeholder")}
    for name in exported.graph_signature.user_inputs:
        value = by_name[name].meta.get("val") if isinstance(name, str) and name in by_name else None
        if isinstance(value, Tensor):
            ids = (
                value.dim() == 2 and not value.is_floating_point()
            )  # elsewhere dimension 1 may be channels or features
            for d, what in enumerate(("batch", "sequence") if ids else ("batch",)):
                if d in dims and d < value.dim() and is_concrete_int(value.shape[d]):
                    size = int(value.shape[d])
                    by = "by the example, where it is single" if size == 1 else "by the model"
                    yield f"the {what} dimension of {name} is fixed at {size} {by}"


def _where(error: BaseException) -> str:
    """The deepest line on the way to the error that is neither torch's nor ours."""
    ours = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*ours, "<"))]
    return f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""


def _explain(model: nn.Module, args: tuple, kwargs: dict, error: Exception) -> str:
    """One sentence: what failed, at which line of the model, and what to try."""
    name = type(model).__name__
    try:
        with torch.no_grad(), _quiet():
            model(*args, **kwargs)
    except Exception as own:  # an open set: whatever the model raises
        return f"{name} itself fails on the example inputs{_where(own)}: {one_line(own)}; pass inputs that it takes"
    on_values = "data-dependent" in str(error) or "dynamic control flow" in str(error)
    advice = "without Python control flow on tensor values" if on_values else "with torch's own operators alone"
    advice = f"rewrite that line {advice}, or " if _where(error) else ""
    return (
        f"torch.export cannot take {name}{_where(error)}: {one_line(error)}; {advice}sparsify the submodule that does "
        "the work (sf.sparsify(model.part, ...))"
    )
