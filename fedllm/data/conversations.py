"""Conversations: from a user's messages to turns of four roles.

Two notations are common, and both are read: `{"role", "content"}` (OpenAI) and `{"from", "value"}`
(ShareGPT).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from fedllm.data.blocks import Place
from fedllm.errors import DataError

TURN_LISTS = pa.list_(pa.struct({"role": pa.large_string(), "content": pa.large_string()}))

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_CALL_KEYS = ("tool_calls", "function_call")
# 0 or false here means that the message is not to be trained
_WEIGHT_KEYS = ("weight", "train")


def turn_lists(
    values: Sequence[Any], systems: Sequence[Any] | None, where: str, place: Place
) -> pa.Array:
    """Return the turns of conversations up to the last answer, included; null without an answer.

    Args:
        values: one conversation a row, as a list of messages; null without one.
        systems: the system prompt of every row; None: there is no column of system prompts.
        where: the file.
        place: returns the place of a row in the file.

    Raises:
        DataError: a message has an unknown role, holds no text or calls a tool (with its place).
    """
    rows = []
    for index, value in enumerate(values):
        at = f"{where} {place(index)}"
        turns = [_turn(message, at) for message in _messages(value, at)]
        system = systems[index] if systems is not None else None
        if turns and system:
            turns = _with_system(turns, system, at)
        rows.append(_up_to_last_answer(turns))
    return pa.array(rows, TURN_LISTS)


def answers(turns: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a list with the last answer of every conversation; an empty list without one."""
    lists = pa.list_(pa.large_string())
    return pa.chunked_array(
        [
            pa.array([[row[-1]["content"]] if row else [] for row in chunk.to_pylist()], lists)
            for chunk in turns.chunks
        ],
        type=lists,
    )


def _messages(value: Any, at: str) -> Sequence[Any]:
    if value is None:
        return []
    if isinstance(value, Mapping) and value and all(isinstance(v, list) for v in value.values()):
        # older data sets of Hugging Face store a sequence of records as a record of sequences
        names, columns = list(value), list(value.values())
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(value, list):
        raise DataError(f"data.path: {at} holds {value!r:.40}, need a list of messages")
    return value


def _turn(message: Any, at: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise DataError(
            f"data.path: {at} holds the message {message!r:.40}, need {{role, content}}"
        )
    name = _first(message, "role", "from")
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if any(message.get(key) for key in _CALL_KEYS) or name == "function_call":
        raise DataError(f"data.path: {at} calls a tool, which is not supported; leave the row out")
    if role is None:
        raise DataError(
            f"data.path: {at} has a message of role {name!r}; need one of {', '.join(ROLES)}"
        )
    for key in _WEIGHT_KEYS:
        if message.get(key) == 0:
            raise DataError(
                f"data.path: {at} has a message of {key} {json.dumps(message[key])}, but every "
                f"answer is trained; leave out the {key} or the row"
            )
    return {"role": role, "content": _content(_first(message, "content", "value"), at, role)}


def _first(message: Mapping[str, Any], *names: str) -> Any:
    return next((message[name] for name in names if message.get(name) is not None), None)


def _content(value: Any, at: str, role: str) -> str:
    """Return the text of a message, which may come in parts."""
    if isinstance(value, str):
        return value
    parts = [_part(part) for part in value] if isinstance(value, list) and value else [None]
    texts = [part for part in parts if part is not None]
    if len(texts) < len(parts):
        raise DataError(
            f"data.path: {at} has a message of {role} whose content is not text; write it as text, "
            "or leave the row out"
        )
    return "".join(texts)


def _part(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    is_text = isinstance(part, Mapping) and part.get("type", "text") == "text"
    text = part.get("text") if is_text else None
    return text if isinstance(text, str) else None


def _with_system(turns: list[dict[str, str]], system: Any, at: str) -> list[dict[str, str]]:
    if not isinstance(system, str):
        raise DataError(f"data.path: {at} has the system prompt {system!r:.40}, need text")
    if turns[0]["role"] != "system":
        return [{"role": "system", "content": system}, *turns]
    if turns[0]["content"] != system:
        raise DataError(
            f"data.path: {at} has two system prompts, one in the column `system` and one in its "
            "messages; keep one"
        )
    return turns


def _up_to_last_answer(turns: list[dict[str, str]]) -> list[dict[str, str]] | None:
    count = len(turns)
    while count and not (turns[count - 1]["role"] == "assistant" and turns[count - 1]["content"]):
        count -= 1
    return turns[:count] or None
