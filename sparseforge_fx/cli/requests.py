"""What the server behind ``sparseforge-fx serve`` takes: a gate of ours before transformers' application.

POST goes to four addresses only, with a body that has what their handlers read, in the types that they read it in, and
nothing that they would pass over, and asks for no more new tokens than the server gives. The answers are transformers'
own, but that a request which says how tokens are drawn gets drawn ones, and with a seed the same again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError, model_validator

from sparseforge_fx.errors import one_line
from sparseforge_fx.models.dense import explained

MAX_BODY = 8 * 2**20  # bytes of a request
SAMPLING = (  # what a request may set in transformers' GenerationConfig: other fields multiply the work
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size"),
    *("max_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id", "suppress_tokens"),
)
OF_THE_SERVER = (  # arguments of apply_chat_template that a request cannot have: they are given, or run its own code
    *("chat_template", "conversation", "tools", "tokenize", "return_tensors", "return_dict", "add_generation_prompt"),
    *("load_audio_from_video", "padding", "max_length", "tokenizer_kwargs", "processor_kwargs"),
)
DRAWS = ("temperature", "top_k", "top_p", "min_p", "typical_p")  # what only drawn tokens are for
ABOUT_THE_CLIENT = (  # fields that ask nothing of the answer, or (stream_options) what it has anyway
    "user", "metadata", "service_tier", "safety_identifier", "stream_options", "prompt_cache_key",
    "prompt_cache_retention",
)  # fmt: skip
ASKS_NOTHING: dict[str, tuple] = {  # fields that are not used, with the values that ask for what is done anyway
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},),
    "presence_penalty": (0, 0.0), "response_format": ({"type": "text"},), "text": ({}, {"format": {"type": "text"}}),
    "modalities": (["text"],), "tool_choice": ("auto",), "parallel_tool_calls": (True,), "functions": ([],),
    "store": (False,), "background": (False,), "include": ([],), "truncation": ("disabled",),
}  # fmt: skip
TEXT_PARTS: tuple[str, ...] = ("text", "input_text", "output_text")
PICTURES, SOUNDS = ("image_url", "input_image", "video_url"), ("input_audio", "audio_url")
PARTS = {"LLM": TEXT_PARTS, "VLM": TEXT_PARTS + PICTURES, "MULTIMODAL": TEXT_PARTS + PICTURES + SOUNDS}
Finite = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]


class Body(BaseModel):
    """What all of them share. A field that is not named is not used: see :func:`checked`."""

    model_config = ConfigDict(strict=True, extra="allow")
    counts: ClassVar[tuple[str, ...]] = ("max_tokens",)  # fields that say how many new tokens

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[Finite, Field(ge=0)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    frequency_penalty: Annotated[Finite, Field(gt=-1, le=2)] | None = None
    stop: Text | Annotated[list[Text], Field(min_length=1, max_length=4)] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] = {}
    generation_config: Json[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _closed(self) -> Body:
        for name, found, taken in (
            ("generation_config", set(self.generation_config or ()) - set(SAMPLING), SAMPLING),
            ("chat_template_kwargs", set(self.chat_template_kwargs) & set(OF_THE_SERVER), None),
        ):
            if found:
                one_of = f"; it may have {', '.join(taken)}" if taken else ""
                raise ValueError(f"{name} may not have {', '.join(sorted(found))}{one_of}")
        return self


class Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    type: str
    text: str | None = None

    @model_validator(mode="after")
    def _text(self) -> Part:
        if self.type in TEXT_PARTS and self.text is None:
            raise ValueError(f"a part of type {self.type} needs a text")
        return self


class Function(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    arguments: Json[Any] | dict[str, Any]


class ToolCall(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    function: Function


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    role: str
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] = []


class Chat(Body):
    counts = ("max_completion_tokens", "max_tokens")
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logit_bias: dict[Annotated[str, Field(pattern=r"^\d+$")], Finite] | None = None


class Completion(Body):
    prompt: Text
    suffix: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None


class Response(Body):
    counts = ("max_output_tokens",)
    input: Text | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None


BODIES: dict[str, type[Body] | None] = {
    "/v1/chat/completions": Chat,
    "/v1/completions": Completion,
    "/v1/responses": Response,
    "/v1/systemone": None,  # generates nothing, and transformers checks all of it
}


class Refused(Exception):
    """A request that is not answered: an HTTP status and a sentence."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status, self.why = status, why


