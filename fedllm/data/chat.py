"""Conversations as text: the tokenizer's own chat template, rendered as a chat server renders it.

A template comes with a tokenizer and is somebody else's program: what it raises becomes one line,
and one that does not end is stopped. A template that writes the date is given a fixed one, so
that the tokens of a row depend on the row alone.
"""

import datetime
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

from fedllm.data.turns import Turn
from fedllm.errors import DataError
from fedllm.storage.hub import first_line

TEMPLATE_DATE = datetime.date(2024, 7, 26)
"""The day that a template reads as today's; the one that Llama 3's writes where it has none."""

_REMEDY = "correct it (chat_template.jinja or tokenizer_config.json) or use data.template=alpaca"
# a conversation of a hundred turns takes some thousand
_MOST_LINES = 3_000_000
# the longest system turns that templates write by themselves take some thousand
_MOST_CHARACTERS = 1_000_000
_MOST_TIMES = 100
# counting lines takes as long as rendering: one that ended so often ends
_COUNTED = 256
_CODES = "AaBbcdefGgHIjMmpSUuVWwXxYyZz"


class ChatTemplate:
    """The chat template of one tokenizer.

    Raises:
        DataError: the tokenizer has none, or none that renders.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.name = f"the chat template of {tokenizer.name_or_path or 'model.path'}"
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "data.template: got chat, but the tokenizer of model.path has no chat template; "
                "use data.template=alpaca or a base model with a chat template"
            )
        try:
            text = tokenizer.get_chat_template()
        except Exception as error:  # several templates, none of them the default
            raise DataError(
                f"data.template: {self.name}: {first_line(error)}; {_REMEDY}"
            ) from error
        self._text = _dated(text) if "strftime_now" in text else text
        self._rendered = 0

    def render(self, turns: Sequence[Turn], *, opens_answer: bool = False) -> str:
        """Return a conversation as text; `opens_answer`: up to where the assistant begins.

        Raises:
            DataError: the template refuses these turns, is broken or does not end.
        """
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        self._rendered += 1
        try:
            with _bounded() if self._rendered <= _COUNTED else nullcontext():
                text: str = self._tokenizer.apply_chat_template(
                    messages,
                    chat_template=self._text,
                    tokenize=False,
                    add_generation_prompt=opens_answer,
                )
        except Exception as error:  # a template raises what it likes
            roles = ", ".join(dict.fromkeys(turn.role for turn in turns))
            raise DataError(
                f"data.template: {self.name} cannot render turns of {roles} "
                f"({first_line(error)}); {_REMEDY}"
            ) from error
        given = sum(len(turn.content) for turn in turns)
        if len(text) > _MOST_CHARACTERS + _MOST_TIMES * given:
            found = f"writes {len(text):,} characters for {given:,}"
            raise DataError(f"data.template: {self.name} {found}; {_REMEDY}")
        return text


class _TooLongError(Exception):
    pass


@contextmanager
def _bounded() -> Iterator[None]:
    """Stop a template after so many of its lines: the same number on every machine."""
    lines = 0

    def count(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if lines > _MOST_LINES:
                raise _TooLongError(f"it does not end: stopped after {_MOST_LINES:,} lines")
        return count

    def enter(frame: FrameType, _event: str, _argument: Any) -> Any:
        return count if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def _dated(text: str) -> str:
    """Return a template in which `strftime_now` knows one day; the rest renders as before."""
    written = "format"
    for code in _CODES:
        written += f"|replace('%{code}', {TEMPLATE_DATE.strftime(f'%{code}')!r})"
        written += f"|replace('%-{code}', {TEMPLATE_DATE.strftime(f'%-{code}')!r})"
    # the line break belongs to the tag before it: the template begins at the start of a line
    return f"{{% macro strftime_now(format) -%}}{{{{ {written} }}}}{{%- endmacro %}}\n{text}"
