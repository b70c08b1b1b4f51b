"""What of a model's generation_config a generator does not do is told, and nothing else."""

import pytest
from transformers import GenerationConfig

from sparseforge_fx.deploy.export.generation_defaults import differences, repetition_penalty


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"num_beams": 1, "no_repeat_ngram_size": 0, "suppress_tokens": []},
        {"repetition_penalty": 1.2},
        {"min_new_tokens": 0, "typical_p": 1.0},
    ],
)
def test_where_there_is_no_difference_nothing_is_told(given):
    config = GenerationConfig(**given)
    assert differences(config) == [] and repetition_penalty(config) == given.get("repetition_penalty", 1.0)


def test_what_is_left_out_is_told():
    assert differences(GenerationConfig(do_sample=True)) == [
        "generate() of this model draws; the generator does when asked: do_sample=True"
    ]
    assert differences(GenerationConfig(min_new_tokens=1, no_repeat_ngram_size=1, guidance_scale=0)) == [
        "of the model's generation_config the generator has no min_new_tokens 1, no_repeat_ngram_size 1, guidance_scale 0"
    ]
    config = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, num_beams=4, forced_bos_token_id=1)
    first, second = differences(config)
    assert first.endswith("do_sample=True, temperature=0.6, top_k=20")
    assert second.endswith("has no num_beams 4, forced_bos_token_id 1")
