"""Make a Hugging Face language model exactly 2:4, and write it as a plain checkpoint.

    python examples/sparsify_huggingface_model.py                                  a tiny random model, seconds
    python examples/sparsify_huggingface_model.py MODEL TEXT OUT [TOKENS]          a real one

MODEL: folder, hub id or GGUF file. TEXT: a text, jsonl or parquet file, a folder, a hub data set, or ``self`` for text
that is drawn from the model.
"""

import sys

from transformers import LlamaConfig, LlamaForCausalLM

import sparseforge_fx as sf


def main() -> None:
    if len(sys.argv) > 3:
        source, text, out = sys.argv[1:4]
        model, tokenizer = sf.load(source)
        run = {"tokens": int(sys.argv[4])} if len(sys.argv) > 4 else {}
    else:
        model, tokenizer, text, out = tiny_model(), None, "self", None
        run = {"steps": 4, "batch_size": 2, "length": 32, "calibration": 8}

    result = sf.sparsify(model, text, tokenizer=tokenizer, **run)

    assert result.model is model  # the weights changed in place: generate(), save_pretrained() and PEFT work as before
    densities = result.report["density"]
    for name, density in densities.items():
        print(f"{name}: {density:.1%} of the weights are not zero")
    print(f"{len(densities)} linears are 2:4 after {result.report['tokens']:,} tokens; these stay dense:")
    for skipped in result.report["skipped"]:
        print(f"  {skipped['name']}: {skipped['reason']}")
    if out:
        result.save(out, tokenizer)
        print(f"wrote {out}: AutoModelForCausalLM.from_pretrained({out!r}) loads it")


def tiny_model() -> LlamaForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=1, max_position_embeddings=64, **shape))


if __name__ == "__main__":
    main()
