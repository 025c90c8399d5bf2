"""Chat templates of tokenizers, rendered as a chat server renders them.

A template is a program that comes with a tokenizer. Whatever it raises becomes one line, and a
template that does not end is stopped. A template that writes the date gets a fixed date, so that
the tokens of a row depend on the row alone.
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
"""The date of today for every template; Llama 3's template writes it when it gets no date."""

_REMEDY = "correct it (chat_template.jinja or tokenizer_config.json) or use data.template=alpaca"
# a conversation of a hundred turns takes some thousand
_MAX_LINES = 3_000_000
# the longest system turns that templates write by themselves take some thousand
_MAX_CHARACTERS = 1_000_000
_MAX_GROWTH = 100
# counting lines takes as long as rendering, so only this many renderings are counted
_COUNTED_RENDERINGS = 256
_CODES = "AaBbcdefGgHIjMmpSUuVWwXxYyZz"


class ChatTemplate:
    """Chat template of one tokenizer.

    Raises:
        DataError: the tokenizer has no chat template, or several without a default.
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
        self._text = _with_fixed_date(text) if "strftime_now" in text else text
        self._num_rendered = 0

    def render(self, turns: Sequence[Turn], *, opens_answer: bool = False) -> str:
        """Return a conversation as text; `opens_answer`: and the beginning of the next answer.

        Raises:
            DataError: the template refuses these turns, is broken or does not end.
        """
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        self._num_rendered += 1
        try:
            with _line_limit() if self._num_rendered <= _COUNTED_RENDERINGS else nullcontext():
                text: str = self._tokenizer.apply_chat_template(
                    messages,
                    chat_template=self._text,
                    tokenize=False,
                    add_generation_prompt=opens_answer,
                )
        except Exception as error:  # a template can raise anything
            roles = ", ".join(dict.fromkeys(turn.role for turn in turns))
            raise DataError(
                f"data.template: {self.name} cannot render turns of {roles} "
                f"({first_line(error)}); {_REMEDY}"
            ) from error
        num_characters = sum(len(turn.content) for turn in turns)
        if len(text) > _MAX_CHARACTERS + _MAX_GROWTH * num_characters:
            size = f"writes {len(text):,} characters for {num_characters:,}"
            raise DataError(f"data.template: {self.name} {size}; {_REMEDY}")
        return text


class _TooLongError(Exception):
    pass


@contextmanager
def _line_limit() -> Iterator[None]:
    """Stop a template after `_MAX_LINES` of its lines: unlike a time, the same on every machine."""
    lines = 0

    def count(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if lines > _MAX_LINES:
                raise _TooLongError(f"it does not end: stopped after {_MAX_LINES:,} lines")
        return count

    def enter(frame: FrameType, _event: str, _argument: Any) -> Any:
        return count if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def _with_fixed_date(text: str) -> str:
    """Return a template whose `strftime_now` writes `TEMPLATE_DATE`; all else renders as before."""
    date = "format"
    for code in _CODES:
        date += f"|replace('%{code}', {TEMPLATE_DATE.strftime(f'%{code}')!r})"
        date += f"|replace('%-{code}', {TEMPLATE_DATE.strftime(f'%-{code}')!r})"
    # the line break belongs to the tag before it: the template begins at the start of a line
    return f"{{% macro strftime_now(format) -%}}{{{{ {date} }}}}{{%- endmacro %}}\n{text}"
