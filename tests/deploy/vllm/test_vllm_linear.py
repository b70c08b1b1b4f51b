"""Packed linears under vLLM's loaders (a stand-in): merged, split over two ranks, checked, and refused in a sentence."""

import functools
import importlib
import json

import pytest
import torch
import torch.nn.functional as F
from fake_vllm import vllm  # noqa: F401  (a fixture)
from packed_models import pack_to, sparse_model
from safetensors.torch import load_file

import sparseforge_fx as sf
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels.layouts import LAYOUTS, PLANES, ROWS

LAYER = "model.layers.0"
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHARDS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}


@pytest.fixture
def linear(vllm):  # noqa: F811
    return importlib.import_module("sparseforge_fx.deploy.vllm.linear")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pack_to(tmp_path_factory.mktemp("packed") / "llama")


def config_of(linear, folder, change=lambda header: None):
    header = json.loads((folder / "config.json").read_text())["quantization_config"]
    change(header)
    config = linear.PackedVllmConfig.from_config(header)
    config.packed_modules_mapping.update(MERGED)
    return config


def build(config, rank=0, size=1, bias=False):
    """The layers that vLLM's Llama has in one block, by name."""
    layers = importlib.import_module("vllm.model_executor.layers.linear")
    distributed = importlib.import_module("vllm.distributed")
    distributed.RANK, distributed.SIZE = rank, size
    names = {n: f"{LAYER}.{n}" for n in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")}
    options = {short: {"quant_config": config, "prefix": name, "bias": bias} for short, name in names.items()}
    return {
        names["self_attn.qkv_proj"]: layers.QKVParallelLinear(32, 16, 2, 1, **options["self_attn.qkv_proj"]),
        names["self_attn.o_proj"]: layers.RowParallelLinear(32, 32, **options["self_attn.o_proj"]),
        names["mlp.gate_up_proj"]: layers.MergedColumnParallelLinear(32, [64, 64], **options["mlp.gate_up_proj"]),
        names["mlp.down_proj"]: layers.RowParallelLinear(64, 32, **options["mlp.down_proj"]),
    }


def load(layers, folder, skip=()):
    """As vLLM's Llama does: every tensor of the file goes to a parameter of a layer, with its shard."""
    seen = []
    for name, tensor in load_file(folder / "model.safetensors").items():
        module, _, leaf = name.rpartition(".")
        parent, _, part = module.rpartition(".")
        merged = next((m for m, parts in MERGED.items() if part in parts), part)
        layer = layers.get(f"{parent}.{merged}")
        if layer is None or name in skip:
            continue
        parameter = dict(layer.named_parameters())[leaf]  # a KeyError here would end vLLM
        parameter.weight_loader(parameter, tensor, *([SHARDS[part]] if part in SHARDS else []))
        seen.append(name)
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)
    return seen


