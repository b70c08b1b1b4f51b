"""A stand-in for vLLM, as small as our plugin needs: names, signatures and sharding rules of vLLM 0.33's linear layers.

``vllm.distributed.RANK`` and ``SIZE`` say which rank of how many a layer belongs to.
"""

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FILES = {
    "__init__.py": "",
    "distributed.py": "RANK, SIZE = 0, 1",
    "model_executor/__init__.py": "",
    "model_executor/layers/__init__.py": "",
    "model_executor/utils.py": """
def set_weight_attrs(weight, weight_attrs):
    for name, value in (weight_attrs or {}).items():
        assert not hasattr(weight, name), name
        setattr(weight, name, value)
""",
    "model_executor/parameter.py": """
from torch.nn import Parameter
from vllm import distributed

class ModelWeightParameter(Parameter):
    def __new__(cls, data, **_):
        return super().__new__(cls, data=data, requires_grad=False)

    def __init__(self, *, data, input_dim, output_dim, weight_loader):
        self.input_dim, self.output_dim, self.weight_loader = input_dim, output_dim, weight_loader

    def _take(self, dim, offset, size, loaded, shard):
        place, part = self.data.narrow(dim, offset, size), loaded.narrow(dim, shard * size, size)
        assert place.shape == part.shape
        place.copy_(part)

    def load_row_parallel_weight(self, loaded_weight):
        self._take(self.input_dim, 0, self.data.shape[self.input_dim], loaded_weight, distributed.RANK)

    def load_merged_column_weight(self, loaded_weight, *, shard_offset, shard_size, **_):
        self._take(self.output_dim, shard_offset, shard_size, loaded_weight, distributed.RANK)

    def load_qkv_weight(self, loaded_weight, *, shard_offset, shard_size, shard_id, num_heads):
        rank = distributed.RANK if shard_id == "q" else distributed.RANK // num_heads
        self._take(self.output_dim, shard_offset, shard_size, loaded_weight, rank)

class GroupQuantScaleParameter(ModelWeightParameter): ...

class ChannelQuantScaleParameter(ModelWeightParameter):
    def __init__(self, *, data, output_dim, weight_loader):
        super().__init__(data=data, input_dim=None, output_dim=output_dim, weight_loader=weight_loader)

    def load_row_parallel_weight(self, loaded_weight):
        assert self.data.shape == loaded_weight.shape
        self.data.copy_(loaded_weight)
""",
    "model_executor/layers/vocab_parallel_embedding.py": """
import torch
from vllm import distributed

class VocabParallelEmbedding(torch.nn.Module):
    PADDING = 64

    def __init__(self, num_embeddings, embedding_dim, params_dtype=None, quant_config=None, prefix=""):
        super().__init__()
        self.org_vocab_size, padded = num_embeddings, -(-num_embeddings // self.PADDING) * self.PADDING
        share = padded // distributed.SIZE
        self.start = min(num_embeddings, distributed.RANK * share)
        self.num_org_embeddings_per_partition = min(num_embeddings, self.start + share) - self.start
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        self.quant_method.create_weights(self, embedding_dim, [share], embedding_dim, padded,
            params_dtype=torch.get_default_dtype(), weight_loader=self.weight_loader)

    def weight_loader(self, param, loaded_weight):
        assert loaded_weight.shape[param.output_dim] == self.org_vocab_size
        part = loaded_weight.narrow(param.output_dim, self.start, self.num_org_embeddings_per_partition)
        param[: part.shape[0]].data.copy_(part)
        param[part.shape[0] :].data.fill_(0)

    def forward(self, input_):
        other = (input_ < self.start) | (input_ >= self.start + self.num_org_embeddings_per_partition)
        found = self.quant_method.embedding(self, (input_ - self.start).masked_fill(other, 0))
        return found.masked_fill(other[..., None], 0)

class ParallelLMHead(VocabParallelEmbedding): ...
""",
    "model_executor/layers/quantization/base_config.py": """
from abc import ABC, abstractmethod

class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer, *weight_args, **extra_weight_attrs): ...
    @abstractmethod
    def apply(self, layer, *args, **kwargs): ...
    def process_weights_after_loading(self, layer): ...

class QuantizationConfig(ABC):
    def __init__(self):
        self.packed_modules_mapping = {}
    @abstractmethod
    def get_name(self): ...
    @abstractmethod
    def get_supported_act_dtypes(self): ...
    @classmethod
    @abstractmethod
    def get_min_capability(cls): ...
    @staticmethod
    @abstractmethod
    def get_config_filenames(): ...
    @classmethod
    @abstractmethod
    def from_config(cls, config): ...
    @abstractmethod
    def get_quant_method(self, layer, prefix): ...
""",
    "model_executor/layers/quantization/__init__.py": """
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

QUANTIZATION_METHODS = ["fp8"]
REGISTERED = []

def register_quantization_config(quantization):
    def wrap(cls):
        if quantization in QUANTIZATION_METHODS:
            raise ValueError(quantization)
        assert issubclass(cls, QuantizationConfig)
        QUANTIZATION_METHODS.append(quantization)
        REGISTERED.append(cls)
        return cls
    return wrap
""",
    "model_executor/layers/linear.py": """
import torch
from vllm import distributed
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

V2 = ["UnquantizedLinearMethod"]

def register_weight_loader_v2_supported_method(cls):
    V2.append(cls.__name__)
    return cls

class LinearMethodBase(QuantizeMethodBase): ...

class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size,
                       params_dtype, **extra_weight_attrs): ...
    def apply(self, layer, x, bias=None): ...

class LinearBase(torch.nn.Module):
    def _create(self, input_size, output_sizes, quant_config, prefix, *, split_inputs=False, bias=False):
        torch.nn.Module.__init__(self)
        self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
        assert type(self.quant_method).__name__ in V2
        width = input_size // distributed.SIZE if split_inputs else input_size
        self.quant_method.create_weights(
            layer=self, input_size_per_partition=width, output_partition_sizes=output_sizes, input_size=input_size,
            output_size=sum(output_sizes), params_dtype=torch.get_default_dtype(), weight_loader=self.weight_loader_v2)
        self.bias = torch.nn.Parameter(torch.ones(sum(output_sizes)), requires_grad=False) if bias else None

    def forward(self, input_):
        return self.quant_method.apply(self, input_, self.bias)

class MergedColumnParallelLinear(LinearBase):
    def __init__(self, input_size, output_sizes, **options):
        sizes = [size // distributed.SIZE for size in output_sizes]
        self._create(input_size, sizes, **options)
        self.output_sizes = sizes

    def weight_loader_v2(self, param, loaded_weight, loaded_shard_id):
        offset, size = sum(self.output_sizes[:loaded_shard_id]), self.output_sizes[loaded_shard_id]
        param.load_merged_column_weight(
            loaded_weight=loaded_weight, shard_id=loaded_shard_id, shard_offset=offset, shard_size=size)

class QKVParallelLinear(LinearBase):
    def __init__(self, hidden_size, head_size, total_num_heads, total_num_kv_heads, **options):
        q = total_num_heads // distributed.SIZE * head_size
        kv = max(1, total_num_kv_heads // distributed.SIZE) * head_size
        self._create(hidden_size, [q, kv, kv], **options)
        self.replicas = max(1, distributed.SIZE // total_num_kv_heads)
        self.places = {"q": (0, q), "k": (q, kv), "v": (q + kv, kv)}

    def weight_loader_v2(self, param, loaded_weight, loaded_shard_id):
        offset, size = self.places[loaded_shard_id]
        param.load_qkv_weight(loaded_weight=loaded_weight, num_heads=self.replicas, shard_id=loaded_shard_id,
            shard_offset=offset, shard_size=size)

class RowParallelLinear(LinearBase):
    def __init__(self, input_size, output_size, **options):
        self._create(input_size, [output_size], split_inputs=True, **options)

    def weight_loader_v2(self, param, loaded_weight):
        param.load_row_parallel_weight(loaded_weight=loaded_weight)
""",
}


