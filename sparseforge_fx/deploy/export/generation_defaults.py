"""What ``generate`` of a model does unasked, by its generation_config, and what of that a generator does."""

from __future__ import annotations

from typing import Any

DRAWING = ("temperature", "top_k", "top_p")
#: what else changes the tokens, and the value at which it does not; a generator has none of it
LEFT_OUT = {
    "num_beams": 1, "min_length": 0, "min_new_tokens": 0, "stop_strings": [], "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": [], "forced_bos_token_id": None,
    "forced_eos_token_id": None, "exponential_decay_length_penalty": None, "suppress_tokens": [],
    "begin_suppress_tokens": [], "sequence_bias": {}, "guidance_scale": 1, "watermarking_config": None,
    "penalty_alpha": 0, "dola_layers": None, "min_p": 0, "top_h": 1, "typical_p": 1, "epsilon_cutoff": 0,
    "eta_cutoff": 0,
}  # fmt: skip


def repetition_penalty(config: Any) -> float:
    """1: none."""
    return float(getattr(config, "repetition_penalty", None) or 1.0)


def differences(config: Any) -> list[str]:
    """Sentences on where a generator's tokens are not those of ``generate`` without arguments."""
    told = []
    if getattr(config, "do_sample", None):
        how = ", ".join(f"{name}={value}" for name in DRAWING if (value := getattr(config, name, None)) is not None)
        asked = ", ".join(filter(None, ("do_sample=True", how)))
        told.append(f"generate() of this model draws; the generator does when asked: {asked}")
    unused = [
        f"{name} {value}"
        for name, without in LEFT_OUT.items()
        if (value := getattr(config, name, None)) is not None and value != without
    ]
    return told + ([f"of the model's generation_config the generator has no {', '.join(unused)}"] if unused else [])
