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


def chat_text(turns: list[Mapping[str, Any]], tokenizer: Any, where: str) -> str:
    """The text of a chat, as the model was tuned to see it, without a beginning-of-sequence token (every sequence gets
    its own).

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
    try:
        text = tokenizer.apply_chat_template(named, tokenize=False)
    except Exception as error:  # an open set: whatever the template raises
        raise SparseForgeError(
            f"{where} does not go through the tokenizer's chat template ({one_line(error)}): repair or drop it"
        ) from error
    return text.removeprefix(getattr(tokenizer, "bos_token", None) or "\0")