def write(folder: Path) -> Path:
    """The package ``vllm`` in ``folder``."""
    for name, text in FILES.items():
        path = folder / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def forget():
    for name in list(sys.modules):
        if name.split(".")[0] == "vllm" or name == "sparseforge_fx.deploy.vllm.linear":
            del sys.modules[name]


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """A folder with a package ``vllm`` that imports find."""
    monkeypatch.syspath_prepend(write(tmp_path))
    forget()
    yield tmp_path
    forget()


def modules() -> dict[str, ModuleType]:
    """What the stand-in has, by its dotted name, from whichever vLLM imports find."""
    names = ["vllm." + name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in FILES]
    ours = ("vllm.__init__", "vllm.distributed")  # the second holds the test's ranks
    return {name: importlib.import_module(name) for name in names if name not in ours}


def differences(stand_in: dict[str, ModuleType], real: dict[str, ModuleType]) -> list[str]:
    """Calls that the stand-in takes and the real one does not, and names that the real one lacks."""
    found = []
    for name, module in stand_in.items():
        for path, signature in _signatures(module):
            owner, _, leaf = path.rpartition(".")
            there = getattr(real[name], owner, None) if owner else real[name]
            if not hasattr(there, leaf):
                found.append(f"{name} has no {path}")
            elif why := _refused(signature, inspect.signature(getattr(there, leaf))):
                found.append(f"{name}.{path}{signature}: {why}")
    return found


def _signatures(module: ModuleType) -> Iterator[tuple[str, inspect.Signature]]:
    """Of every function, and of the methods that each class writes down itself; not of helpers that begin with _."""
    mine = {n: v for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__}
    for name, value in mine.items():
        if inspect.isfunction(value):
            yield name, inspect.signature(value)
        elif inspect.isclass(value):
            for method in vars(value):
                if callable(getattr(value, method)) and (method == "__init__" or not method.startswith("_")):
                    yield f"{name}.{method}", inspect.signature(getattr(value, method))


def _refused(given: inspect.Signature, real: inspect.Signature) -> str | None:
    """Why the call that ``given`` describes, its parameters by position and by name, is none for ``real``."""
    places = [p.name for p in given.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = {p.name: None for p in given.parameters.values() if p.kind is p.KEYWORD_ONLY}
    try:
        bound = real.bind(*places, **names)
    except TypeError as error:
        return f"{error} in {real}"
    moved = [n for n, to in bound.arguments.items() if isinstance(to, str) and n != to]  # not what *args took
    return f"{', '.join(moved)} stands there in {real}" if moved else None
