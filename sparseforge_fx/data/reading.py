"""What a batch is to a model: the one place that says what of it are inputs, labels and real positions.

Each is one of three: used, not there, or named in a sentence (``Reader.notes``, or an error where it would be wrong to
go on).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparseforge_fx.data.batches import main_tensor
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import as_call, trainable_input
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.graph.forward import named_parameters, positional_names
from sparseforge_fx.graph.padding import DECODER_MASK, MASK

IGNORE = -100  # a label that is not scored
DECODER_IDS = "decoder_input_ids"
#: what a loss takes, and a forward that is captured for distillation does not; the first is what aliases become
LABELS = ("labels", "label", "label_ids")
SPAN = ("start_positions", "end_positions")
FURTHER_LABELS = ("next_sentence_label", "sentence_order_label")


class Reading(NamedTuple):
    """One batch, as a captured model and its loss take it.

    Attributes:
        args, kwargs: what the captured program is called with.
        given: the whole batch by the names of the model's forward.
        labels: None, or targets in the rows of the answer (next tokens for a causal language model, -100 is not
            scored; start and end of a span as [batch, 2]).
        real: name of a mask -> bool [batch, positions], False where there is padding. A missing name: all are real.
        rows: name of the mask that speaks of the answer's rows.
    """

    args: tuple
    kwargs: dict[str, Any]
    given: dict[str, Any]
    labels: Any
    real: dict[str, Tensor]
    rows: str

    def real_rows(self, value: Tensor) -> Tensor | None:
        """bool [batch, positions] for an answer [batch, positions, ...]; None: every row counts."""
        mask = self.real.get(self.rows)
        return mask if mask is not None and mask.shape == value.shape[:2] and not bool(mask.all()) else None


class Reader:
    """Reads batches for one captured program.

    ``notes`` gathers, once each, the sentences about what was given and is not used.

    Args:
        labels: does what follows learn from them?
    """

    def __init__(self, program: Exported, labels: bool = True):
        assert program.source is not None
        self._model = program.source
        self._in_spec = program.exported.call_spec.in_spec
        self._count, self._keywords = call_signature(self._in_spec)
        self._causal = is_causal_lm(self._model)
        self._decodes = _is_encoder_decoder(self._model)
        self._learns = labels or self._decodes  # a decoder's labels are its inputs, too
        self.notes: list[str] = []

    def note(self, sentence: str) -> None:
        """Say it once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> Reading:
        """A batch in any form that the model takes, whatever the order, form or captured subset of its inputs; what
        lies on the CPU goes to the model's device.

        Raises SparseForgeError if it lacks what the model was captured with, or if padding would be taken for text.
        """
        named = by_name(self._model, args, kwargs)
        given = {n: pytree.tree_map(trainable_input, v) for n, v in self._on_device(named).items()}
        positional = positional_names(self._model, max(self._count, len(args)))[: self._count]
        captured = [*positional, *self._keywords]
        for mask, ids in ((MASK, "input_ids"), (DECODER_MASK, DECODER_IDS)):
            if mask in captured and given.get(mask) is None and isinstance(given.get(ids), Tensor):
                given[mask] = torch.ones_like(given[ids])  # a batch without padding
        missing = [n for n in captured if n not in given]
        if missing:
            raise SparseForgeError(f"the batch lacks {', '.join(missing)}, which the model was captured with")
        inputs = tuple(given[n] for n in positional), {n: given[n] for n in self._keywords}
        if pytree.tree_structure(inputs) != self._in_spec:
            raise SparseForgeError(
                f"the batch gives {', '.join(captured)} in another form than the model was captured with "
                f"({_form(inputs)}): give every batch the same names and nesting"
            )
        real = self._real(given, captured)
        labels = self._labels(given, captured, real)
        self._name_the_rest(given, captured)
        return Reading(*inputs, given, labels, real, DECODER_MASK if self._decodes else MASK)

    def _on_device(self, named: dict[str, Any]) -> dict[str, Any]:
        """Data come from the CPU, wherever the model is; what somebody put elsewhere stays there."""
        device = next((p.device for p in self._model.parameters() if not p.is_meta), torch.device("cpu"))

        def there(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) and value.is_cpu else value

        return named if device.type == "cpu" else {n: pytree.tree_map(there, v) for n, v in named.items()}

    def _real(self, given: dict[str, Any], captured: list[str]) -> dict[str, Tensor]:
        real = {}
        for name in (MASK, DECODER_MASK):
            mask, ids = given.get(name), given.get("input_ids")
            if isinstance(mask, Tensor) and (mask.dim() == 2 or (mask.dim() > 2 and mask.shape == _shape(ids))):
                real[name] = (mask != 0).flatten(0, -2)  # of the choices of a question, each is a row
            elif mask is not None:
                self.note(f"{name} is not [batch, positions], so it does not say which positions are padding")
        if MASK in real and MASK not in captured and not bool(real[MASK].all()):
            raise SparseForgeError(
                "the batch is padded but the model was captured without attention_mask: put one into example_inputs"
            )
        labels = given.get(LABELS[0])
        if self._decodes and DECODER_MASK not in real and isinstance(labels, Tensor) and labels.dim() == 2:
            real[DECODER_MASK] = labels != IGNORE
        if MASK not in given and _ends_in_padding(given.get("input_ids"), pad := _padding_token(self._model)):
            self.note(f"input_ids hold the padding token {pad} and there is no attention_mask: padding counts as text")
        return real

    def _labels(self, given: dict[str, Any], captured: list[str], real: dict[str, Tensor]) -> Any:
        labels, ids = given.get(LABELS[0]), given.get("input_ids")
        if labels is None and all(isinstance(given.get(n), Tensor) and given[n].dim() <= 2 for n in SPAN):
            return torch.stack([given[n].reshape(len(given[n]), -1)[:, 0] for n in SPAN], 1)
        if labels is None and self._causal and isinstance(ids, Tensor):
            labels = ids
        if not self._causal or not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
            return labels
        return shifted_labels(labels, real.get(MASK))

    def _name_the_rest(self, given: dict[str, Any], captured: list[str]) -> None:
        targets = {LABELS[0], *SPAN}
        known = {*captured, MASK, DECODER_MASK, *(targets if self._learns else ())}
        name = type(self._model).__name__
        for key, value in given.items():
            if key not in known and value is not None:
                why = "the loss has no place for it" if key in FURTHER_LABELS else f"{name} was captured without it"
                if key in targets or (key in FURTHER_LABELS and not self._learns):
                    why = "nothing in this run learns from labels"
                self.note(f"{key} is in the batches and not used: {why}")


