"""A LoRA adapter beside a frozen packed 2:4 model: trained by PEFT, written, loaded, and merged without losing a zero.

python examples/lora.py            a tiny random model, seconds
python examples/lora.py FOLDER     a packed checkpoint, as sf.save_packed wrote it
"""

import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import sparseforge_fx as sf


def main() -> None:
    torch.manual_seed(0)
    model = sf.load(sys.argv[1])[0] if len(sys.argv) > 1 else tiny_packed_model()
    ids = torch.randint(3, model.config.vocab_size, (2, 16))
    adapter = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = adapter(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"trained {adapter.get_nb_trainable_parameters()[0]:,} weights: loss {losses[0]:.2f} -> {losses[-1]:.2f}")

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        adapter.save_pretrained(Path(folder) / "adapter")
        logits = adapter(ids).logits
        model = PeftModel.from_pretrained(adapter.unload(), Path(folder) / "adapter")  # the packed model again
        same = torch.equal(model(ids).logits, logits)
        print(f"written and loaded: {'the same' if same else 'other'} logits")

        report = sf.merge_lora(model, "masked")  # "separate" would change nothing and report the same shares
        merged = model.get_base_model()
        loss = merged(ids, labels=ids).loss.item()
        print(f"merged into {len(report['sites'])} linears, still 2:4: {report['outside']:.0%} of the update's norm")
        print(f"fell on zeros and is gone, loss {loss:.2f}")
        packed = sf.save_packed(merged, None, Path(folder) / "merged")
        print(f"packed again: {len(packed['sites'])} linears")


def tiny_packed_model() -> LlamaForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=1, max_position_embeddings=64, **shape))
    sf.sparsify(model)
    sf.lower_modules(model, gate=False)  # nothing so small gains: no gate, to see the path
    return model


if __name__ == "__main__":
    main()
