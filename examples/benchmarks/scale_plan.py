"""What training a large model with masks takes, from its config: sites, bytes of each GPU, seconds of a step, and what
gives out first; one json a model. No weight is made.

    python examples/benchmarks/scale_plan.py [--models opt-175b,llama-70b] [--tokens 1048576]

Counted: sites, by the passes themselves, on the graph of the first blocks (two kinds where they differ), times the number
of blocks; bytes of each trained weight, on a small model that has made one step. Assumed: ASSUMED, which the json repeats.
"""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
import typer
from common import save
from records import read
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

import sparseforge_fx as sf
from sparseforge_fx.graph.capture import capture, without_values
from sparseforge_fx.passes import find_linears
from sparseforge_fx.passes.find_linears import eligible
from sparseforge_fx.report import environment
from sparseforge_fx.training.master_weights import MasterWeights

#: published sides (of DeepSeek-V3 they are the config's own defaults), and how many of the blocks are of a first kind
MODELS: dict[str, tuple[PretrainedConfig, int]] = {
    "opt-175b": (OPTConfig(hidden_size=12288, ffn_dim=49152, num_hidden_layers=96, num_attention_heads=96, word_embed_proj_dim=12288), 0),
    "llama-70b": (LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8), 0),
    "qwen3-235b-a22b": (Qwen3MoeConfig(vocab_size=151936, hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536), 0),
    "deepseek-v3": (DeepseekV3Config(), 3),
}  # fmt: skip
#: of an H100 SXM by its data sheet (NVLink among the eight of a machine, one direction); the share of its rate that large
#: models reach under FSDP, and the network of common clusters (400 Gb/s a GPU), are taken for granted: none was measured
ASSUMED = {
    "gpu_bytes": 80e9, "gpu_flops": 989e12, "share_of_flops": 0.4, "network_bytes_per_second": 50e9,
    "nvlink_bytes_per_second": 450e9, "block_activation_bytes": 34,
}  # fmt: skip
GPUS = (8, 64, 512)
LENGTH = 2048  # tokens of a sequence


@dataclass(frozen=True)
class Sites:
    """Of a whole model: how many, entries of their weights, those that a token meets, and of the largest block."""

    count: int
    entries: int
    active: int
    block: int
    widest: int  # inputs of the widest matrix


