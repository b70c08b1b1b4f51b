"""``sparseforge-fx generate``: text from an exported generator or from a model folder."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from sparseforge_fx.cli.app import AsJson, command, examples, pick_device, print_json
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.ranges import Positive, ShareAboveZero, check_numbers


@command
@examples(
    'generate generator.pt2 -p "The sky is"',
    'generate out -p "The sky is" --sample --temperature 0.8 --seed 1',
    'generate out -p "One" -p "Two" --json',
)
def generate(
    model: Annotated[
        str, typer.Argument(help="A file of `export --generator`, or a model as elsewhere.", show_default=False)
    ],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="The text to go on with (repeatable).")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many.")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(help="Below 1: safer, above: wilder.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the likeliest so many; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that make up this share.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same text.")] = None,
    device: Annotated[str | None, typer.Option(help="For a model folder; default: cuda where there is one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Go on with each prompt. A model folder that is 2:4 runs packed where that is faster here."""
    shares = {"--temperature": temperature, "--top-p": top_p}
    check_numbers({"--temperature": Positive, "--top-p": ShareAboveZero}, shares)
    if not sample and (given := [n for n, on in _drawing(temperature, top_k, top_p, seed).items() if on]):
        raise SparseForgeError(f"{', '.join(given)} without --sample has no effect: add it, or leave {given[0]} out")
    check_prompts(prompt)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    if model.endswith(".pt2"):
        from sparseforge_fx.deploy.export.generator import load_generator

        if device is not None:
            raise SparseForgeError(f"--device is for a model folder: {model} runs where it was exported for")
        texts = load_generator(model).text(prompt, seed=seed, **options)
    else:
        texts = _from_folder(model, prompt, seed, device, options)
    if as_json:
        print_json([{"prompt": asked, "text": text} for asked, text in zip(prompt, texts, strict=True)])
        return
    for asked, text in zip(prompt, texts, strict=True):
        sys.stdout.write(f"{asked}{text}\n")


def _drawing(temperature: float, top_k: int, top_p: float, seed: int | None) -> dict[str, bool]:
    """Which of the options that say how to draw are not as they are by default?"""
    return {
        "--temperature": temperature != 1.0, "--top-k": top_k != 0, "--top-p": top_p != 1.0, "--seed": seed is not None,
    }  # fmt: skip


def check_prompts(prompts: list[str]) -> None:
    """Raise SparseForgeError for bytes that are no text, of which Python makes characters that no tokenizer knows."""
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise SparseForgeError(f"--prompt {prompt!a} is not UTF-8: give text in that encoding") from error


def _from_folder(model: str, prompts: list[str], seed: int | None, device: str | None, options: dict) -> list[str]:
    import torch

    from sparseforge_fx.data.prompts import prompt_batch
    from sparseforge_fx.deploy.checkpoints.load import load
    from sparseforge_fx.deploy.lowering.modules import lower_modules

    loaded: Any
    loaded, tokenizer = load(model)
    if tokenizer is None:
        raise SparseForgeError(f"{model} has no tokenizer: copy the files of one into the folder")
    if not getattr(loaded, "can_generate", lambda: False)():
        raise SparseForgeError(f"{model} is no language model that generates text")
    batch = prompt_batch(tokenizer, prompts)
    options["max_new_tokens"] = _fitting(loaded, _prompt_length(loaded, batch), options["max_new_tokens"])
    loaded = loaded.to(pick_device(device)).eval()
    try:
        lower_modules(loaded, tokens=[len(prompts)])
    except SparseForgeError as error:  # dense, or packed already: it generates all the same
        print(f"note: {error}", file=sys.stderr)
    batch = batch.to(loaded.device)
    if seed is not None:
        torch.manual_seed(seed)
    if not options["do_sample"]:
        options = {k: v for k, v in options.items() if k in ("max_new_tokens", "do_sample")}
    return go_on(loaded, tokenizer, batch, **options)


def go_on(model: Any, tokenizer: Any, batch: Any, **options: Any) -> list[str]:
    """The text behind each prompt of a batch of :func:`sparseforge_fx.data.prompts.prompt_batch`. ``options`` go to
    ``model.generate``, to which the tokenizer is what it knows the stop strings of a model by."""
    import torch

    one = {"num_return_sequences": 1, "return_dict_in_generate": False}  # whatever the model's generation_config says
    with torch.inference_mode():
        out = model.generate(**batch, tokenizer=tokenizer, pad_token_id=tokenizer.pad_token_id, **one, **options)
    return tokenizer.batch_decode(out[:, _prompt_length(model, batch) :], skip_special_tokens=True)


def _prompt_length(model: Any, batch: Any) -> int:
    """Tokens of a prompt that come before those of an answer; 0 where an encoder reads it."""
    return 0 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]


def _fitting(model: Any, length: int, wanted: int) -> int:
    """How many tokens the model has positions for behind a prompt; fewer than ``wanted`` are told."""
    from sparseforge_fx.data.opening import positions

    limit = positions(model)
    if limit is None or length + wanted <= limit:
        return wanted
    if length >= limit:
        raise SparseForgeError(f"the prompt has {length} tokens and the model {limit} positions: shorten it")
    print(f"note: no more than {limit - length} new tokens fit the model's {limit} positions", file=sys.stderr)
    return limit - length
