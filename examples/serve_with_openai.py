"""A packed 2:4 model behind OpenAI's API: the server starts on a free port, answers, streams, and stops.

python examples/serve_with_openai.py            a tiny random model, half a minute
python examples/serve_with_openai.py FOLDER     a packed checkpoint, as sf.save_packed wrote it
"""

import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch
from openai import OpenAI
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sparseforge_fx as sf


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = sys.argv[1] if len(sys.argv) > 1 else write_tiny_model(Path(scratch) / "packed")
        port = free_port()
        command = [sys.executable, "-m", "sparseforge_fx.cli", "serve", folder, "--host", "127.0.0.1"]
        server = subprocess.Popen([*command, "--port", str(port)])  # in a shell: sparseforge-fx serve FOLDER
        try:
            wait_for(server, f"http://127.0.0.1:{port}/health")
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60)
            options = {"model": folder, "temperature": 0, "max_tokens": 8}
            messages = [{"role": "user", "content": "w20 w33 w41"}]
            answer = client.chat.completions.create(messages=messages, **options).choices[0].message.content
            print(f"answer: {answer}")
            chunks = client.chat.completions.create(messages=messages, stream=True, **options)
            streamed = [c.choices[0].delta.content or "" for c in chunks]
            print(f"streamed: {'the same' if ''.join(streamed) == answer else 'another'} answer")
        finally:
            server.kill()
            server.wait()


def write_tiny_model(folder: Path) -> str:
    """A random Llama of 260 words, w0 to w259."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=260, num_key_value_heads=1, eos_token_id=256, **shape))
    sf.sparsify(model)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(260)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}w7 {{ m['content'] }} w8 {% endfor %}w9"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w256", chat_template=template)
    sf.save_packed(model, tokenizer, folder)
    return str(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(server: subprocess.Popen, address: str, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    main()
