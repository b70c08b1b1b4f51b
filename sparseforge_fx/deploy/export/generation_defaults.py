"""What ``generate`` of a model does unasked, by its generation_config, and what of that a generator does."""

from __future__ import annotations

from typing import Any

DRAWING = ("temperature", "top_k", "top_p")
#: what else changes the tokens; a generator has none of it
LEFT_OUT = (
    "num_beams", "min_length", "min_new_tokens", "stop_strings", "encoder_repetition_penalty", "no_repeat_ngram_size",
    "bad_words_ids", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "guidance_scale", "watermarking_config",
    "penalty_alpha", "dola_layers", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip


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
    others = {name: getattr(config, name, None) for name in LEFT_OUT}
    unused = [f"{name} {value}" for name, value in others.items() if not _has_no_effect(name, value)]
    return told + ([f"of the model's generation_config the generator has no {', '.join(unused)}"] if unused else [])


def _has_no_effect(name: str, value: Any) -> bool:
    return value is None or (not name.endswith("token_id") and value in (0, 1, [], {}))
