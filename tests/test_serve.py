"""sparseforge-fx serve: transformers' server over a packed folder, asked through HTTP by the openai client."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
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
