"""One repeated block, compiled once: what is found, that outlining changes no bit, and how often the compiler runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from sparseforge_fx.graph.compile import SharedBlock, compile_repeated_blocks, count_blocks
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.kernels.soft_masked_linear import OP
from sparseforge_fx.passes import find_linears, insert_hessian_hooks, insert_soft_masks

IDS = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """x + w2(act(w1(norm(x)))), with a size that the graph has to compute."""

    def __init__(self, width: int = 16, act: type[nn.Module] = nn.GELU):
        super().__init__()
        self.norm, self.act = nn.LayerNorm(width), act()
        self.w1, self.w2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.register_buffer("mask", torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.w2(self.act(self.w1(self.norm(x * self.mask))))
        return x + y.reshape(x.shape[0] * x.shape[1], -1).reshape(x.shape).mul(0.5)


class Stack(nn.Module):
    """Blocks between an input and an output projection; parameters and buffers of the root itself too."""

    def __init__(self, *blocks: nn.Module, width: int = 16):
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(blocks)
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("shift", torch.zeros(width))

    def forward(self, x: Tensor, *, flag: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        h = self.first(x) * self.scale + self.shift
        for block in self.blocks:
            h = block(h)
        return {"hidden": h, "out": self.last(h)}


def _export(model: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None) -> torch.export.ExportedProgram:
    def dims(x: Any) -> Any:
        return {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} if isinstance(x, Tensor) else None

    shapes = pytree.tree_map(dims, args) or pytree.tree_map(dims, kwargs)
    return torch.export.export(model.eval(), args, kwargs, dynamic_shapes=shapes, strict=False)


def _stack(*blocks: nn.Module) -> GraphModule:
    return _export(Stack(*blocks), (torch.randn(2, 5, 4),)).module()


def _transformers(name: str, **config: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    kind, _, task = name.partition(":")
    tokens = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return getattr(transformers, kind + task)(getattr(transformers, kind + "Config")(**tokens, **config))


LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}


def _llama(layers: int) -> nn.Module:
    return _transformers("Llama:ForCausalLM", num_hidden_layers=layers, use_cache=False, **LLAMA)


def _gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(num_hidden_layers=4, layer_types=kinds, sliding_window=4, vocab_size=64, **LLAMA)
    config.use_cache = False
    return Gemma3ForCausalLM(config)


#: name -> (model, inputs, what repeats)
ZOO: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], list[tuple[str, int]]]] = {
    "llama": (lambda: _llama(3), {"input_ids": IDS}, [("model.layers", 3)]),
    "gpt2": (
        lambda: _transformers("GPT2:LMHeadModel", n_embd=16, n_head=2, n_layer=2, n_positions=16, use_cache=False),
        {"input_ids": IDS},
        [("transformer.h", 2)],
    ),
    "opt": (
        lambda: _transformers(
            "OPT:ForCausalLM", hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_attention_heads=2,
            num_hidden_layers=2, max_position_embeddings=16, use_cache=False,
        ),
        {"input_ids": IDS},
        [("model.decoder.layers", 2)],
    ),
    # the first block of each stack computes the position bias for the others
    "t5": (
        lambda: _transformers(
            "T5:ForConditionalGeneration", d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, use_cache=False
        ),
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :6].clone()},
        [("encoder.block", 1), ("encoder.block", 2), ("decoder.block", 1), ("decoder.block", 2)],
    ),
    # sliding and full attention differ in the mask and the rotary tables that they read, not in what they compute
    "gemma3": (_gemma3, {"input_ids": IDS}, [("model.layers", 4)]),
    # a dense layer before the experts
    "qwen3-moe": (
        lambda: _transformers(
            "Qwen3Moe:ForCausalLM", num_hidden_layers=3, mlp_only_layers=[0], num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=8, use_cache=False, **LLAMA,
        ),
        {"input_ids": IDS},
        [("model.layers", 1), ("model.layers", 2)],
    ),
    # one module called twice
    "albert": (
        lambda: _transformers("Albert:Model", num_hidden_layers=2, embedding_size=8, **SIZES),
        {"input_ids": IDS},
        [("encoder.albert_layer_groups", 2)],
    ),
}  # fmt: skip


@functools.cache
def _zoo(name: str) -> GraphModule:
    build, inputs, _ = ZOO[name]
    return _export(build(), (), inputs).module()


def _run(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor | None]]:
    """Outputs, and gradients of the sum of their squares."""
    output = module(*args, **kwargs)
    leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    torch.stack([t.float().square().sum() for t in leaves]).sum().backward()
    grads = {n: p.grad for n, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = None
    return output, grads


def _assert_same(a: tuple, b: tuple, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    assert type(a[0]) is type(b[0]) and list(a[1]) == list(b[1])
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        if isinstance(x, Tensor):
            torch.testing.assert_close(y, x, **tolerance)
        else:
            assert x == y


@pytest.mark.parametrize("name", ZOO)
def test_outlining_changes_no_bit(name):
    module, inputs = _zoo(name), ZOO[name][1]
    code, nodes = module.code, list(module.graph.nodes)
    assert count_blocks(module) == ZOO[name][2]

    twin = compile_repeated_blocks(module, compile=False)
    assert [(b.path, b.count) for b in twin.children() if isinstance(b, SharedBlock)] == ZOO[name][2]
    assert len(twin.graph.nodes) < len(nodes)
    _assert_same(_run(module, **inputs), _run(twin, **inputs))
    longer = {k: torch.cat([v, v[:, :3]], 1)[:, :11] for k, v in inputs.items()}
    _assert_same(_run(module, **longer), _run(twin, **longer))

    assert module.code == code and list(module.graph.nodes) == nodes
    assert not any(isinstance(m, SharedBlock) for m in module.modules())
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = list(getattr(twin, kind)()), list(getattr(module, kind)())
        assert [n for n, _ in ours] == [n for n, _ in theirs]
        assert all(a is b for (_, a), (_, b) in zip(ours, theirs, strict=True))
    assert list(twin.state_dict()) == list(module.state_dict())


def test_signature_and_input_checks_stay():
    module = _stack(Block(), Block())
    twin = compile_repeated_blocks(module, compile=False)
    assert set(twin(torch.randn(3, 7, 4))) == {"hidden", "out"}
    for wrong in ((), (torch.randn(3, 7, 4), 1)):
        with pytest.raises(ValueError, match="spec"):
            twin(*wrong)
    with pytest.raises(AssertionError, match="Guard failed"):
        twin(torch.randn(3, 7, 5))
    with pytest.raises(NotImplementedError):
        twin.train()


def test_tensors_put_into_the_module_later_are_seen():
    module = _stack(Block(), Block())
    twin = compile_repeated_blocks(module, compile=False)
    module.double()  # replaces buffers, those of the root included
    module.get_submodule("blocks.1")._buffers["mask"] = torch.zeros(16).double()
    x = torch.randn(2, 5, 4).double()
    # the exported graph checks dtypes where it was told to; this one was not
    _assert_same(_run(module, x), _run(twin, x))
    assert twin(x)["out"].dtype == torch.float64


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([Block, Block, lambda: Block(act=nn.ReLU), Block], [("blocks", 3), ("blocks", 1)]),
        ([Block, lambda: Block(act=nn.ReLU)] * 2, [("blocks", 2), ("blocks", 2)]),
        ([lambda: Block(act=lambda: nn.GELU("tanh")), Block, Block], [("blocks", 1), ("blocks", 2)]),
        ([Block, lambda: Block(act=nn.ReLU), lambda: Block(act=nn.SiLU)], []),
        # nested: the outer blocks repeat; or they do not and the inner ones do
        ([lambda: nn.Sequential(Block(), Block())] * 2, [("blocks", 2)]),
        (
            [lambda: nn.Sequential(Block(), Block()), lambda: nn.Sequential(Block(), Block(), nn.Tanh())],
            [("blocks.0", 4)],
        ),
    ],
)  # fmt: skip
def test_only_equal_programs_are_joined(blocks, expected):
    module = _stack(*(b() for b in blocks))
    assert count_blocks(module) == expected
    x = torch.randn(3, 4, 4)
    _assert_same(_run(module, x), _run(compile_repeated_blocks(module, compile=False), x))


def test_a_frozen_or_differently_typed_layer_is_another_kind():
    frozen = Block().requires_grad_(False)
    assert count_blocks(_stack(Block(), Block(), frozen)) == [("blocks", 2), ("blocks", 1)]
    wide = Block()
    wide.mask = wide.mask.double().to(torch.bfloat16)
    assert count_blocks(_stack(Block(), Block(), wide)) == [("blocks", 2), ("blocks", 1)]


def test_sizes_and_weights_that_stand_inside_a_range_are_moved_ahead():
    module = _stack(Block(), Block(), Block())
    graph = module.graph
    first_norm = graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default)[0]
    ids = graph.find_nodes(op="placeholder")[0]
    with graph.inserting_before(first_norm):  # in block 0, read by all blocks, in nobody's module stack
        size = graph.call_function(torch.ops.aten.sym_size.int, (ids, 1))
        size.meta["val"] = ids.meta["val"].shape[1]
        extra = graph.get_attr("scale")
        extra.meta["val"] = first_norm.meta["val"]
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default):
        with graph.inserting_before(node):
            scaled = graph.call_function(torch.ops.aten.mul.Tensor, (node.args[0], extra))
            scaled = graph.call_function(torch.ops.aten.narrow.default, (scaled, 1, 0, size))
            scaled.meta = dict(node.meta)
        node.args = (scaled, *node.args[1:])
    module.recompile()
    assert count_blocks(module) == [("blocks", 3)]
    x = torch.randn(3, 4, 4)
    _assert_same(_run(module, x), _run(compile_repeated_blocks(module, compile=False), x))


def test_a_block_under_no_grad_keeps_its_inner_graph():
    class Half(Block):
        def forward(self, x):
            with torch.no_grad():
                scale = x.abs().mean(-1, keepdim=True).clamp(min=1e-3).reciprocal()
            return super().forward(x * scale)

    module = _stack(Half(), Half())
    assert count_blocks(module) == [("blocks", 2)]
    x = torch.randn(3, 4, 4)
    _assert_same(_run(module, x), _run(compile_repeated_blocks(module, compile=False), x))


def test_without_repeats_the_whole_graph_is_compiled():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    module = _export(model, (torch.randn(2, 4),)).module()
    assert count_blocks(module) == []
    backend = CompileCounterWithBackend("aot_eager")
    twin = compile_repeated_blocks(module, backend=backend)
    x = torch.randn(5, 4)
    _assert_same(_run(module, x), _run(twin, x))
    assert backend.frame_count == 1 and module._compiled_call_impl is None
    assert list(twin.state_dict()) == list(module.state_dict())


def _masked(layers: int) -> GraphModule:
    """A Llama after the training passes: soft masks, and probes whose gradient is the curvature."""
    program = Exported(_export(_llama(layers), (), {"input_ids": IDS}))
    insert_soft_masks(program, find_linears(program))
    insert_hessian_hooks(program)
    module = program.module()
    generator = torch.Generator().manual_seed(1)
    for name, buffer in module.named_buffers():
        if name.endswith("_mask"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator))
    return module


@pytest.mark.parametrize(("depth", "frozen"), [(2, False), (6, False), (6, True)])
def test_compiles_once_whatever_the_depth(depth, frozen):
    torch._dynamo.reset()
    module = _stack(*(Block() for _ in range(depth)))
    if frozen:  # what comes before the blocks, as an embedding often is
        module.get_submodule("first").requires_grad_(False)
        module.scale.requires_grad_(False)
    backend = CompileCounterWithBackend("aot_eager")
    twin = compile_repeated_blocks(module, backend=backend)
    lengths = {5: 1} if depth == 6 else {5: 1, 7: 2, 9: 2}  # a second length makes that size symbolic, once
    for length, frames in lengths.items():
        x = torch.randn(2, length, 4)
        _assert_same(_run(module, x), _run(twin, x), rtol=1e-5, atol=1e-5)
        assert backend.frame_count == frames
    torch._dynamo.reset()


def test_soft_masked_llama_compiles_once_and_its_curvature_leaves_through_hooks():
    module = _masked(3)
    assert count_blocks(module) == [("model.layers", 3)]
    backend = CompileCounterWithBackend("aot_eager")
    twin = compile_repeated_blocks(module, backend=backend)
    block = next(b for b in twin.children() if isinstance(b, SharedBlock))
    assert sum(n.target is OP for n in block.body.graph.nodes) == 7
    probes = {n: p for n, p in module.named_parameters() if n.endswith("_probe")}
    seen: list[str] = []
    for name, probe in probes.items():
        probe.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    eager = _run(module, input_ids=IDS)
    assert all(eager[1][name].abs().sum() > 0 for name in probes)
    assert sorted(seen) == sorted(probes)
    _assert_same(eager, _run(twin, input_ids=IDS), rtol=1e-5, atol=1e-5)
    assert sorted(seen) == sorted([*probes, *probes])
    assert backend.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_inductor_on_cuda():
    torch._dynamo.reset()
    module = _masked(3).cuda()
    twin = compile_repeated_blocks(module)
    _assert_same(_run(module, input_ids=IDS.cuda()), _run(twin, input_ids=IDS.cuda()), rtol=1e-3, atol=1e-4)