@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_block_of_llama(linear, folder, size, layout, monkeypatch):
    if layout == "planes":
        for entry in (ROWS._replace(kernels={}), PLANES._replace(kernels={"cpu": PLANES.elsewhere})):
            monkeypatch.setitem(LAYOUTS, entry.name, entry)
    ranks = []
    for rank in range(size):
        layers = build(config_of(linear, folder), rank, size)
        seen = load(layers, folder)
        assert len(seen) == 15 and [n for n in seen if n.endswith(".weight")] == [f"{LAYER}.mlp.down_proj.weight"]
        assert all(layer.packed_layout == layout and "weight" not in layer._parameters for layer in layers.values())
        ranks.append(layers)
    block = sparse_model("llama").model.layers[0]
    dense = {name: module.weight.detach() for name, module in block.named_modules() if hasattr(module, "in_features")}
    x, wide = torch.randn(3, 32), torch.randn(3, 64)
    for rank, layers in enumerate(ranks):
        mine = {name: F.linear(x, w).chunk(size, -1)[rank] for name, w in dense.items() if w.shape[1] == 32}
        k, v = (F.linear(x, dense[f"self_attn.{n}_proj"]) for n in "kv")  # one head: on every rank
        want = torch.cat([mine["self_attn.q_proj"], k, v], -1)
        torch.testing.assert_close(layers[f"{LAYER}.self_attn.qkv_proj"](x), want)
        want = torch.cat([mine["mlp.gate_proj"], mine["mlp.up_proj"]], -1)
        torch.testing.assert_close(layers[f"{LAYER}.mlp.gate_up_proj"](x), want)
    for name, given in (("mlp.down_proj", wide), ("self_attn.o_proj", x)):
        parts = zip(ranks, given.chunk(size, -1), strict=True)
        got = sum(layers[f"{LAYER}.{name}"](part.contiguous()) for layers, part in parts)
        torch.testing.assert_close(got, F.linear(given, dense[name]), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def in_codes(tmp_path_factory):
    """in_codes(values): a folder with every linear in codes, the blocks 2:4 and the head dense; and its model."""

    @functools.cache
    def make(values, include="*"):
        model, folder = sparse_model("llama"), tmp_path_factory.mktemp("codes") / values
        sf.quantize(model, values, include=include)
        sf.save_packed(model, None, folder)
        return folder, sf.load(folder)[0]

    return make


@pytest.mark.parametrize(("values", "size"), [("int8", 1), ("int8", 2), ("int4", 1), ("int4/16", 1)])
def test_a_block_in_codes(linear, in_codes, values, size):
    folder, model = in_codes(values)
    ranks = []
    for rank in range(size):
        ranks.append(build(config_of(linear, folder), rank, size))
        assert len(load(ranks[-1], folder)) == 21  # values, bitmask and scales of seven linears; the head has the rest
    modules = dict(model.model.layers[0].named_modules())
    x, wide = torch.randn(3, 32), torch.randn(3, 64)
    for rank, layers in enumerate(ranks):
        k, v = (modules[f"self_attn.{n}_proj"](x) for n in "kv")
        want = torch.cat([modules["self_attn.q_proj"](x).chunk(size, -1)[rank], k, v], -1)
        assert torch.equal(layers[f"{LAYER}.self_attn.qkv_proj"](x), want)
    for name, given in (("mlp.down_proj", wide), ("self_attn.o_proj", x)):
        parts = zip(ranks, given.chunk(size, -1), strict=True)
        got = sum(layers[f"{LAYER}.{name}"](part.contiguous()) for layers, part in parts)
        torch.testing.assert_close(got, modules[name](given), rtol=2e-2, atol=2e-2)  # x is rounded in other groups


def test_rows_that_have_a_scale_each_are_not_split_by_inputs(linear, in_codes):
    folder, _ = in_codes("int4/16")
    with pytest.raises(SparseForgeError, match=r"is 2:4 int4/16, whose rows have a scale each and cannot be split"):
        build(config_of(linear, folder), 0, 2)


@pytest.mark.parametrize("leaf", ["scales", "values"])
def test_rows_that_have_a_scale_each_and_were_not_loaded(linear, in_codes, leaf):
    folder, _ = in_codes("int4/16")
    layers = build(config_of(linear, folder), 0, 1)
    with pytest.raises(SparseForgeError, match=r"zero or not finite|as where no values were loaded"):
        load(layers, folder, skip=[f"{LAYER}.mlp.down_proj.weight_{leaf}"])


def taken(layer, folder, name):
    """Its tensors from the file, as vLLM loads and then processes them."""
    parameters = dict(layer.named_parameters())
    for tensor, value in load_file(folder / "model.safetensors").items():
        if tensor.startswith(f"{name}."):
            parameter = parameters[tensor.removeprefix(f"{name}.")]
            parameter.weight_loader(parameter, value)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [1, 2])
def test_a_head_in_codes(linear, in_codes, size, tied):
    folder, model = in_codes("int8", "*" if tied else ("*proj", "lm_head"))
    heads = importlib.import_module("vllm.model_executor.layers.vocab_parallel_embedding")
    distributed = importlib.import_module("vllm.distributed")
    x, ids, found, rows = torch.randn(3, 32), torch.arange(260).view(2, 130), [], 0
    for rank in range(size):
        distributed.RANK, distributed.SIZE = rank, size
        config = config_of(linear, folder)
        if tied:
            name = "model.embed_tokens" if rank == 0 else ""  # vLLM's Llama does not say it
            table = heads.VocabParallelEmbedding(260, 32, quant_config=config, prefix=name)
            rows += taken(table, folder, "model.embed_tokens")(ids)
        head = heads.ParallelLMHead(260, 32, quant_config=config, prefix="lm_head")
        assert not tied or not dict(head.named_parameters())
        found.append((head if tied else taken(head, folder, "lm_head")).quant_method.apply(head, x))
    found = torch.cat(found, -1)
    assert torch.equal(found[:, :260], model.lm_head(x)) and not found[:, 260:].any() and found.shape[1] == 320
    assert not tied or torch.equal(rows, model.model.embed_tokens(ids))


