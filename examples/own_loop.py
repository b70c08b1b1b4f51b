"""SparseForge in a training loop of your own: prepare, one extra line in the loop, finalize.

python examples/own_loop.py                         a tiny random model on random tokens, seconds
python examples/own_loop.py MODEL TEXT [STEPS]      a real one
"""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparseforge_fx as sf


def main() -> None:
    torch.manual_seed(0)
    if len(sys.argv) > 2:
        model, tokenizer = sf.load(sys.argv[1], dtype="float32")  # AdamW's small updates vanish in bfloat16 weights
        steps = int(sys.argv[3]) if len(sys.argv) > 3 else 60
        data = sf.as_batches(sys.argv[2], tokenizer, batch_size=4, length=512, seed=0, tokens=steps * 4 * 512)
    else:
        model, steps = tiny_model(), 12
        data = sf.as_batches(torch.randint(0, 128, (64, 32)), batch_size=4, length=32, seed=0)

    config = sf.annealed_preset(steps)  # or alps_kd_preset(steps) with prepare(..., calibration=[batches])
    sparse = sf.prepare(model, data.batch(0), config)  # .loss of its output: cross-entropy + KL from the dense model
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-4)
    sparse.train()
    for step in range(steps):
        loss = sparse(**data.batch(step)).loss
        loss.backward()
        optimizer.step()
        sparse.step()  # the one extra line: curvature, scores, temperature, masks
        optimizer.zero_grad()
        if step % max(1, steps // 10) == 0:
            state = sparse.method.metrics()
            print(f"step {step}: loss {loss.item():.3f}, lambda {state['lambda']:.2f}, density {state['density']:.2f}")

    assert sf.finalize(sparse) is model  # its weights are exactly 2:4 now
    groups = model.model.layers[0].mlp.up_proj.weight.reshape(-1, 4)
    print(f"non-zeros in a group of four: at most {int((groups != 0).sum(1).max())}")


def tiny_model() -> LlamaForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=1, max_position_embeddings=64, **shape))


if __name__ == "__main__":
    main()
