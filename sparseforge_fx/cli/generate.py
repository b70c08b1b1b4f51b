"""``sparseforge-fx generate``: text from an exported generator or from a model folder."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from sparseforge_fx.cli.app import AsJson, command, examples, pick_device, print_json


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
    max_new_tokens: Annotated[int, typer.Option(help="At most so many.")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(help="Below 1: safer, above: wilder.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from the likeliest so many; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that make up this share.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same text.")] = None,
    device: Annotated[str | None, typer.Option(help="For a model folder; default: cuda where there is one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Go on with each prompt. A model folder that is 2:4 runs packed where that is faster here."""
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    if model.endswith(".pt2"):
        from sparseforge_fx.deploy.export.generator import load_generator

        texts = load_generator(model).text(prompt, seed=seed, **options)
    else:
        texts = _from_folder(model, prompt, seed, device, options)
    if as_json:
        print_json([{"prompt": asked, "text": text} for asked, text in zip(prompt, texts, strict=True)])
        return
    for asked, text in zip(prompt, texts, strict=True):
        sys.stdout.write(f"{asked}{text}\n")


def _from_folder(model: str, prompts: list[str], seed: int | None, device: str | None, options: dict) -> list[str]:
    import torch

    from sparseforge_fx.deploy.checkpoints.load import load
    from sparseforge_fx.deploy.lowering.modules import lower_modules
    from sparseforge_fx.errors import SparseForgeError

    loaded: Any
    loaded, tokenizer = load(model)
    if tokenizer is None:
        raise SparseForgeError(f"{model} has no tokenizer: copy the files of one into the folder")
    if not getattr(loaded, "can_generate", lambda: False)():
        raise SparseForgeError(f"{model} is no language model that generates text")
    loaded = loaded.to(pick_device(device)).eval()
    try:
        lower_modules(loaded, tokens=[len(prompts)])
    except SparseForgeError as error:  # dense, or packed already: it generates all the same
        print(f"note: {error}", file=sys.stderr)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(prompts, return_tensors="pt", padding=True).to(loaded.device)
    if seed is not None:
        torch.manual_seed(seed)
    if not options["do_sample"]:
        options = {k: v for k, v in options.items() if k in ("max_new_tokens", "do_sample")}
    with torch.inference_mode():
        out = loaded.generate(**batch, pad_token_id=tokenizer.pad_token_id, **options)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