# -- the model's side ------------------------------------------------------------------------------------------------
def example_of(model: nn.Module, batch: Any) -> Any:
    """The inputs to capture ``model`` with, out of one of the user's batches: no labels, nothing that forward does not
    take, and what a decoder reads where the labels say it. Raises SparseForgeError for a batch without tensors, and for
    a row that is in no batch."""
    if not _holds_tensor(batch):
        main_tensor(batch)
    args, kwargs = as_call(batch)
    given = by_name(model, args, kwargs)
    parameters, anything = named_parameters(model)
    left_out = {*FURTHER_LABELS, *LABELS, *SPAN} - _required(parameters)
    positional = positional_names(model, len(args))
    accepted = {*parameters, *positional}
    wanted = {
        n: v
        for n, v in given.items()
        if n not in left_out and v is not None and (n in accepted or (anything and _holds_tensors(v)))
    }
    _check_form(model, wanted)
    if args and positional and list(wanted) == positional[: len(wanted)]:
        return tuple(wanted.values())
    return wanted


def _check_form(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise a SparseForgeError for arrays among the inputs, and where a model of transformers' reads a batch of tensors
    for plain values or a single row."""
    main = getattr(model, "main_input_name", None)
    for name, value in inputs.items():
        strange = any(isinstance(leaf, np.ndarray) for leaf in pytree.tree_leaves(value))
        if strange or (name == main and not _holds_tensor(value)):
            raise SparseForgeError(
                f"{name} of a batch is of type {type(value).__name__}, not a tensor: torch.as_tensor(...) makes "
                'one, or return_tensors="pt" of a tokenizer'
            )
        if name == main and isinstance(value, Tensor) and value.dim() < 2:
            raise SparseForgeError(
                f"{name} of a batch is {list(value.shape)}, a row without a batch dimension: batch the rows, as "
                "DataLoader(rows, batch_size=4) does"
            )


def by_name(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The whole batch by the names of the model's forward, however it was given.

    A mapping is taken apart, unless a forward with one input has none of its names; one further item than forward
    takes is the labels (as of a data loader's pairs), ``label`` and ``label_ids`` are the labels too; a decoder's
    inputs are made from the labels by the model's own rule where they are missing.
    """
    parameters, anything = named_parameters(model)
    required = _required(parameters)
    only = args[0] if len(args) == 1 else None
    if isinstance(only, Mapping) and (anything or set(only) & set(parameters)):
        args, kwargs = (), {**only, **kwargs}
    elif not args and len(required) == 1 and not anything and not set(kwargs) & set(parameters):
        args, kwargs = (dict(kwargs),), {}
    names = positional_names(model, len(args))
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    rest = args[len(names) :]
    if len(rest) == 1 and not set(LABELS) & set(given):
        given[LABELS[0]] = rest[0]
    else:
        given |= {f"item {len(names) + i}": value for i, value in enumerate(rest)}
    for alias in LABELS[1:]:
        if alias in given and alias not in parameters and LABELS[0] not in given:
            given[LABELS[0]] = given.pop(alias)
    _complete_decoder(model, given, parameters)
    return given


def _complete_decoder(model: nn.Module, given: dict[str, Any], parameters: Mapping[str, Any]) -> None:
    labels = given.get(LABELS[0])
    if not (_is_encoder_decoder(model) and isinstance(labels, Tensor) and labels.dim() == 2):
        return
    if DECODER_IDS in parameters and given.get(DECODER_IDS) is None and given.get("decoder_inputs_embeds") is None:
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None) or _shift_right(model)
        try:
            given |= {} if shift is None else {DECODER_IDS: shift(labels)}
        except Exception as error:  # an open set: whatever the model's own code raises without a start token, say
            raise SparseForgeError(
                f"{type(model).__name__} makes no decoder_input_ids from these labels ({error}): put decoder_input_ids "
                "into the batches, or set what its config lacks"
            ) from error
    ids = given.get(DECODER_IDS)
    beside = isinstance(ids, Tensor) and ids.shape == labels.shape
    if beside and DECODER_MASK in parameters and given.get(DECODER_MASK) is None:
        given[DECODER_MASK] = (labels != IGNORE).long()


