"""Dense models by name: a folder, a hub id or a GGUF file in; a plain Hugging Face folder out."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers.initialization import no_init_weights

from sparseforge_fx.errors import SparseForgeError, SparseForgeWarning, one_line
from sparseforge_fx.graph.forward import unwrapped
from sparseforge_fx.kernels.packed import METHOD
from sparseforge_fx.models import low_rank
from sparseforge_fx.models.beside_adapters import has_adapters, save_both
from sparseforge_fx.models.loading_bar import loading_bar

ADAPTER = "adapter_config.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
GGUF_DTYPE = torch.bfloat16  # of weights that are dequantised
UNPACK = "load it with sf.load, then save what model.dequantize() gives"
HUB_TIMEOUT = 10.0  # seconds until the hub counts as not reachable
_MERGE = f"a PEFT adapter ({ADAPTER}): merge it into its base model (merge_and_unload), or take its files away"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class Location(NamedTuple):
    """What the ``from_pretrained`` functions want: a folder or hub id, and options that belong to it."""

    name: str
    options: dict[str, Any]

    @property
    def gguf(self) -> bool:
        return "gguf_file" in self.options

    def quick(self) -> AbstractContextManager[None]:
        """Inside, transformers reads the header of a GGUF file quickly."""
        if not self.gguf:
            return nullcontext()
        from sparseforge_fx.models.gguf import quick_reader

        return quick_reader()


def load_dense(
    name: str | Path, *, dtype: str | torch.dtype | None = None, device: Any = None, device_map: Any = None
) -> tuple[nn.Module, Any]:
    """The model, in eval mode, and its tokenizer (None for a model without a vocabulary, and for a folder without one).

    Args:
        name: a Hugging Face folder, a hub id, or a GGUF file (or a folder that holds one and nothing else to load).
        dtype: ``bfloat16``, ``float16``, ``float32``. None: the checkpoint's own; bfloat16 for a GGUF file, whose
            weights are dequantised.
        device: all of the model goes there; None: the CPU. device_map: or what ``from_pretrained`` takes.

    Raises SparseForgeError: nothing of that name, the hub is not reachable, not a model, weights missing from the
    checkpoint, weights that are packed or stay quantised, a tokenizer that cannot be loaded. Warns of tensors in the
    checkpoint that the model does not read. Code that comes with a checkpoint is never run.
    """
    where = locate(name)
    wanted = find_dtype(dtype)
    config = load_config(where)
    tokenizer = load_tokenizer(where, config)
    options: dict[str, Any] = {"dtype": wanted or "auto", "config": config, **where_to(device, device_map)}
    if where.gguf:
        options["dtype"] = wanted or GGUF_DTYPE
        if hasattr(transformers, "GgufConfig"):  # before it came, every GGUF file was dequantised
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    elif is_packed(config):
        raise SparseForgeError(f"the weights of {name} are packed, and must be dense here: {UNPACK}")
    elif getattr(config, "quantization_config", None) is not None:
        raise SparseForgeError(
            f"the weights of {name} are quantised: give a checkpoint in bfloat16, float16 or float32"
        )
    with explained(f"cannot load the model {name}"), where.quick(), loading_bar(str(name)):
        model, loading = model_class(config).from_pretrained(
            where.name, output_loading_info=True, **options, **where.options
        )
    if has_adapters(model):  # of the hub
        raise SparseForgeError(f"{name} holds {_MERGE}")
    absent = sorted(loading.get("missing_keys") or ())
    if absent:
        raise SparseForgeError(
            f"the checkpoint {name} lacks {len(absent)} weights of its model, {absent[0]} the first of them"
        )
    unread = set(loading.get("unexpected_keys") or ())
    if names := low_rank.branch_names(unread):
        low_rank.rebuild(model, _read_tensors(where, names))
    if unread := unread - set(names):
        warnings.warn(
            f"{name} holds {len(unread)} tensors that its model does not read, {min(unread)} the first of them: "
            "what is made of it will not have them",
            SparseForgeWarning,
            stacklevel=2,
        )
    if where.gguf and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain now, and must be loaded as such
    return model.eval(), tokenizer


def load_skeleton(name: str | Path) -> nn.Module:
    """The model without weights, on the meta device: shapes and graph only, whatever its size."""
    where = locate(name)
    config = load_config(where)
    if where.gguf:
        config.dtype = GGUF_DTYPE
    return make_skeleton(config, name).eval()


def make_skeleton(config: Any, name: str | Path) -> Any:
    """The model of a config on the meta device, in the dtype that the config names. Buffers have no values either."""
    cls = model_class(config)
    with explained(f"cannot build the model of {name}"), torch.device("meta"), no_init_weights(), _dtype(config):
        model = cls.from_config(config) if cls is transformers.AutoModelForCausalLM else cls(config)
        model.tie_weights()
    return model


@contextmanager
def _dtype(config: Any) -> Iterator[None]:
    """A class that is called, not loaded, makes its weights in the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(config, "dtype", None) or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def write_checkpoint(model: Any, tokenizer: Any, folder: Path) -> None:
    """``save_pretrained`` of both into a folder, which then does not say that it is sparse: every loader takes it for a
    dense one. Low-rank branches (``slorb_block``) are further tensors: :func:`load_dense` rebuilds them, other loaders
    leave them out. PEFT's adapters go into a folder of their own inside (models/beside_adapters.py). Of a module that
    is none of transformers', its state is written, for ``huggingface_hub.load_torch_model``."""
    model = unwrapped(model)
    if has_adapters(model):
        save_both(model, folder)
    elif hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        save_torch_state_dict(model.state_dict(), folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


# -- finding ---------------------------------------------------------------------------------------------------------
def locate(name: str | Path) -> Location:
    """Where the files of a model are. Asks the hub, with a short timeout, only for what is no local path."""
    text = os.path.expanduser(str(name))
    path = Path(text)
    if path.is_file():
        if path.suffix != ".gguf":
            raise SparseForgeError(
                f"{name} is a file but not a .gguf file: give a model folder, a hub id or a GGUF file"
            )
        return Location(str(path.absolute().parent), {"gguf_file": path.name})  # links, as the hub's cache has, stay
    if path.is_dir():
        if (path / "config.json").is_file():
            return Location(str(path), {})
        _refuse_adapter(path)
        found = sorted(path.glob("*.gguf"))
        if len(found) == 1:
            return Location(str(path), {"gguf_file": found[0].name})
        several = f"{len(found)} GGUF files: name one" if found else "no config.json: it is not a Hugging Face model"
        raise SparseForgeError(f"the folder {name} holds {several}")
    if not _HUB_ID.fullmatch(text) or path.suffix == ".gguf":
        raise SparseForgeError(f"there is no model folder or file {name}: check the path")
    return Location(text, _ask_hub(text))


def _refuse_adapter(folder: str | Path) -> None:
    """Raise SparseForgeError if an adapter lies there, which transformers would put onto a model that it names."""
    if (Path(folder) / ADAPTER).is_file():
        raise SparseForgeError(f"the folder {folder} holds {_MERGE}")


def _ask_hub(name: str) -> dict[str, Any]:
    """Options for a hub id: cached files only, if the hub does not answer at once. (from_pretrained would retry.)"""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except GatedRepoError as error:
        raise SparseForgeError(
            f"the model {name} is gated: ask for access on its hub page and log in with 'hf auth login'"
        ) from error
    except RepositoryNotFoundError as error:
        raise SparseForgeError(
            f"there is no folder {name} here and no model of that name on the hub (or it is private)"
        ) from error
    except Exception as error:  # an open set of types: DNS, proxy, TLS, timeout, offline mode, server errors
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return {"local_files_only": True}
        raise SparseForgeError(
            f"there is no folder {name} here, and the hub cannot be asked for it "
            f"({type(error).__name__}: {one_line(error, lines=None)})"
        ) from error
    return {}


# -- loading ---------------------------------------------------------------------------------------------------------
def load_config(where: Location) -> Any:
    """The configuration of a model."""
    _refuse_adapter(where.name)
    with explained(f"cannot read the configuration of {where.name}"), where.quick():
        return transformers.AutoConfig.from_pretrained(where.name, trust_remote_code=False, **where.options)


def load_tokenizer(where: Location, config: Any) -> Any:
    """The tokenizer, or None for a model without a vocabulary, and for a folder without a tokenizer's files.

    Raises SparseForgeError where there is one that cannot be loaded, or that knows no words: transformers makes one of
    special tokens alone for some models whose files have none, which reads every text as unknown.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not getattr(text, "vocab_size", None) or not _may_have_tokenizer(where):
        return None
    with explained(f"the model {where.name} has no tokenizer that can be loaded"), where.quick():
        found = transformers.AutoTokenizer.from_pretrained(where.name, trust_remote_code=False, **where.options)
    if len(found) <= len({*found.all_special_ids, *getattr(found, "added_tokens_decoder", ())}):
        raise SparseForgeError(f"the tokenizer of {where.name} knows no words: copy all of its files there")
    return found


def _may_have_tokenizer(where: Location) -> bool:
    """Whether a folder has files of a tokenizer; of anything else nobody knows yet."""
    folder = Path(where.name)
    if where.gguf or not folder.is_dir():
        return True
    patterns = ("*token*", "*vocab*", "merges.*", "*.model", "tekken.json")
    return any(not file.name.endswith(".safetensors") for pattern in patterns for file in folder.glob(pattern))


def _read_tensors(where: Location, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint's safetensors files by name."""
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    folder = Path(where.name)
    if not folder.is_dir():  # a hub id, whose files are here by now
        folder = Path(snapshot_download(where.name, allow_patterns=["*.safetensors"], local_files_only=True))
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in set(names) & set(file.keys())}
    return found


def is_packed(config: Any) -> bool:
    """Did ``save_packed`` write this configuration, or config.json as a dict?"""
    for name in ("quantization_config", "quant_method"):
        config = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
    return config == METHOD


def where_to(device: Any, device_map: Any) -> dict[str, Any]:
    """Options of ``from_pretrained`` that put a model somewhere."""
    if device is not None and device_map is not None:
        raise SparseForgeError("device and device_map both say where the model goes: give one of the two")
    return {} if device is None and device_map is None else {"device_map": device_map or {"": device}}


def model_class(config: Any) -> Any:
    """The class that wrote the checkpoint, if transformers has it; else the configuration's causal language model."""
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM


def find_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of that name. Raises SparseForgeError for others than :data:`DTYPES`."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise SparseForgeError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever goes wrong inside into a SparseForgeError: ``what``, and the reason in one line."""
    try:
        yield
    except SparseForgeError:
        raise
    except (
        Exception
    ) as error:  # an open set of types: json, safetensors, gguf, tokenizers, validation of configurations
        raise SparseForgeError(f"{what}: {one_line(error, lines=None)}") from error
