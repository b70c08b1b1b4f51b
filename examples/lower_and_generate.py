"""A 2:4 model on packed weights: in place for generate(), as a graph, and through torch.compile.

python examples/lower_and_generate.py            a tiny random model, seconds
python examples/lower_and_generate.py MODEL      a 2:4 model, as sparsify wrote it
"""

import copy
import sys

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
    ids = torch.randint(0, model.config.vocab_size, (1, 8))
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    text, logits = model.generate(ids, **options), model(ids).logits

    graph = sf.lower(model, **how)  # q/k/v and gate/up merged, silu-mul fused
    report = graph.report
    share = report["lowered_bytes"] / report["dense_bytes"]
    print(f"graph: {len(report['sites'])} packed linears, {share:.2f} of their bytes")
    print(f"logits differ by {(graph(input_ids=ids).logits - logits).norm() / logits.norm():.1e}")

    compiled = torch.compile(model, backend="sparseforge", options=how)
    print(f"compiled: logits differ by {(compiled(ids).logits - logits).norm() / logits.norm():.1e}")

    packed = copy.deepcopy(model)
    report = sf.lower_modules(packed, **how)  # in place: everything else goes on as before
    same = torch.equal(packed.generate(ids, **options), text)
    print(f"modules: {len(report['sites'])} packed linears; greedy text is {'the same' if same else 'another'}")


def tiny_model() -> LlamaForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=1, max_position_embeddings=64, **shape))


if __name__ == "__main__":
    main()
