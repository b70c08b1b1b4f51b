"""Chats as text: the rows of ``messages`` and ``conversations`` through a tokenizer's chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sparseforge_fx.errors import SparseForgeError, one_line

CHAT_COLUMNS = ("messages", "conversations", "conversation")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


def is_chat(value: Any) -> bool:
    """A list of turns, {"role", "content"} or {"from", "value"} each; it may hold none."""
    return isinstance(value, list) and all(map(_is_turn, value))


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and ("role" in turn or {"from", "value"} <= set(turn))


def tools_of(row: Mapping[str, Any]) -> list[Any] | None:
    """The tools that a row holds beside its turns: a list, or json of one. Raises ValueError for broken json."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.lstrip().startswith("["):
        tools = json.loads(tools)
    return tools if isinstance(tools, list) and tools else None


def writes(part: str, tokenizer: Any) -> bool:
    """Does the tokenizer's chat template look at this part of a chat?"""
    return part in str(getattr(tokenizer, "chat_template", None))


def chat_text(
    turns: list[Mapping[str, Any]], tokenizer: Any, where: str, system: Any = None, tools: list[Any] | None = None
) -> str:
    """The text of a chat, as the model was tuned to see it, without the beginning-of-sequence token that the tokenizer
    puts before every sequence by itself. What is None in it counts as not there (tables fill their rows with it).

    Args:
        system: the instruction that a row holds beside its turns.
        tools: what the assistant may call.

    Raises SparseForgeError without a chat template, or for a chat that the template refuses or that has a turn without
    content; ``where`` names the row.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        what = "there is no tokenizer" if tokenizer is None else "the tokenizer has no chat template"
        raise SparseForgeError(
            f"{where} is a chat and {what} to write it out: name a column of text with text_column, or set "
            "tokenizer.chat_template"
        )
    named = [
        _without_none(
            {"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} if "from" in turn else turn
        )
        for turn in turns
    ]
    for turn in named:
        called = "tool_calls" in turn
        if "content" not in turn and not (called and writes("tool_calls", tokenizer)):
            why = " but tool_calls, which the tokenizer's chat template does not write" if called else ""
            raise SparseForgeError(f"{where} is a chat with a turn without content{why}: repair or drop the row")
    if isinstance(system, str) and system and named[0].get("role") != "system":
        named.insert(0, {"role": "system", "content": system})
    try:
        text = tokenizer.apply_chat_template(named, tools=_without_none(tools), tokenize=False)
    except Exception as error:  # an open set: whatever the template raises
        raise SparseForgeError(
            f"{where} does not go through the tokenizer's chat template ({one_line(error)}): repair or drop it"
        ) from error
    return text if leading_bos(tokenizer) is None else text.removeprefix(tokenizer.bos_token)


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(part) for key, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, list) else value


def leading_bos(tokenizer: Any) -> int | None:
    """The beginning-of-sequence token that a tokenizer puts before a text; None if it puts none.

    Told by encoding something: `add_bos_token` reads False of a tokenizer that was saved and loaded, whatever it does.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    ids = [] if bos is None else tokenizer("a")["input_ids"]
    return bos if len(ids) and ids[0] == bos else None
