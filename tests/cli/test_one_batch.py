"""serve --continuous-batching: what a request may ask for where all share one batch."""

import json
from types import SimpleNamespace

import pytest
from transformers import GenerationConfig

pytest.importorskip("fastapi")

from sparseforge_fx.cli.one_batch import of_the_model
from sparseforge_fx.cli.requests import Refused, drawing


class Batch:
    """A manager, and what it was begun with."""

    def __init__(self, **own):
        self.model, self.begun = SimpleNamespace(generation_config=GenerationConfig(**own)), []

    def ask(self, **body):
        """As a handler does, whose own fields come after those that all have."""
        from transformers.cli.serving.chat_completion import ChatCompletionHandler
        from transformers.cli.serving.utils import BaseHandler

        handler = object.__new__(ChatCompletionHandler)
        handler.generation_state = SimpleNamespace(_compile=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BaseHandler, "_build_generation_config", drawing(BaseHandler._build_generation_config))
            config = handler._build_generation_config(
                {"max_tokens": 7} | body, self.model.generation_config, use_cb=True
            )
        of_the_model(lambda manager, model, config: self.begun.append(config))(self, self.model, config)
        return self.begun[-1]


def of(**config):
    return {"generation_config": json.dumps(config)}


GREEDY, DRAWN = {"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_k": 20}


@pytest.mark.parametrize(
    ("own", "body"),
    [
        (GREEDY, {}),
        (GREEDY, {"temperature": 0}),
        (GREEDY, {"seed": 3}),  # of tokens that are not drawn
        (GREEDY, {"frequency_penalty": 0.0}),
        (GREEDY, of(eos_token_id=5)),
        (GREEDY | {"repetition_penalty": 1.1}, {}),
        (DRAWN, {}),
        (DRAWN, {"temperature": 0.7}),
        (DRAWN, of(do_sample=True, top_k=20)),
        (DRAWN, {"top_p": 1.0}),
    ],
)
def test_what_is_done_anyway_may_be_asked_for(own, body):
    begun = Batch(**own).ask(**body)
    assert begun.do_sample is own["do_sample"] and begun.temperature == own.get("temperature")
    assert begun.top_k == own.get("top_k") and begun.max_new_tokens == 7 and begun.use_cache is False


@pytest.mark.parametrize(
    ("own", "body", "named"),
    [
        (GREEDY, {"temperature": 0.7}, r"temperature 0\.7, .* are the likeliest"),
        (GREEDY, of(do_sample=True), "do_sample True"),
        (GREEDY, {"stop": "."}, "stop_strings"),
        (GREEDY, {"frequency_penalty": 0.5}, "repetition_penalty 1.5"),
        (GREEDY, {"logit_bias": {"5": 1.0}}, "sequence_bias"),
        (DRAWN, {"temperature": 0}, r"temperature 0\.0, .* are drawn"),
        (DRAWN, {"temperature": 0.9}, r"temperature 0\.9"),
        (DRAWN, {"top_p": 0.5}, r"top_p 0\.5"),
        (DRAWN, {"seed": 3}, "seed 3"),
        (DRAWN, of(top_k=5), "top_k 5"),
    ],
)
def test_another_way_of_drawing_is_refused_whoever_came_first(own, body, named):
    batch = Batch(**own)
    batch.ask()
    with pytest.raises(Refused, match=f"asks for {named}") as told:
        batch.ask(**body)
    assert told.value.status == 400 and "start the server without --continuous-batching" in told.value.why
    assert len(batch.begun) == 1
