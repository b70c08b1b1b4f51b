"""Layers of a large model that decode, in every format, beside llama.cpp on the same weights; one json.

    python examples/benchmarks/large_decode.py FOLDER --of Qwen3-8B [--label NAME] [--rounds 3]

Random weights by the sides of a model that is far too large for here: few of its layers, of a mixture half of its experts, of
which it chooses as many for a token, and a vocabulary that is as large a share of what a token reads. FOLDER gets the
exported generators (AOTInductor) and GGUF files, which are made once; every round runs all of them in fresh processes, in
turn. Weights are rounded to the nearest, for speed is all that is asked. Points of llama.cpp are there where llama_cpp is
installed (see llamacpp.py); that both compute the same model is seen from the perplexity of random tokens, which is recorded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import save, use
from formats import _run as run_generator
from frontier import decoded
from frontier_points import Point
from frontier_prepared import HERE, llama_cpp
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

import sparseforge_fx as sf
from sparseforge_fx.pattern import TWO_FOUR, hard_mask
from sparseforge_fx.report import environment, write_json

OURS = ("dense bf16", "dense int8", "2:4 int8", "dense int4", "2:4 int4")
THEIRS = ("Q8_0", "Q4_0")
WINDOW = 64  # random tokens whose perplexity is compared
#: by the model that they are of
SIDES: dict[str, dict[str, int]] = {
    "Qwen3-8B": {
        "layers": 4, "hidden": 4096, "width": 12288, "heads": 32, "keys": 8, "experts": 0, "chosen": 0, "vocabulary": 16896,
    },
    "Qwen3-30B-A3B": {
        "layers": 4, "hidden": 2048, "width": 768, "heads": 32, "keys": 4, "experts": 64, "chosen": 8, "vocabulary": 12288,
    },
}  # fmt: skip


def main(
    folder: Annotated[Path, typer.Argument(help="generators and GGUF files stay here")],
    of: Annotated[str, typer.Option(help=f"whose sides: {', '.join(SIDES)}")],
    label: str = "",
    sides: Annotated[str, typer.Option(help="json of other sides than SIDES has")] = "{}",
    batch: Annotated[list[int], typer.Option()] = [1, 8],  # noqa: B006
    prompt: int = 16,
    tokens: int = 32,
    max_length: Annotated[int, typer.Option(help="of the generators' caches")] = 256,
    rounds: Annotated[int, typer.Option(min=2)] = 3,
    threads: int = 0,
) -> None:
    """Make what is not there, run all of it, write results/large_decode/LABEL.json."""
    use(threads=threads)
    folder.mkdir(parents=True, exist_ok=True)
    if of not in SIDES:
        sys.exit(f"no sides of {of}: there are {', '.join(SIDES)}")
    wanted = SIDES[of] | json.loads(sides)
    kept = folder / "sides.json"
    if kept.exists() and json.loads(kept.read_text()) != [wanted, max_length]:
        sys.exit(f"{folder} holds files of other sides, or for another max_length: name a new folder")
    write_json(kept, [wanted, max_length])
    config = config_of(**wanted)
    sizes = {name: generator(config, name, folder, batch, max_length) for name in OURS}
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (1, WINDOW), generator=draw)
    record: dict[str, Any] = {"perplexity": {"transformers": perplexity(model_of(config, "dense bf16"), ids)}}
    points = {}
    if find_spec("llama_cpp") is not None:
        whole = write_gguf(config, folder / "F16.gguf")
        torch.save({"windows": ids, "threads": torch.get_num_threads()}, folder / "request.pt")
        record["perplexity"]["llama.cpp"] = llama_cpp("perplexity", Point("F16", str(whole)), folder)["perplexity"]
        points = {f"llama.cpp {kind}": Point(kind, str(quantized(whole, kind))) for kind in THEIRS}
        sizes |= {name: Path(point.path).stat().st_size for name, point in points.items()}
    prompts = torch.randint(
        0, config.vocab_size, (max(batch), prompt), generator=draw
    )  # others each, or all choose alike
    request = {"ids": prompts, "text_tokens": tokens, "tokens": tokens, "rounds": 2, "batch": list(batch)}
    torch.save({**request, "device": "cpu", "threads": torch.get_num_threads()}, folder / "request.pt")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sizes}
    for _ in range(rounds):
        for name, of_one in found.items():
            mine = name in OURS
            of_one.append(
                run_generator("generator-aoti", file_of(folder, name), folder)
                if mine
                else llama_cpp("speed", points[name], folder)
            )
    here = environment()
    rows = {name: {"bytes": sizes[name], **decoded(of_one, prompt, tokens)} for name, of_one in found.items()}
    asked = {"prompt": prompt, "prompts": len(prompts), "tokens": tokens, "max_length": max_length, "rounds": rounds}
    record |= {"of": of, **wanted, "parameters": parameters(config), **asked, "points": rows}
    save("large_decode", label or of, record, here)
    for name, row in rows.items():
        print(name, row["tokens_per_second"], flush=True)


def file_of(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' ', '-').replace(':', '-')}.pt2"


def config_of(
    *, layers: int, hidden: int, width: int, heads: int, keys: int, experts: int, chosen: int, vocabulary: int
) -> PreTrainedConfig:
    """Qwen3's, without experts, or Qwen3-MoE's."""
    common: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": keys, "head_dim": 128, "initializer_range": 0.04,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
        "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if not experts:
        return Qwen3Config(intermediate_size=width, **common)
    mixture = {"moe_intermediate_size": width, "num_experts": experts, "num_experts_per_tok": chosen}
    return Qwen3MoeConfig(**mixture, norm_topk_prob=True, **common)


def parameters(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def model_of(config: PreTrainedConfig, name: str) -> PreTrainedModel:
    """The model in that format, all of them with the same weights but for zeros."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    pattern, values = name.split()
    if pattern == "2:4":
        with torch.no_grad():
            for path, weight in model.named_parameters():
                if "proj" in path:
                    weight.mul_(hard_mask(weight.abs(), TWO_FOUR))
    if values != "bf16":
        sf.quantize(model, values)
    return model


