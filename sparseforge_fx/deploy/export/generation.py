"""``export_generator``: a language model as two graphs over one copy of its weights, prompt and next token.

The key/value cache is given to the graphs, which write into it, and is as long as whoever runs them likes: attention
reads all of its slots, so that a cache of the longest text would cost every token what only the last one needs.
"""

from __future__ import annotations

import inspect
import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.export.pt2_archive._package import package_pt2
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import StaticCache, StaticLayer

from sparseforge_fx.deploy.export.aoti import package
from sparseforge_fx.deploy.export.export import FORMATS, check_path, own_empties, replace_file
from sparseforge_fx.deploy.export.generation_defaults import differences, repetition_penalty
from sparseforge_fx.deploy.lowering import cost_table
from sparseforge_fx.deploy.lowering.lower import lower_captured
from sparseforge_fx.deploy.lowering.report import PackingReport
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.graph.forward import unwrapped
from sparseforge_fx.graph.modes import eval_mode
from sparseforge_fx.ranges import checked

GENERATOR_VERSION = 3  # the length of the cache is free
DTYPES = ("bfloat16", "float16", "float32")  # of a cache
EXAMPLE_SLOTS = 64  # of the cache that is traced
PROBED_SLOTS = 8192  # of the cache that a model is tried with, at most: no fixed window is known that is longer
SPEC_FILE = "sparseforge_generator.json"
TOKENIZER_FOLDER = "tokenizer."  # a prefix: extra files of an archive have no folders of their own


@checked
def export_generator(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    format: str = "pt2",
    max_length: int | None = None,
    target: str = "auto",
    tokens: Sequence[int] | None = None,
    table: str | Path | cost_table.Table | None = None,
    gate: bool = True,
) -> PackingReport:
    """Lower a 2:4 causal language model and write one file that :func:`sparseforge_fx.load_generator` runs.

    Args:
        path: a file whose name ends in ``.pt2``.
        tokenizer: travels in the file, so that text can be generated.
        format: ``pt2`` or ``aoti``, as for :func:`sparseforge_fx.export`.
        max_length: tokens of prompt and answer together, which the cache has slots for; default 1024, or as many as
            the model has positions.
        target, tokens, table, gate: as for :func:`sparseforge_fx.lower`.

    The model's repetition penalty goes with it; what else of its generation_config a generator has not, the notes say.

    Returns its report with ``file_bytes`` and the bytes of a full cache per sequence, ``cache_bytes``. Raises
    SparseForgeError, with nothing written, for models without a key/value cache (state-space models, encoders), and for
    those whose answers depend on how many slots of it are empty.
    """
    check_path(path)
    if format not in FORMATS:
        raise SparseForgeError(f"unknown format {format!r}; choose {' or '.join(FORMATS)}")
    model = unwrapped(model)  # type: ignore[assignment]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) if _is_causal(model) else None
    max_length = min(1024, limit or 1024) if max_length is None else max_length
    if max_length < 2:
        raise SparseForgeError(f"max_length is {max_length}: there must be room for a prompt and a token")
    if limit and max_length > limit:
        raise SparseForgeError(f"max_length {max_length} is more than the {limit} positions of the model")
    with_text = _tokenizer_files(tokenizer)  # refused before anything takes long
    step = Step(model, min(max_length, EXAMPLE_SLOTS))
    spec = _described(model, step, format, max_length)
    _check_empty_slots(step, spec)
    options: dict[str, Any] = {"target": target, "tokens": tokens, "table": table, "gate": gate, "durable": True}
    prefill, report = lower_captured(capture(step, step.example(length=3)), **options)
    known = cost_table.as_table(cost_table.read_row(row) for row in report["table"]) if gate else None
    decode, _ = lower_captured(capture(step, step.example(length=1)), **{**options, "table": known})
    own_empties(prefill)
    share(prefill, decode)
    extra = {SPEC_FILE: json.dumps(spec, indent=1), **with_text}
    programs = {"prefill": prefill, "decode": decode}

    def write(file: IO[bytes]) -> None:
        if format == "aoti":
            # weights beside the two libraries, each once
            on_disk = {"package_constants_in_so": False, "package_constants_on_disk_format": "pickle_weights"}
            package(programs, file, extra, **{f"aot_inductor.{k}": v for k, v in on_disk.items()})
        else:
            graphs = {"prefill": prefill.exported, "decode": without_weights(decode).exported}
            for graph in graphs.values():
                graph.example_inputs = None  # they hold a whole cache
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="No complete tensor")  # the stand-ins
                package_pt2(file, exported_programs=graphs, extra_files=extra)

    replace_file(path, write)
    cache_bytes = max_length * sum(t[0, 0].nbytes for pair in step.cache for t in pair)
    notes = [*report["notes"], *differences(model.generation_config)]
    size = Path(path).stat().st_size
    return {**report, "format": format, "file_bytes": size, "cache_bytes": cache_bytes, "notes": notes}


