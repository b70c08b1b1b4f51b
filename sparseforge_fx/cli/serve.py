"""``sparseforge-fx serve``: transformers' own OpenAI-compatible server, in a process that knows packed checkpoints.

It does because sparseforge_fx is imported (see ``transformers_hook``). Ours is the gate before it (``requests``).
"""

from __future__ import annotations

import errno
import importlib.util
import socket
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseforge_fx.cli.app import app, guard
from sparseforge_fx.errors import SparseForgeError

NEEDS = ("fastapi", "uvicorn", "openai", "pydantic")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: sparseforge-fx serve packed --port 8000",
)
@guard
def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(help="A Hugging Face folder, packed or not, or a hub id.", show_default=False)
    ],
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "localhost",
    port: Annotated[int, typer.Option(help="The port to listen at.")] = 8000,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="A request that asks for more is refused.")] = 1024,
) -> None:
    """Serve a model over HTTP (OpenAI's API); further options are those of "transformers serve", as they are there.

    Clients name the model as it is named here. Ends at Ctrl-C.

    Protected: no request gets more than --max-new-tokens, nor (but with --continuous-batching) more than the model's
    context holds; bodies over 8 MB, malformed ones, and fields and parts that nothing would use are refused; no request
    loads or unloads a model. With --continuous-batching all requests share the model's own way of drawing tokens: one
    that asks for another is refused.

    Not protected: whoever reaches the port may use it. There is no password, no encryption, no limit on how many ask or
    how often; one request is answered at a time, and the others wait. That is why it listens on this machine only,
    unless --host says otherwise: put a proxy that knows its users before it.
    """
    if absent := [name for name in NEEDS if importlib.util.find_spec(name) is None]:
        raise SparseForgeError(f"serving needs {', '.join(absent)}: pip install 'sparseforge-fx[serve]'")
    _check_model(model)
    _check_address(host, port)
    from transformers.cli.serving import server, utils
    from transformers.cli.transformers import app as transformers_app

    from sparseforge_fx.cli.one_batch import of_the_model
    from sparseforge_fx.cli.requests import drawing, guarded

    build, configure = server.build_server, utils.BaseHandler._build_generation_config
    init = utils.CBGenerateManager.init_cb

    def build_guarded(models: Any, *args: Any, **kwargs: Any) -> Any:
        return guarded(build(models, *args, **kwargs), models, model, max_new_tokens)

    server.build_server = build_guarded  # type: ignore[assignment]
    utils.BaseHandler._build_generation_config = drawing(configure)  # type: ignore[method-assign]
    utils.CBGenerateManager.init_cb = of_the_model(init)  # type: ignore[method-assign]
    try:
        transformers_app(["serve", model, "--host", host, "--port", str(port), *context.args], prog_name="transformers")
    finally:
        server.build_server, utils.BaseHandler._build_generation_config = build, configure  # type: ignore[method-assign]
        utils.CBGenerateManager.init_cb = init  # type: ignore[method-assign]


def _check_model(model: str) -> None:
    """Raise SparseForgeError for what the server would only find out while it starts, or at the first request."""
    from sparseforge_fx.deploy.checkpoints.packed_files import check_folder
    from sparseforge_fx.models.dense import is_packed, load_config, load_tokenizer, locate

    where = locate(model)
    if where.gguf:
        raise SparseForgeError(f"{model} is a GGUF file, no packed checkpoint: give a Hugging Face folder or a hub id")
    if "@" in model:  # transformers' server takes what comes after it for a revision
        raise SparseForgeError(f"the server cannot load {model}, whose name has an '@': rename the folder")
    config = load_config(where)
    if is_packed(config) and Path(where.name).is_dir():
        check_folder(Path(where.name))
    tokenizer = load_tokenizer(where, config)
    if tokenizer is None:
        raise SparseForgeError(f"{model} has no tokenizer: copy the files of one into the folder of a language model")
    if not tokenizer.chat_template:
        print(f"note: {model} has no chat template: ask /v1/completions, not /v1/chat/completions", file=sys.stderr)


def _check_address(host: str, port: int) -> None:
    if not 0 < port < 65536:
        raise SparseForgeError(f"there is no port {port}: name one from 1 to 65535")
    failed: list[OSError] = []
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SparseForgeError(f"{host} is no address of this machine ({error}): name another --host") from error
    for family, kind, protocol, _, address in places:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:  # localhost may have an IPv6 address that this machine cannot use
            failed.append(error)
    if len(failed) == len(places) or any(error.errno == errno.EADDRINUSE for error in failed):
        raise SparseForgeError(f"cannot listen at {host}:{port} ({failed[0]}): name another --host or --port")