def generator(config: PreTrainedConfig, name: str, folder: Path, batch: list[int], max_length: int) -> int:
    """Export it, if it is not there; bytes of what the model holds."""
    file = file_of(folder, name)
    written = file.with_suffix(".bytes")
    if not file.exists():
        model = model_of(config, name)
        size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        table = None
        if name == "dense bf16":  # a generator is of a 2:4 model: by an empty table all of it stays dense
            sf.sparsify(model)
            table = {}
        sf.export_generator(model, file, format="aoti", max_length=max_length, tokens=batch, table=table)
        written.write_text(str(size))
        print(f"wrote {file}", flush=True)
    return int(written.read_text())


@torch.no_grad()
def perplexity(model: nn.Module, ids: torch.Tensor) -> float:
    return float(model(ids, labels=ids).loss.exp())


def write_gguf(config: PreTrainedConfig, file: Path) -> Path:
    """The dense model as llama.cpp reads it, in half precision, without a vocabulary."""
    if file.exists():
        return file
    import gguf

    mixture = isinstance(config, Qwen3MoeConfig)
    arch = gguf.MODEL_ARCH.QWEN3MOE if mixture else gguf.MODEL_ARCH.QWEN3
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if mixture:
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for path, weight in model_of(config, "dense bf16").state_dict().items():
        parts = {path.removesuffix(".weight"): weight}
        if path.endswith("gate_up_proj"):
            gate, up = weight.chunk(2, 1)
            parts = {path.replace("gate_up", "gate"): gate, path.replace("gate_up", "up"): up}
        for part, value in parts.items():
            name = names.get_name(part)
            if name is None:
                raise SystemExit(f"gguf knows no tensor {part}")
            # as llama.cpp's own converter: what is multiplied in half precision, the rest in single
            kind = torch.float32 if value.dim() == 1 or "ffn_gate_inp" in name else torch.float16
            writer.add_tensor(f"{name}.weight", value.to(kind).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def quantized(whole: Path, kind: str) -> Path:
    """The same by llama.cpp's own tool, if it is not there."""
    file = whole.with_name(f"{kind}.gguf")
    if not file.exists():
        subprocess.run([sys.executable, HERE / "llamacpp.py", "quantize", whole, file, kind], check=True)
    return file


if __name__ == "__main__":
    typer.run(main)