class SlotsFirst(StaticLayer):
    """Keys and values as [B, L, heads, width]: batch and length come first, which is where a graph may vary in size.

    Written as they are stored, not through a transposed view, so that a compiled graph writes in place.
    """

    keys: Tensor  # type: ignore[assignment]
    values: Tensor  # type: ignore[assignment]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = (t.transpose(1, 2).contiguous() for t in (self.keys, self.values))

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[-2]
        slots = torch.arange(count, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(count)
        self.keys.index_copy_(1, slots, key_states.transpose(1, 2))
        self.values.index_copy_(1, slots, value_states.transpose(1, 2))
        return self.keys.transpose(1, 2), self.values.transpose(1, 2)


class Step(nn.Module):
    """One forward pass over a cache that comes as arguments: (ids [B, S], mask [B, L], start [1], cache) -> [B, V].

    ``mask`` is 1 at the slots of the cache that hold tokens, those of this pass included, and 0 at padding (on the
    left); ``start`` is the slot of the first token of this pass. Keys and values [B, L, heads, width] are written into
    the cache; the result is the logits of the last position.

    Args:
        slots: L of the example; a graph takes others.
    """

    def __init__(self, model: PreTrainedModel, slots: int):
        super().__init__()
        if not _is_causal(model):
            raise SparseForgeError(f"{type(model).__name__} is no causal language model: there is nothing to generate")
        self.model = model
        self.accepted = inspect.signature(model.forward).parameters
        cache = _empty_cache(model, slots)
        device = model.device
        try:  # once, for the shapes of every layer
            with torch.no_grad():
                model(
                    input_ids=torch.zeros(2, 1, dtype=torch.long, device=device), past_key_values=cache, use_cache=True
                )
        except Exception as error:  # an open set: whatever the model makes of a cache that is not its own
            raise _no_static_cache(model) from error
        if not cache.layers or not all(layer.is_initialized for layer in cache.layers):
            raise _no_static_cache(model)
        self.cache = [(layer.keys, layer.values) for layer in cache.layers]
        self.slots = slots

    def example(self, length: int) -> dict[str, Any]:
        """Arguments for a pass of ``length`` tokens, batch 2."""
        device = self.cache[0][0].device
        return {
            "input_ids": torch.ones(2, length, dtype=torch.long, device=device),
            "mask": torch.ones(2, self.slots, dtype=torch.long, device=device),
            "start": torch.zeros(1, dtype=torch.long, device=device),
            "cache": [[t.clone() for t in pair] for pair in self.cache],
        }

    def forward(self, input_ids: Tensor, mask: Tensor, start: Tensor, cache: list[list[Tensor]]) -> Tensor:
        held = _empty_cache(self.model, mask.shape[1])
        for layer, (keys, values) in zip(held.layers, cache, strict=True):
            layer.keys, layer.values = keys, values
            layer.dtype, layer.device = keys.dtype, keys.device
            layer.batch_size, layer.num_heads = keys.shape[0], keys.shape[2]
            layer.k_head_dim, layer.v_head_dim = keys.shape[-1], values.shape[-1]
            layer.cumulative_length = start.clone()  # it is counted up, in place
            layer.is_initialized = True
        slots = torch.arange(input_ids.shape[1], device=input_ids.device) + start
        given = {
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0).index_select(1, slots),
            "logits_to_keep": 1,
        }
        given = {name: value for name, value in given.items() if name in self.accepted}
        return self.model(input_ids=input_ids, past_key_values=held, use_cache=True, **given).logits[:, -1]


def _described(model: PreTrainedModel, step: Step, format: str, max_length: int) -> dict[str, Any]:
    """What the file will say of itself; refused if it could not be loaded with that."""
    config: Any = model.generation_config
    eos, embedding = config.eos_token_id, model.get_input_embeddings()
    spec = {
        "version": GENERATOR_VERSION,
        "format": format,
        "max_length": max_length,
        "cache": [[list(t.shape[2:]) for t in pair] for pair in step.cache],
        "dtype": str(step.cache[0][0].dtype).removeprefix("torch."),
        "device": step.cache[0][0].device.type,
        "vocabulary": len(embedding.weight),  # type: ignore[arg-type]
        "eos_token_id": list(eos) if isinstance(eos, list | tuple) else [] if eos is None else [eos],
        "pad_token_id": config.pad_token_id,
        "repetition_penalty": repetition_penalty(config),
    }
    if wrong := misfits(spec):
        name, wanted = next(iter(wrong.items()))
        raise SparseForgeError(f"the model's {name} is {spec[name]!r}, and a generator takes {wanted}: change it first")
    return spec