class Gate:
    """ASGI middleware. A request gets ``new_tokens`` at most, and exactly so many if it does not say how many. Its
    messages may have ``parts`` of these types."""

    def __init__(self, app: Any, model: str, new_tokens: int, parts: tuple[str, ...]):
        self.app, self.model, self.new_tokens, self.parts = app, model, new_tokens, parts

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, looks = scope["path"], scope["method"] in ("GET", "HEAD", "OPTIONS")
        if looks and path != "/v1/models":  # there transformers lists all that lies in this machine's cache
            return await self.app(scope, receive, send)
        try:
            if looks:
                only = {"id": self.model, "object": "model", "created": 0, "owned_by": ""}
                return await _answer(send, 200, {"object": "list", "data": [only]})
            if path not in BODIES:
                raise Refused(
                    403, f"this server is pinned to {self.model} and does not offer {path}; it has {', '.join(BODIES)}"
                )
            raw = await _read(receive)
            if kind := BODIES[path]:
                raw = json.dumps(checked(raw, kind, self.new_tokens, self.parts)).encode()
        except Refused as error:
            return await _answer(send, error.status, _told(error.why))

        read = False

        async def receive_again() -> dict:
            nonlocal read
            if read:
                return await receive()  # the client's leaving
            read = True
            return {"type": "http.request", "body": raw, "more_body": False}

        headers = [(k, v) for k, v in scope["headers"] if k not in (b"content-length", b"transfer-encoding")]
        headers.append((b"content-length", str(len(raw)).encode()))
        return await self.app({**scope, "headers": headers}, receive_again, send)


def checked(raw: bytes, kind: type[Body], new_tokens: int, parts: tuple[str, ...]) -> dict[str, Any]:
    """The body, with the number of new tokens filled in where it says none. Raises :class:`Refused`."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON ({error})") from error
    try:
        found = kind.model_validate(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        deepest = max(errors, key=lambda e: len(e["loc"]))  # of a field that may be this or that, the nearest miss
        where = ".".join(str(part) for part in deepest["loc"])
        raise Refused(400, f"{where or 'the body'}: {deepest['msg']}") from error
    _check_used(body, kind, parts)
    draws(body)
    asked: dict[str, Any] = {name: getattr(found, name) for name in kind.counts}
    asked["generation_config.max_new_tokens"] = (found.generation_config or {}).get("max_new_tokens")
    given = {name: count for name, count in asked.items() if count is not None}
    for name, count in given.items():
        if type(count) is not int or not 1 <= count <= new_tokens:
            raise Refused(
                400,
                f"{name} is {count!r}, and this server gives 1 to {new_tokens} new tokens: ask for fewer, "
                "or start it with a larger --max-new-tokens",
            )
    return body | {kind.counts[0]: next(iter(given.values()), new_tokens)}


def _check_used(body: dict[str, Any], kind: type[Body], parts: tuple[str, ...]) -> None:
    """Raise :class:`Refused` for what transformers would pass over."""
    for name, value in body.items():
        if name in kind.model_fields or name in ABOUT_THE_CLIENT or value is None:
            continue
        if not any(type(value) is type(nothing) and value == nothing for nothing in ASKS_NOTHING.get(name, ())):
            told = one_line(ValueError(json.dumps(value)), limit=80)
            raise Refused(400, f"{name} is {told}, which this server does not use: leave it out")
    turns = body.get("messages") or body.get("input")
    if isinstance(turns, list):
        within = [turn.get("content") for turn in turns] if "role" in turns[0] else [turns]
        for part in (part for content in within if isinstance(content, list) for part in content):
            if isinstance(part, dict) and part.get("type") not in parts:
                raise Refused(400, f"a part is of type {part.get('type')}, and this model reads {', '.join(parts)}")


def draws(body: dict[str, Any]) -> bool | None:
    """Does a request ask for tokens that are drawn? None: it leaves that to the model's own generation_config. Raises
    :class:`Refused` for one that wants both."""
    given = json.loads(body.get("generation_config") or "{}")
    told = given.get("do_sample")
    given |= {name: value for name, value in body.items() if value is not None}
    names = [name for name in DRAWS if given.get(name) is not None]
    wanted = given.get("temperature") != 0 if names else None
    if told is not None and wanted is not None and told != wanted:
        against = ", ".join(names) if wanted else "temperature 0"
        raise Refused(
            400, f"generation_config.do_sample is {json.dumps(told)}, against {against}: leave out one of them"
        )
    return told if wanted is None else wanted


def drawing(build: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' ``_build_generation_config`` of a handler, but that a temperature draws, and that the seed goes
    along to :func:`within`: set as a request arrives, it is gone before that one's turn."""

    def build_drawing(handler: Any, body: dict[str, Any], default: Any, use_cb: bool = False) -> Any:
        config = build(handler, {**body, "seed": None}, default, use_cb=use_cb)
        if (asked := draws(body)) is not None:
            config.do_sample = asked
        config.seed = body.get("seed")
        return config

    return build_drawing