def _shift_right(model: Any) -> Any:
    """Labels moved by one behind the config's start token, as models without a method for it do inside of forward."""
    config = model.config
    start = getattr(config, "decoder_start_token_id", None)
    pad = getattr(config, "pad_token_id", None)
    if start is None or pad is None:
        return None

    def shift(labels: Tensor) -> Tensor:
        moved = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
        return moved.masked_fill(moved == IGNORE, pad)

    return shift


def _required(parameters: Mapping[str, inspect.Parameter]) -> set[str]:
    return {n for n, p in parameters.items() if p.default is p.empty}


def call_signature(in_spec: pytree.TreeSpec | None) -> tuple[int, list[str]]:
    """How many positional inputs an exported program takes, and the names of its keyword inputs in their order."""
    if in_spec is None:
        return 0, []
    positional, keyword = in_spec.children() if hasattr(in_spec, "children") else in_spec.children_specs
    return positional.num_children, list(keyword.context or ())


def is_causal_lm(model: nn.Module) -> bool:
    """Are the labels of position t those of t + 1? So it is in every transformers model that generates without an
    encoder, also inside of a module of the user's own."""
    for module in model.modules():
        can_generate = getattr(type(module), "can_generate", None)
        if can_generate is not None:
            return bool(can_generate()) and not _is_encoder_decoder(module)
    return False


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _padding_token(model: nn.Module) -> int | None:
    """The token that can be nothing but padding."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[union-attr]
    pad = getattr(config, "pad_token_id", None)
    others = [getattr(config, f"{kind}_token_id", None) for kind in ("bos", "eos", "decoder_start")]
    flat = {t for other in others for t in (other if isinstance(other, list) else [other])}
    return pad if isinstance(pad, int) and pad not in flat else None


def _ends_in_padding(ids: Any, pad: int | None) -> bool:
    if pad is None or not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
        return False
    return bool(((ids[:, 0] == pad) | (ids[:, -1] == pad)).any())


def _shape(value: Any) -> torch.Size | None:
    return value.shape if isinstance(value, Tensor) else None


def _holds_tensors(value: Any) -> bool:
    leaves = pytree.tree_leaves(value)
    return bool(leaves) and all(isinstance(leaf, Tensor) for leaf in leaves)


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _form(value: Any) -> str:
    """Nesting with types at the leaves, for a sentence."""
    return str(pytree.tree_map(lambda leaf: type(leaf).__name__, value)).replace("'", "")


def shifted_labels(labels: Tensor, real: Tensor | None = None) -> Tensor:
    """Next-token labels [batch, sequence] for causal logits: the last position and padding, left or right, are not
    scored.

    Args:
        labels: token ids [batch, sequence], -100 where not to be scored.
        real: [batch, sequence], 0 or False where there is padding.
    """
    shifted = torch.full_like(labels, IGNORE)
    shifted[:, :-1] = labels[:, 1:]
    if real is not None and real.shape == labels.shape:
        shifted.masked_fill_(real == 0, IGNORE)
        shifted[:, :-1].masked_fill_(real[:, 1:] == 0, IGNORE)
    return shifted
