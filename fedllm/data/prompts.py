"""Prompt templates: how instruction and input become the text in front of an answer.

A template gives a `Frame`: what stands before the input and what stands after it, up to and with
the response marker. Whatever has to be cut is cut from the input first, so a frame is kept apart
from it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedllm.errors import DataError

# Alpaca's prompt (Stanford, https://github.com/tatsu-lab/stanford_alpaca), with and without input.
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n"
)
_INPUT_MARKER = "\n\n### Input:\n"
_RESPONSE_MARKER = "\n\n### Response:\n"
# private-use characters: no template and no tokenizer treats them as anything but text
_SENTINEL = "\ue000\ue001"


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The text before and after the input of a prompt; `tail` ends with the response marker.

    `begins_sequence`: the head writes the beginning of the sequence itself.
    """

    head: str
    tail: str
    begins_sequence: bool = False


Template = Callable[[Any, str, bool], Frame]


def alpaca(_tokenizer: Any, instruction: str, has_input: bool) -> Frame:
    """Return Alpaca's frame; without an instruction the input takes its place."""
    if not instruction:
        return Frame(head=_WITHOUT_INPUT, tail=_RESPONSE_MARKER)
    if not has_input:
        return Frame(head=_WITHOUT_INPUT + instruction, tail=_RESPONSE_MARKER)
    return Frame(head=_WITH_INPUT + instruction + _INPUT_MARKER, tail=_RESPONSE_MARKER)


def chat(tokenizer: Any, instruction: str, has_input: bool) -> Frame:
    """Return the frame of the tokenizer's chat template: one user turn, then the assistant's.

    Raises:
        DataError: the tokenizer has no chat template, or its template hides the user's text.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "data.template: got chat, but the tokenizer of model.path has no chat template; "
            "use data.template=alpaca or a base model with a chat template"
        )
    between = "\n\n" if instruction and has_input else ""
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{instruction}{between}{_SENTINEL}"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    head, found, tail = rendered.partition(_SENTINEL)
    if not found:
        raise DataError(
            "data.template: the chat template of model.path does not show the user's text as it "
            "is; use data.template=alpaca"
        )
    return Frame(head=head, tail=tail, begins_sequence=True)


TEMPLATES: dict[str, Template] = {"alpaca": alpaca, "chat": chat}
