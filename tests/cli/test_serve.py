"""sparseforge-fx serve: transformers' server over a packed folder, asked through HTTP by the openai client."""

import concurrent.futures
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from packed_models import sparse_model
from tiny_checkpoint import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import sparseforge_fx as sf
from sparseforge_fx import cli

for needed in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(needed)

TEMPLATE = "{% for m in messages %}w7 {{ m['content'] }} w8 {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
QUESTION = [{"role": "user", "content": "w20 w33 w41"}]
GREEDY = {"temperature": 0, "max_tokens": 12}
LIMIT = 40  # new tokens that the server gives; the model's context holds 128


def chat_tokenizer():
    """A word per token, so that whatever a random model says is text."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(260)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w256", chat_template=TEMPLATE)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve") / "packed"
    sf.save_packed(sparse_model("llama"), chat_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    """A client of a server, which is killed whatever happens."""
    from openai import OpenAI

    port, log = free_port(), tmp_path_factory.mktemp("log") / "server.txt"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "sparseforge_fx.cli", "serve", str(folder), "--host", "127.0.0.1"]
    command += ["--max-new-tokens", str(LIMIT)]
    with open(log, "w") as output:
        server = subprocess.Popen(
            [*command, "--port", str(port), "--device", "cpu"], env=environment, stdout=output, stderr=output
        )
    try:
        for _ in range(1200):
            assert server.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.1)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def expected():
    """Greedy text of the dense masked model."""
    tokenizer, model = chat_tokenizer(), sparse_model("llama")
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**ids, do_sample=False, max_new_tokens=12)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


def test_chat(client, folder, expected):
    answer = client.chat.completions.create(model=str(folder), messages=QUESTION, **GREEDY)
    assert answer.choices[0].message.content == expected and expected
    assert answer.usage.completion_tokens == 12 and answer.choices[0].finish_reason == "length"


def test_streamed_chat(client, folder, expected):
    chunks = list(client.chat.completions.create(model=str(folder), messages=QUESTION, stream=True, **GREEDY))
    parts = [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]
    assert "".join(parts) == expected and len(parts) > 1


# -- what it does not do ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def ask(client):
    """``(path, body, method) -> (status, answer)``; a body that is not bytes goes as json."""
    root = str(client.base_url).removesuffix("/v1/")

    def ask(path, body=None, method="POST"):
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        request = urllib.request.Request(root + path, content, {"content-type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as answer:
            return answer.code, json.loads(answer.read())

    return ask


def told(answer):
    status, content = answer
    assert status == 400, answer
    return content["error"]["message"]


CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
FIELDS = [
    (CHAT, {"messages": QUESTION}, "max_tokens"),
    (CHAT, {"messages": QUESTION}, "max_completion_tokens"),
    (TEXT, {"prompt": "w20 w33"}, "max_tokens"),
    (RESPONSES, {"input": "w20 w33", "stream": False}, "max_output_tokens"),
]


@pytest.mark.parametrize(("path", "body", "field"), FIELDS)
def test_nobody_gets_more_new_tokens_than_the_server_gives(ask, path, body, field):
    assert f"{field} is 1000000000, and this server gives 1 to {LIMIT}" in told(ask(path, body | {field: 10**9}))
    config = json.dumps({"max_new_tokens": 10**9, "do_sample": False})
    assert "generation_config.max_new_tokens is 1000000000" in told(ask(path, body | {"generation_config": config}))
    for given in ({}, {"generation_config": "{}"}, {field: None}):
        status, content = ask(path, body | given | {"temperature": 0})
        usage = content["usage"]
        assert status == 200 and usage.get("completion_tokens", usage.get("output_tokens")) == LIMIT
    status, content = ask(path, body | {"generation_config": '{"max_new_tokens": 3}'})
    assert status == 200 and 3 in (content["usage"].get("completion_tokens"), content["usage"].get("output_tokens"))


def test_never_beyond_the_context_of_the_model(ask, client, folder):
    status, content = ask(TEXT, {"prompt": " ".join(["w20"] * 118), "temperature": 0})
    assert status == 200 and content["usage"]["total_tokens"] == 128
    assert content["choices"][0]["finish_reason"] == "length"
    long = " ".join(["w20"] * 128)
    assert "the prompt has 128 tokens, and the model's context is 128" in told(ask(TEXT, {"prompt": long}))
    chunks = client.completions.create(model=str(folder), prompt=" ".join(["w20"] * 126), stream=True, **GREEDY)
    assert [c.usage.completion_tokens for c in chunks if c.usage] == [2]


PICTURE = [{"type": "text", "text": "w20"}, {"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
MALFORMED = [
    (CHAT, b"{", "not JSON"),
    (CHAT, b"", "not JSON"),
    (CHAT, b"\xff\xfe", "not JSON"),
    (CHAT, b"[" * 100_000, "not JSON"),
    (CHAT, [], "the body"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "w20"}, "messages"),
    (CHAT, {"messages": [{"content": "w20"}]}, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "needs a text"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": None}]}, "messages.0.tool_calls"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]}, "arguments"),
    (CHAT, {"messages": QUESTION, "temperature": "hot"}, "temperature"),
    (CHAT, b'{"messages": [{"role": "user", "content": "w20"}], "temperature": NaN}', "temperature"),
    (CHAT, {"messages": QUESTION, "top_p": 1.5}, "top_p"),
    (CHAT, {"messages": QUESTION, "seed": 2**70}, "seed"),
    (CHAT, {"messages": QUESTION, "stop": []}, "stop"),
    (CHAT, {"messages": QUESTION, "frequency_penalty": -1}, "frequency_penalty"),
    (CHAT, {"messages": QUESTION, "logit_bias": {"x": 1}}, "logit_bias"),
    (CHAT, {"messages": QUESTION, "logit_bias": {"99999": 1}}, "cannot be answered"),
    (CHAT, {"messages": QUESTION, "max_tokens": 0}, "max_tokens"),
    (CHAT, {"messages": QUESTION, "max_tokens": "many"}, "max_tokens"),
    (CHAT, {"messages": QUESTION, "generation_config": "{"}, "generation_config"),
    (CHAT, {"messages": QUESTION, "generation_config": '{"max_new_tokens": true}'}, "max_new_tokens is True"),
    (CHAT, {"messages": QUESTION, "generation_config": '{"num_beams": 4096}'}, "may not have num_beams"),
    (
        CHAT,
        {"messages": QUESTION, "generation_config": '{"do_sample": true, "temperature": "hot"}'},
        "cannot be answered",
    ),
    (CHAT, {"messages": QUESTION, "chat_template_kwargs": {"chat_template": "x"}}, "may not have chat_template"),
    (CHAT, {"messages": QUESTION, "n": 3}, "n is 3, which this server does not use: leave it out"),
    (CHAT, {"messages": QUESTION, "logprobs": True}, "logprobs is true"),
    (CHAT, {"messages": QUESTION, "presence_penalty": 0.5}, "presence_penalty is 0.5"),
    (CHAT, {"messages": QUESTION, "response_format": {"type": "json_object"}}, "response_format is"),
    (CHAT, {"messages": QUESTION, "tool_choice": "none"}, 'tool_choice is "none"'),
    (CHAT, {"messages": QUESTION, "temprature": 0.5}, "temprature is 0.5"),
    (TEXT, {"prompt": "w20", "best_of": 2}, "best_of is 2"),
    (TEXT, {"prompt": "w20", "echo": True}, "echo is true"),
    (TEXT, {"prompt": "w20", "logprobs": 0}, "logprobs is 0"),
    (TEXT, {"prompt": "w20", "logit_bias": {"20": 5}}, "logit_bias is"),
    (RESPONSES, {"input": "w20", "previous_response_id": "x"}, 'previous_response_id is "x"'),
    (RESPONSES, {"input": "w20", "reasoning": {"effort": "low"}}, "reasoning is"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": PICTURE}]},
        "a part is of type image_url, and this model reads text",
    ),
    (RESPONSES, {"input": [{"type": "input_image", "image_url": "x"}]}, "a part is of type input_image"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "a part is of type input_audio"),
    (
        CHAT,
        {"messages": QUESTION, "temperature": 0.5, "generation_config": '{"do_sample": false}'},
        "against temperature",
    ),
    (
        CHAT,
        {"messages": QUESTION, "temperature": 0, "generation_config": '{"do_sample": true}'},
        "against temperature 0",
    ),
    (TEXT, {}, "prompt"),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": "  "}, "no tokens"),
    (TEXT, {"prompt": ["w20"]}, "prompt"),
    (RESPONSES, {}, "input"),
    (RESPONSES, {"input": []}, "input"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "cannot be answered"),
]


@pytest.mark.parametrize(("path", "body", "match"), MALFORMED)
def test_what_cannot_be_read_is_refused_in_a_sentence(ask, path, body, match):
    assert match in told(ask(path, body))


def text_of(answer):
    status, content = answer
    assert status == 200, answer
    return content["choices"][0]["text"]


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 2.0},
        {"top_p": 1.0},
        {"generation_config": '{"top_k": 50}'},
        {"generation_config": '{"do_sample": true}'},
    ],
)
def test_tokens_are_drawn_where_the_request_says_how(ask, how):
    body = {"prompt": "w20 w33", "max_tokens": 8}
    draw = lambda seed: text_of(ask(TEXT, {**body, **how, "seed": seed}))  # noqa: E731
    assert len({draw(seed) for seed in range(3)}) > 1 and draw(1) == draw(1)


def test_a_seed_is_of_its_request_alone(ask):
    draw = lambda seed: text_of(ask(TEXT, {"prompt": "w20", "max_tokens": 30, "temperature": 1.5, "seed": seed}))  # noqa: E731
    alone = [draw(seed) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(draw, range(4))) == alone


def test_fields_that_ask_for_what_is_done_anyway_are_taken(ask):
    anyway = {"n": 1, "presence_penalty": 0, "response_format": {"type": "text"}, "user": "me", "logprobs": None}
    assert (
        ask(CHAT, {"messages": QUESTION, "max_tokens": 1, **anyway, "stream_options": {"include_usage": True}})[0]
        == 200
    )


def test_a_large_body_is_refused(ask):
    status, content = ask(TEXT, {"prompt": "w20 " * 3_000_000})
    assert status == 413 and "send less" in content["error"]["message"]


def test_it_stays_with_its_model(ask, folder, tmp_path):
    for path in (
        "/load_model",
        "/reset",
        "/v1/audio/transcriptions",
        "/load_model/",
        "/%6coad_model",
        "/v1/embeddings",
    ):
        status, content = ask(path, {"model": str(tmp_path)})
        assert status == 403 and f"pinned to {folder}" in content["error"]["message"], path
    status, content = ask(CHAT, {"model": "another", "messages": QUESTION})
    assert status == 400 and "pinned" in content["detail"]
    assert [m["id"] for m in ask("/v1/models", method="GET")[1]["data"]] == [str(folder)]
    assert ask("/health", method="GET") == (200, {"status": "ok"})
    assert ask(TEXT, {"prompt": "w20", "max_tokens": 1})[0] == 200


def test_every_address_of_transformers_is_known_here(folder):
    """One that a later version adds is refused until somebody has looked at it."""
    from transformers.cli.serving.server import build_server

    from sparseforge_fx.cli.requests import BODIES

    application = build_server(*[None] * 7)
    paths = {route.path for route in application.routes if "POST" in route.methods}
    assert paths - set(BODIES) == {"/load_model", "/reset", "/v1/audio/transcriptions"}


# -- what ends before a server starts ---------------------------------------------------------------------------------
@pytest.fixture
def refuse(monkeypatch):
    def started(*_, **__):
        raise AssertionError("the server started")

    monkeypatch.setattr("transformers.cli.transformers.app", started)

    def run(match, *arguments):
        result = CliRunner().invoke(cli.app, ["serve", *map(str, arguments)])
        assert result.exit_code == 2 and match in result.stderr and len(result.stderr.splitlines()) == 1, result

    return run


def test_bad_models(refuse, folder, tmp_path):
    refuse("no model folder", tmp_path / "nowhere")
    refuse("no config.json", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    refuse("cannot read the configuration", tmp_path)
    damaged = tmp_path / "damaged"
    sf.save_packed(sparse_model("llama"), chat_tokenizer(), damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refuse("copy it anew", damaged)
    (tmp_path / "at@home").symlink_to(folder)
    refuse("rename the folder", tmp_path / "at@home")


def test_damage_that_only_loading_finds(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("uvicorn.Server.run", lambda self: pytest.fail("the server started"))
    shutil.copytree(folder, tmp_path / "p")
    weights = tmp_path / "p" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = CliRunner().invoke(cli.app, ["serve", str(tmp_path / "p"), "--port", str(free_port())])
    assert result.exit_code == 2 and "SHA-256 differs" in result.stderr and "Traceback" not in result.stderr


def test_bad_addresses(refuse, folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        refuse("name another --host or --port", folder, "--host", "127.0.0.1", "--port", taken.getsockname()[1])
    refuse("name one from 1 to 65535", folder, "--port", "70000")
    refuse("name another --host", folder, "--host", "no.such.host.invalid")


def test_without_a_server_installed(refuse, folder, monkeypatch):
    from importlib import util

    monkeypatch.setattr(util, "find_spec", lambda name, find=util.find_spec: None if name == "uvicorn" else find(name))
    refuse("serving needs uvicorn: pip install 'sparseforge-fx[serve]'", folder)


def test_it_listens_on_this_machine_unless_told_and_its_help_says_what_it_does_not_protect():
    told = " ".join(CliRunner().invoke(cli.app, ["serve", "--help"], env={"COLUMNS": "200"}).stdout.split())
    assert "[default: localhost]" in told and "--max-new-tokens" in told and "[default: 1024]" in told
    assert "There is no password" in told and "8 MB" in told


def test_options_go_on_to_transformers(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("transformers.cli.transformers.app", lambda arguments, **_: calls.append(arguments))
    sf.save_packed(sparse_model("llama"), byte_tokenizer(), tmp_path / "p")
    port = str(free_port())
    result = CliRunner().invoke(cli.app, ["serve", str(tmp_path / "p"), "--port", port, "--device", "cpu", "--compile"])
    assert result.exit_code == 0 and "has no chat template" in result.stderr
    assert calls == [
        ["serve", str(tmp_path / "p"), "--host", "localhost", "--port", port, "--device", "cpu", "--compile"]
    ]
