"""Tiny models that many tests share: built and captured once per session, as new for every test."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from captures import capture_alike
from torch import Tensor, nn

from sparseforge_fx.data import capturing
from sparseforge_fx.deploy.export import export
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.graph.exported import Exported
from sparseforge_fx.passes import find_linears
from sparseforge_fx.training import prepare
from sparseforge_fx.training.distillation import Distillation
from sparseforge_fx.training.sparse_model import SparseModel

VOCABULARY = 97


@dataclass
class Tiny:
    """A model, what it was captured with, and its first weights."""

    model: nn.Module
    example: Any
    program: Exported
    first: dict[str, Tensor] = field(repr=False)

    def reset(self) -> Tiny:
        self.model.load_state_dict(self.first)
        self.model.eval().requires_grad_(True).zero_grad()
        return self

    def sparse(self, config, objective: Distillation | None = None, **options) -> SparseModel:
        """What sf.prepare gives, without capturing again."""
        return SparseModel(self.program, self.sites, config, objective, **options)

    @property
    def sites(self):
        return find_linears(self.program)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The weights that are to be pruned, by name."""
        parameters = dict(self.model.named_parameters())
        return {s.fqn: parameters[s.fqn] for s in self.sites if s.reason is None}

    def batch(self, seed: int = 0, rows: int = 2, length: int = 12) -> Any:
        """Random token ids, or random features for the MLP."""
        generator = torch.Generator().manual_seed(seed)
        if isinstance(self.example, Tensor):
            return torch.randn(rows, *self.example.shape[1:], generator=generator)
        return {"input_ids": torch.randint(0, VOCABULARY, (rows, length), generator=generator)}


def build(name: str) -> nn.Module:
    """``llama`` (two blocks), ``llama of one block``, ``gpt2`` (Conv1D), ``opt``, ``mistral``, ``qwen3``, ``gemma3``,
    ``moe`` (a shared expert with a gate, too), ``gpt_oss`` (experts stored [in, out], with biases), ``bert`` and
    ``vit`` (no language models) or ``mlp`` (no Hugging Face model)."""
    if name == "mlp":
        return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 8))
    import transformers as t

    common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    encoder = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
        **common,
    }
    if name in ("llama", "llama of one block"):
        blocks = {"num_hidden_layers": 2 if name == "llama" else 1}
        config = t.LlamaConfig(**encoder | blocks, num_key_value_heads=1, intermediate_size=64, initializer_range=0.2)
        return t.LlamaForCausalLM(config)
    if name == "gpt2":
        return t.GPT2LMHeadModel(
            t.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, initializer_range=0.2, **common)
        )
    if name == "opt":
        return t.OPTForCausalLM(t.OPTConfig(**encoder, ffn_dim=64, word_embed_proj_dim=32, init_std=0.2))
    if name in ("mistral", "qwen3", "gemma3"):
        kind = {"mistral": "Mistral", "qwen3": "Qwen3", "gemma3": "Gemma3Text"}[name]
        options = {"num_key_value_heads": 1, "intermediate_size": 64, "head_dim": 16, "initializer_range": 0.2}
        options |= {} if name == "qwen3" else {"sliding_window": 6}
        config = getattr(t, f"{kind}Config")(**encoder | {"num_hidden_layers": 2}, **options)
        return getattr(t, "Gemma3ForCausalLM" if name == "gemma3" else f"{kind}ForCausalLM")(config)
    if name in ("moe", "gpt_oss"):
        kind = {"moe": "Qwen2Moe", "gpt_oss": "GptOss"}[name]
        experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
        experts |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "intermediate_size": 32}
        config = getattr(t, f"{kind}Config")(**encoder, **experts, num_key_value_heads=1, initializer_range=0.2)
        return getattr(t, f"{kind}ForCausalLM")(config)
    if name == "vit":
        config = t.ViTConfig(
            image_size=8, patch_size=4, hidden_size=32, num_attention_heads=2, num_hidden_layers=1,
            intermediate_size=64, initializer_range=0.2,
        )  # fmt: skip
        return t.ViTModel(config)
    assert name == "bert"
    return t.BertModel(t.BertConfig(**encoder, intermediate_size=64, initializer_range=0.2))


@functools.cache
def _captured(name: str) -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(name).eval()
        shapes = {"mlp": (4, 16), "vit": (2, 3, 8, 8)}
        ids = {"input_ids": torch.randint(3, VOCABULARY, (2, 12))}
        example = torch.randn(shapes[name]) if name in shapes else ids
        program = capture(model, example)
    return Tiny(model, example, program, {k: v.clone() for k, v in model.state_dict().items()})


@pytest.fixture
def tiny() -> Callable[[str], Tiny]:
    """tiny(name): the shared model of that name (see ``build``), reset."""
    return lambda name: _captured(name).reset()


@pytest.fixture
def captured_once(monkeypatch, tiny):
    """``tiny`` again, whose models sparsify, prepare and export take as they were captured before."""
    programs: dict[int, Exported] = {}

    def reset(name: str) -> Tiny:
        found = tiny(name)
        programs[id(found.model)] = found.program
        return found

    def remembered(model, example_inputs=None):
        return programs.get(id(model)) or capture_alike(model, example_inputs)

    for module in (prepare, capturing, export):
        monkeypatch.setattr(module, "capture", remembered)
    return reset


def own_loop(sparse, batches, lr=3e-3):
    """The loop of the README."""
    sparse.train()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=lr)
    losses = []
    for batch in batches:
        sparse(**batch).loss.backward()
        optimizer.step()
        sparse.step()
        optimizer.zero_grad()
        losses.append(sparse.last_loss.total.item())
    return losses


# -- an encoder and a decoder ------------------------------------------------------------------------------------------
IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, d_ff=64, d_kv=16, num_layers=1, num_decoder_layers=1, num_heads=2, decoder_start_token_id=0, **IDS
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def seq2seq(padded=True):
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(3, 97, (2, n), generator=generator) for n in (10, 6))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 7:], labels[1, 4:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
