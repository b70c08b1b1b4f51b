"""A 2:4 model as files that run without its code: a graph, a compiled package, and a generator of text.

python examples/export_and_generate.py            a tiny random model, a minute (most of it the C++ compiler)
python examples/export_and_generate.py MODEL      a 2:4 language model, as sparsify wrote it
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparseforge_fx as sf


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    if len(sys.argv) > 1:
        model, how = sf.load(sys.argv[1])[0], {"tokens": [1, 8]}
    else:  # nothing so small gains: no gate, to see the path
        model, how = tiny_model().eval(), {"gate": False}
        sf.sparsify(model)
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, model.config.vocab_size, (1, 8))
    logits = model(ids).logits
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"

        sf.export(model, path, **how)  # torch.export's format, sparse linears as our operator
        graph = torch.export.load(path).module()
        print(f"pt2: {path.stat().st_size:,} bytes, logits differ by {error(graph(input_ids=ids), logits):.0e}")

        sf.export(model, path, portable=True)  # plain aten operators: torch alone runs it
        graph = torch.export.load(path).module()
        print(f"portable: {path.stat().st_size:,} bytes, logits differ by {error(graph(input_ids=ids), logits):.0e}")

        sf.export(model, path, format="aoti", **how)  # compiled, kernels inside; examples/cpp runs it from C++
        package = torch._inductor.aoti_load_package(str(path))
        print(f"aoti: {path.stat().st_size:,} bytes, logits differ by {error(package(input_ids=ids), logits):.0e}")

        sf.export_generator(model, path, max_length=64, **how)  # prompt and next-token graphs, a static cache
        generator = sf.load_generator(path)
        same = torch.equal(generator.generate(ids, max_new_tokens=16), text)
        print(f"generator: {path.stat().st_size:,} bytes, greedy text is {'the same' if same else 'another'}")
        drawn = generator.generate(ids, max_new_tokens=16, do_sample=True, temperature=0.8, top_p=0.9, seed=0)
        print(f"sampled: {drawn[0, 8:].tolist()}")


def error(outputs: dict[str, torch.Tensor], logits: torch.Tensor) -> float:
    return float((outputs["logits"] - logits).norm() / logits.norm())


def tiny_model() -> LlamaForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=1, max_position_embeddings=64, **shape))


if __name__ == "__main__":
    main()
