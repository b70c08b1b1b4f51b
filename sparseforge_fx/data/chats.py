"""Chats as text: the rows of ``messages`` and ``conversations`` through a tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparseforge_fx.errors import SparseForgeError, one_line

CHAT_COLUMNS = ("messages", "conversations", "conversation")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


def is_chat(value: Any) -> bool:
    """A list of turns, {"role", "content"} or {"from", "value"} each."""
    return isinstance(value, list) and bool(value) and all(map(_is_turn, value))


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and ({"role", "content"} <= set(turn) or {"from", "value"} <= set(turn))


def chat_text(turns: list[Mapping[str, Any]], tokenizer: Any, where: str, system: Any = None) -> str:
    """The text of a chat, as the model was tuned to see it, without the beginning-of-sequence token that the tokenizer
    puts before every sequence by itself. ``system``: the instruction that a row holds beside its turns.

    Raises SparseForgeError without a chat template, or for a chat that the template refuses; ``where`` names the row.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        what = "there is no tokenizer" if tokenizer is None else "the tokenizer has no chat template"
        raise SparseForgeError(
            f"{where} is a chat and {what} to write it out: name a column of text with text_column, or set "
            "tokenizer.chat_template"
        )
    named = [
        {"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} if "from" in turn else dict(turn)
        for turn in turns
    ]
    if isinstance(system, str) and system and named[0]["role"] != "system":
        named.insert(0, {"role": "system", "content": system})
    try:
        text = tokenizer.apply_chat_template(named, tokenize=False)
    except Exception as error:  # an open set: whatever the template raises
        raise SparseForgeError(
            f"{where} does not go through the tokenizer's chat template ({one_line(error)}): repair or drop it"
        ) from error
    return text if leading_bos(tokenizer) is None else text.removeprefix(tokenizer.bos_token)


def leading_bos(tokenizer: Any) -> int | None:
    """The beginning-of-sequence token that a tokenizer puts before a text; None if it puts none.

    Told by encoding something: `add_bos_token` reads False of a tokenizer that was saved and loaded, whatever it does.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    ids = [] if bos is None else tokenizer("a")["input_ids"]
    return bos if len(ids) and ids[0] == bos else None