def test_a_head_without_its_embedding(linear, in_codes):
    folder, _ = in_codes("int8")
    heads = importlib.import_module("vllm.model_executor.layers.vocab_parallel_embedding")
    with pytest.raises(SparseForgeError, match=r"'lm_head' is tied to 'model.embed_tokens', which is not built here"):
        heads.ParallelLMHead(260, 32, quant_config=config_of(linear, folder), prefix="lm_head")


def test_codes_that_are_refused(linear, in_codes):
    def changed(name, text):
        def change(header):
            header["modules"][f"{LAYER}.{name}"]["format"] = text

        return config_of(linear, folder, change)

    folder, _ = in_codes("int4")
    with pytest.raises(SparseForgeError, match=r"merges '.*q_proj' \(2:4 int4/32\) with '.*k_proj' \(2:4 int8\): give"):
        build(changed("self_attn.k_proj", "2:4 int8"))
    with pytest.raises(SparseForgeError, match="share of 16 of 32 inputs is no multiple of the 32 that"):
        build(config_of(linear, folder), size=2)
    for tensor in ("weight_values", "weight_scales"):
        with pytest.raises(SparseForgeError, match=r"down_proj.: a (code|scale).*copy the checkpoint anew"):
            load(build(config_of(linear, folder)), folder, skip=f"{LAYER}.mlp.down_proj.{tensor}")


def test_biases(linear, folder):
    layers = build(config_of(linear, folder), bias=True)
    load(layers, folder)
    down = layers[f"{LAYER}.mlp.down_proj"]
    x = torch.randn(2, 64)
    torch.testing.assert_close(down(x), F.linear(x, sparse_model("llama").model.layers[0].mlp.down_proj.weight) + 1)


def test_dense_layers_stay_vllms_own(linear, folder):
    config = config_of(linear, folder)
    layers = importlib.import_module("vllm.model_executor.layers.linear")
    other = layers.RowParallelLinear(8, 8, quant_config=config, prefix="vision.proj")
    assert type(other.quant_method) is layers.UnquantizedLinearMethod
    assert config.get_quant_method(torch.nn.Identity(), "model.layers.0.attn") is None
    assert config.get_name() == "sparseforge" and torch.bfloat16 in config.get_supported_act_dtypes()


def test_names_of_another_model(linear, folder, in_codes):
    class Mapper:
        def apply_dict(self, values):
            return {f"language_model.{k}": v for k, v in values.items()}

        def apply_list(self, values):
            return [f"language_model.{k}" for k in values]

    tied = config_of(linear, in_codes("int8")[0])
    tied.apply_vllm_mapper(Mapper())
    assert tied.embeddings == {"language_model.model.embed_tokens": "language_model.lm_head"}
    config = config_of(linear, folder)
    config.apply_vllm_mapper(Mapper())
    name = "language_model.model.layers.1.mlp.gate_up_proj"
    assert isinstance(
        config.get_quant_method(linear.LinearBase.__new__(linear.LinearBase), name), linear.PackedLinearMethod
    )


def test_what_is_refused(linear, folder):
    def without(name):
        return config_of(linear, folder, lambda header: header["modules"].pop(f"{LAYER}.{name}"))

    with pytest.raises(SparseForgeError, match=r"merges '.*q_proj', which is packed, with '.*v_proj', which is dense"):
        build(without("self_attn.v_proj"))
    with pytest.raises(SparseForgeError, match="share of 4 of 32 inputs is no multiple of the 8 that"):
        build(config_of(linear, folder), size=8)
    with pytest.raises(
        SparseForgeError, match=r"which has to be dense: load it with sf\.load, then save .*, and serve that"
    ):
        config_of(linear, folder).get_quant_method(torch.nn.Embedding(2, 2), f"{LAYER}.mlp.up_proj")
    with pytest.raises(SparseForgeError, match="format_version"):
        config_of(linear, folder, lambda header: header.pop("format_version"))
    with pytest.raises(SparseForgeError, match=r"qkv_proj': .*two bits.*copy the checkpoint anew"):  # it has no k
        load(build(config_of(linear, folder)), folder, skip=f"{LAYER}.self_attn.k_proj.weight_bitmask")


def test_packed_experts_are_refused(linear, folder):
    def add(header):
        stack = {"shape": [4, 8, 8], "dtype": "float32", "transposed": False}
        header |= {"stacks": {f"{LAYER}.mlp.experts.down_proj": stack}, "format_version": 3}

    with pytest.raises(SparseForgeError, match=r"down_proj' is a packed stack of experts.* serve that"):
        config_of(linear, folder, add)
