"""Packed models, and LoRA adapters on them and on dense ones, for the tests of both. Needs PEFT."""

import pytest
import torch
from packed_models import sparse_model

import sparseforge_fx as sf

peft = pytest.importorskip("peft")

TARGET = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "opt": ["q_proj", "fc1"]}


def lowered(name, dtype=torch.float32):
    model = sparse_model(name, dtype)
    sf.lower_modules(model, gate=False)
    return model


def adapted(model, targets, **options):
    """The same adapters each time, which change the output: PEFT starts B with zeros."""
    config = peft.LoraConfig(target_modules=targets, r=4, task_type="CAUSAL_LM", **options)
    adapter = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in adapter.named_parameters():
        if any(part in name for part in ("lora_A", "lora_B", "lora_embedding")):
            torch.nn.init.normal_(parameter, std=0.2)
    return adapter


def layers(adapter):
    return [m for m in adapter.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