def main(models: str = ",".join(MODELS), tokens: int = 1 << 20) -> None:
    """``tokens`` of a step, over all GPUs."""
    if unknown := set(models.split(",")) - set(MODELS):
        sys.exit(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    here = environment()  # what is written below makes a change to the tree
    per_weight = bytes_of_a_weight()
    overhead = heating_over_dense()
    for name in models.split(","):
        config, first = MODELS[name]
        sites, parameters = count(config, first)
        rows = [row(n, config, sites, parameters, tokens, sum(per_weight.values()), overhead) for n in GPUS]
        record = {
            "model": name, "parameters": parameters, "sites": sites.count, "site_entries": sites.entries,
            "active_site_entries": sites.active, "tokens": tokens, "bytes_per_weight": per_weight,
            "heating_over_dense": overhead, "assumed": ASSUMED, "gpus": rows,
            "layerwise_bytes": 4 * 4 * sites.widest**2,
        }  # fmt: skip
        save("scale", name, record, here)
        print(name, f"{parameters:,}", rows)


def count(config: PretrainedConfig, first: int) -> tuple[Sites, int]:
    """Its sites and all of its parameters; ``first``: how many blocks come before the others are alike."""
    layers = config.num_hidden_layers
    if not first:
        found, parameters = blocks(config, 1)
        every = [(found[0], layers)]
        (_, two) = blocks(config, 2)
        whole = parameters + (layers - 1) * (two - parameters)
    else:
        cut = copy.deepcopy(config)
        cut.first_k_dense_replace = 1
        found, with_both = blocks(cut, 2)
        every = [(found[0], first), (found[1], layers - first)]
        _, alone = blocks(cut, 1)
        cut.first_k_dense_replace = 2
        _, two = blocks(cut, 2)
        whole = alone + (first - 1) * (two - alone) + (layers - first) * (with_both - alone)
    per_token = getattr(config, "num_experts_per_tok", None)
    shapes = [(shape, times) for block, times in every for shape, _ in block]

    def active(shape: tuple[int, ...]) -> int:
        return math.prod(shape) if len(shape) == 2 else per_token * math.prod(shape[1:])  # a stack of experts

    return Sites(
        sum(times for _, times in shapes),
        sum(math.prod(shape) * times for shape, times in shapes),
        sum(active(shape) * times for shape, times in shapes),
        max(sum(math.prod(shape) for shape, _ in block) for block, _ in every),
        max(inputs for block, _ in every for _, inputs in block),
    ), whole


def blocks(config: PretrainedConfig, layers: int) -> tuple[list[list[tuple[tuple[int, ...], int]]], int]:
    """Shape and inputs of the sites of each of the first ``layers`` blocks, and the parameters of that model."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(config, name, None) is not None:
            setattr(config, name, getattr(config, name)[:layers])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    parameters = sum(p.numel() for p in model.parameters())
    without_values(model)
    found: list[list[tuple[tuple[int, ...], int]]] = [[] for _ in range(layers)]
    for site in eligible(find_linears(capture(model, dynamic=False))):
        at = next(int(part) for part in site.fqn.split(".") if part.isdigit())
        found[at].append((tuple(site.shape), site.in_features))
    return found, parameters


def bytes_of_a_weight() -> dict[str, float]:
    """Bytes of each bfloat16 weight with a mask while it trains (preset annealed), by what they are for."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    sparse = sf.prepare(model, None, sf.annealed_preset(4)).train()
    weights = sparse.method.weights
    master = MasterWeights([w.weight for w in weights])
    master.serve(weights)
    optimizer = sparse.optimizer(master.masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    sparse(input_ids=torch.randint(0, 64, (1, 16)))
    sparse.last_loss.total.backward()
    master.take_gradients()
    optimizer.step()

    def size(tensors: Any) -> float:
        return sum(t.numel() * t.element_size() for t in tensors if t is not None) / sum(
            w.mask.numel() for w in weights
        )

    ours = {id(p) for p in master.parameters}
    moments = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    return {
        "weight": size(master.parameters), "mask": size(w.mask for w in weights), "float32 master": size(master.masters),
        "gradient": size(p.grad for p in master.parameters), "its float32 copy": size(m.grad for m in master.masters),
        "moments": size(moments), "curvature": size(sparse.method.curvature.values.values()),
        "teacher": size(copied for tensor, copied in sparse.copies() if id(tensor) in ours),
    }  # fmt: skip


def heating_over_dense() -> float:
    """What masks add to a distillation step on a GPU, as measured."""
    (run,) = (r for r in read("training_overhead") if "NVIDIA" in r["device"])
    seconds = run["modes"]["eager"]["median_seconds"]
    return seconds["heating"] / seconds["dense"]


def row(
    gpus: int, config: PretrainedConfig, sites: Sites, parameters: int, tokens: int, per_weight: float, overhead: float
) -> dict[str, Any]:
    """Of one number of GPUs, weights, masks and states shared by all (FSDP2), activations recomputed block by block."""
    own = max(1, tokens // gpus // LENGTH)  # sequences of one GPU
    rest = 2 * 2 * (parameters - sites.entries)  # of a bfloat16 model, taken for frozen, and its teacher's
    state = (per_weight * sites.entries + rest) / gpus
    # what goes into each block, and all of one that is computed again (arXiv 2205.05198, eq. 2, without its scores)
    sequence = LENGTH * config.hidden_size * (2 * config.num_hidden_layers + ASSUMED["block_activation_bytes"])
    gathered = 2 * 2 * 2 * sites.block  # a block's weights and masks, and those of the next, in bfloat16
    active = parameters - sites.entries + sites.active
    compute = overhead * (6 + 2) * active * tokens / (gpus * ASSUMED["gpu_flops"] * ASSUMED["share_of_flops"])
    room = ASSUMED["gpu_bytes"] - state - gathered
    micro = max(1, min(own, int(room // sequence)))  # sequences at a time: as many as fit
    passes = math.ceil(own / micro)
    # forward and backward gather weights and masks, the teacher its weights, gradients are summed and scattered
    rate = ASSUMED["nvlink_bytes_per_second" if gpus <= 8 else "network_bytes_per_second"]
    moved = passes * 2 * (2 * 2 + 1 + 1) * parameters / rate
    needed = state + micro * sequence + gathered
    first = "memory" if needed > ASSUMED["gpu_bytes"] else "network" if moved > compute else ""
    return {
        "gpus": gpus, "bytes": needed, "state_bytes": state, "gathered_bytes": gathered, "sequences_at_a_time": micro, "micro_batches": passes, "compute_seconds": compute,
        "network_seconds": moved, "first": first,
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
