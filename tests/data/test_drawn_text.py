"""Text that a model draws from itself, whatever its generation_config asks of text for readers."""

import torch

from sparseforge_fx.data.drawn_text import draw_text


def test_a_generation_config_has_no_say(tiny):
    model = tiny("llama").model
    own = model.generation_config
    expected = draw_text(model, 64, length=8, batch=2)
    assert expected.shape == (8, 8)
    before = own.to_dict()
    try:
        own.update(
            stop_strings=["a"], num_return_sequences=3, return_dict_in_generate=True, repetition_penalty=5.0,
            no_repeat_ngram_size=1, num_beams=3, max_time=0.0,
        )  # fmt: skip
        assert torch.equal(draw_text(model, 64, length=8, batch=2), expected)
        assert model.generation_config is own and own.stop_strings == ["a"]
    finally:
        own.update(**{name: before.get(name) for name in own.to_dict()})
