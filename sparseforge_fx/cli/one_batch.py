"""``serve --continuous-batching``: requests go in one batch, and transformers draws the tokens of all of it alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from sparseforge_fx.cli.requests import DRAWS, Refused

#: what else of a request's generation_config changes its tokens, whether or not they are drawn
CHANGES = ("repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "sequence_bias", "stop_strings")
#: values at which nothing is changed
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


def of_the_model(init: Callable[..., None]) -> Callable[..., None]:
    """transformers' ``init_cb`` of a manager, which every request passes, but that tokens are drawn as the model's own
    generation_config says and not as the first request does. Raises :class:`Refused` for a request that asks for
    another way."""

    def init_shared(manager: Any, model: Any, gen_config: Any) -> None:
        shared = copy.deepcopy(model.generation_config)
        if asked := otherwise(gen_config, shared):
            name, value = next(iter(asked.items()))
            raise Refused(
                400,
                f"this request asks for {name} {value!r}, and with --continuous-batching the tokens of all are "
                f"{'drawn' if shared.do_sample else 'the likeliest'}, as the model's generation_config says: leave it "
                "out, or start the server without --continuous-batching",
            )
        shared.use_cache, shared.max_new_tokens = False, gen_config.max_new_tokens
        init(manager, model, shared)

    return init_shared


def otherwise(asked: Any, shared: Any) -> dict[str, Any]:
    """What of a request's generation_config (what it leaves to the model is None) gives other tokens than the shared
    one: name -> value. Its number of new tokens and the token that ends it may be its own."""
    drawn = bool(shared.do_sample)
    if asked.do_sample is not None and bool(asked.do_sample) != drawn:
        said = {name: getattr(asked, name) for name in DRAWS if getattr(asked, name) != getattr(shared, name)}
        return said or {"do_sample": asked.do_sample}
    names = (*CHANGES, *(("seed", *DRAWS) if drawn else ()))
    values = {name: (getattr(asked, name, None), getattr(shared, name, None)) for name in names}
    same = {name: (NEUTRAL.get(name) if of_all is None else of_all) for name, (_, of_all) in values.items()}
    return {name: mine for name, (mine, _) in values.items() if mine is not None and mine != same[name]}
