"""SparseForge under the Hugging Face Trainer, with padded batches and gradient accumulation.

    python examples/huggingface_trainer.py                      a tiny random model on random tokens, seconds
    python examples/huggingface_trainer.py MODEL TEXT [STEPS]   a real one

Checkpoints of the Trainer hold the masks, so ``trainer.train(resume_from_checkpoint=True)`` works.
"""

import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import sparseforge_fx as sf


def main() -> None:
    torch.manual_seed(0)
    if len(sys.argv) > 2:
        model, tokenizer = sf.load(sys.argv[1], dtype="float32")
        steps = int(sys.argv[3]) if len(sys.argv) > 3 else 60
        documents = [
            tokenizer(text, truncation=True, max_length=512)["input_ids"]
            for text in sf.load_text(sys.argv[2], limit=steps * 8)
        ]
    else:
        model, steps = tiny_model(), 6
        documents = [torch.randint(1, 128, (length,)).tolist() for length in range(8, 32)]

    example = collate(documents[:2])  # it has an attention_mask: then batches may be padded
    sparse = sf.prepare(model, example, sf.annealed_preset(steps))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-4,
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(
            sparse, arguments, train_dataset=documents, data_collator=collate, callbacks=[sf.SparseForgeCallback()]
        )
        trainer.train()
    assert sf.finalize(sparse) is model
    zeros = [float((p == 0).float().mean()) for n, p in model.named_parameters() if n.endswith("_proj.weight")]
    print(f"{len(zeros)} linears, {min(zeros):.0%} to {max(zeros):.0%} of their weights are zero")


def collate(documents: list[list[int]]) -> dict[str, torch.Tensor]:
    """Pad to the longest; what is padded has no label."""
    width = max(map(len, documents))
    ids = torch.tensor([d + [0] * (width - len(d)) for d in documents])
    mask = torch.tensor([[1] * len(d) + [0] * (width - len(d)) for d in documents])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def tiny_model() -> LlamaForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=1, max_position_embeddings=64, **shape))


if __name__ == "__main__":
    main()