def guarded(app: Any, models: Any, model: str, new_tokens: int) -> Any:
    """transformers' application behind the gate, and its loaded ``models`` never beyond their context."""
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError

    async def unreadable(_: Any, error: Exception) -> Any:
        told = one_line(error, lines=None, limit=300)
        return JSONResponse(_told(f"this request cannot be answered ({type(error).__name__}: {told})"), 400)

    for kind in (KeyError, TypeError, ValueError, AttributeError, TemplateError):  # of a body that the gate let through
        app.add_exception_handler(kind, unreadable)

    async def refused(_: Any, error: Any) -> Any:
        return JSONResponse(_told(error.why), error.status)

    app.add_exception_handler(Refused, refused)
    parts = TEXT_PARTS
    for loaded in models.loaded_models.values():
        with explained(f"{model} cannot be served"):
            parts = PARTS[models.get_model_modality(loaded.model, processor=loaded.processor).name]
        config = loaded.model.config.get_text_config()
        # an encoder's input takes no room in its decoder's context
        positions = None if config.is_encoder_decoder else getattr(config, "max_position_embeddings", None)
        new_tokens = min(new_tokens, positions or new_tokens)
        loaded.model.generate = within(loaded.model.generate, positions)
    app.add_middleware(Gate, model=model, new_tokens=new_tokens, parts=parts)
    return app


def within(generate: Callable[..., Any], positions: int | None) -> Callable[..., Any]:
    """``generate`` that stops where the model's context of ``positions`` tokens ends (None: it has no end), with the
    seed that :func:`drawing` has put into the generation_config."""

    def bounded(*args: Any, input_ids: Any, generation_config: Any, **kwargs: Any) -> Any:
        length = input_ids.shape[-1]
        if not length:
            raise ValueError("the prompt has no tokens")
        if positions is not None:
            if length >= positions:
                raise ValueError(f"the prompt has {length} tokens, and the model's context is {positions}: shorten it")
            generation_config.max_new_tokens = min(generation_config.max_new_tokens, positions - length)
        if (seed := vars(generation_config).pop("seed", None)) is not None:
            torch.manual_seed(seed)
        return generate(*args, input_ids=input_ids, generation_config=generation_config, **kwargs)

    return bounded


async def _read(receive: Callable) -> bytes:
    body, size = bytearray(), 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise Refused(400, "the client left before its request was whole")
        part = message.get("body", b"")
        size += len(part)
        if size <= MAX_BODY:
            body += part
        # a client that is still sending hears no answer: a little too much is read to its end
        if size > MAX_BODY and (size > 4 * MAX_BODY or not message.get("more_body")):
            raise Refused(413, f"the body is larger than {MAX_BODY} bytes: send less")
        if not message.get("more_body"):
            return bytes(body)


def _told(why: str) -> dict[str, Any]:
    return {"error": {"message": why, "type": "invalid_request_error", "code": None, "param": None}}


async def _answer(send: Callable, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