@torch.no_grad()
def _check_empty_slots(step: Step, spec: dict[str, Any]) -> None:
    """Raise if the model, in a cache that is mostly empty, answers otherwise than without a cache.

    By the nearer of two prompts: rounding may choose other experts in one of them.
    """
    slots, count = min(spec["max_length"], PROBED_SLOTS), min(8, spec["max_length"])
    ids = torch.randint(spec["vocabulary"], (2, count), generator=torch.Generator().manual_seed(0)).to(spec["device"])
    cache = [[t.new_zeros(2, slots, *t.shape[2:]) for t in pair] for pair in step.cache]
    mask = torch.zeros(2, slots, dtype=torch.long, device=ids.device)
    tolerance = 0.01 if spec["dtype"] == "float32" else 0.1
    with eval_mode(step):
        given = {"attention_mask": torch.ones_like(ids)} if "attention_mask" in step.accepted else {}
        wanted = step.model(input_ids=ids, use_cache=False, **given).logits.float()
        for start, end in ((0, count - 1), (count - 1, count)):
            mask[:, :end] = 1
            found = step(ids[:, start:end], mask, torch.tensor([start], device=ids.device), cache).float()
            want = wanted[:, end - 1]
            if ((found - want).norm(dim=-1) / want.norm(dim=-1)).min() > tolerance:
                raise SparseForgeError(
                    f"{type(step.model).__name__} answers otherwise where {slots} slots of its cache are mostly empty: "
                    "give a max_length of no more than its window of attention, or export it with sf.export"
                )


def misfits(spec: dict[str, Any]) -> dict[str, str]:
    """Which fields of what a file says of itself are of no use, with what they should be. The graph's own sizes are
    checked when it runs."""
    known = {
        "max_length": (_count, "a number of tokens"),
        "cache": (_pairs, "heads and widths of keys and values"),
        "format": (FORMATS.__contains__, " or ".join(FORMATS)),
        "dtype": (DTYPES.__contains__, ", ".join(DTYPES)),
        "device": (("cpu", "cuda").__contains__, "cpu or cuda"),
        "eos_token_id": (lambda ids: isinstance(ids, list) and all(map(_token, ids)), "token ids"),
        "pad_token_id": (lambda value: value is None or _token(value), "a token id"),
        "repetition_penalty": (lambda value: value is None or _positive(value), "a positive number"),
        "vocabulary": (lambda value: value is None or _count(value), "a number of tokens"),
    }
    return {name: wanted for name, (fits, wanted) in known.items() if not fits(spec.get(name))}


def _count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 24


def _token(value: Any) -> bool:
    return type(value) is int and abs(value) < 1 << 31


def _positive(value: Any) -> bool:
    return type(value) is float and 0 < value < float("inf")


def _pairs(value: Any) -> bool:
    """Heads and width of keys and of values, for each layer."""
    return isinstance(value, list) and all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(shape, list) and len(shape) == 2 and all(map(_count, shape)) for shape in pair)
        for pair in value
    )


def share(prefill: Exported, decode: Exported) -> None:
    """Let the second program hold the tensors of the first: the same passes made both from one model."""
    for name, tensor in decode.state.items():
        assert torch.equal(prefill.state[name], tensor), f"{name} differs between the two graphs"
        decode.state[name] = prefill.state[name]


def without_weights(program: Exported) -> Exported:
    """A copy whose tensors are stand-ins of one element."""
    copy = program.copy()
    for name, tensor in copy.state.items():
        stand_in = torch.zeros((), dtype=tensor.dtype, device=tensor.device)
        # an empty one (the bitmask of a dense weight) is none: torch counts the elements that such a view stands for
        stand_in = stand_in.expand(tensor.shape) if tensor.numel() else torch.empty_like(tensor)
        parameter = isinstance(tensor, nn.Parameter)
        copy.state[name] = nn.Parameter(stand_in, requires_grad=False) if parameter else stand_in
    return copy


def _empty_cache(model: PreTrainedModel, slots: int) -> Any:
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=slots)
    # Layers that slide keep their length as a Python number, which a graph would fix; the mask slides anyway, or
    # _check_empty_slots sees it
    cache.layers = [SlotsFirst(slots) for _ in cache.layers]
    return cache


def _is_causal(model: Any) -> bool:
    return (
        isinstance(model, PreTrainedModel)
        and model.can_generate()
        and not model.config.is_encoder_decoder
        and model.get_output_embeddings() is not None
    )


def _no_static_cache(model: nn.Module) -> SparseForgeError:
    return SparseForgeError(
        f"{type(model).__name__} does not keep keys and values in a static cache: export it with sf.export instead"
    )


def _tokenizer_files(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, str]:
    if tokenizer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = [file for file in sorted(Path(folder).iterdir()) if file.suffix in (".json", ".txt", ".jinja")]
        if "tokenizer.json" not in {file.name for file in files}:
            raise SparseForgeError(
                f"{type(tokenizer).__name__} writes no tokenizer.json: give a fast tokenizer, or None"
            )
        return {f"{TOKENIZER_FOLDER}{file.name}": file.read_text(encoding="utf-8") for file in files}
