"""Answers generated in padded batches: greedy decoding by transformers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from transformers import GenerationConfig

from fedllm.config.models import EvaluationSection
from fedllm.data.cache import BARE_ANSWERS, AnswerForm
from fedllm.packing.slots import AdapterSlots

# called with a number of rows that were scored now
Scored = Callable[[int], None]


def ignore_scored(rows: int) -> None:
    """Count no rows."""


def generate_answers(
    slots: AdapterSlots,
    prompts: Sequence[Sequence[int]],
    section: EvaluationSection,
    form: AnswerForm = BARE_ANSWERS,
    scored: Scored = ignore_scored,
) -> list[str]:
    """Return the model's answers as stripped text, in the order of the prompts.

    Decoding is greedy. An answer has at most `max_new_tokens` tokens and ends where trained
    answers end. The model's own generation configuration, such as penalties, is ignored. Prompts
    of similar length share a batch and are padded on the left. The answer to a prompt without
    tokens is empty. `scored` is called with the number of further rows after every batch.
    """
    slots.evaluate()
    config = _config(slots, section, form)
    answers = [""] * len(prompts)
    with torch.inference_mode(), _without_model_config(slots.model):
        for places in _by_length(prompts, section.batch_size):
            batch = _padded([prompts[place] for place in places], slots)
            # transformers types `generate` for its own classes only
            model: Any = slots.model
            output = model.generate(**batch, generation_config=config)
            written = output[:, batch["input_ids"].shape[1] :].tolist()
            for place, text in zip(places, answer_texts(slots, written, form), strict=True):
                answers[place] = text
            scored(len(places))
    return answers


def answer_texts(
    slots: AdapterSlots, answers: Sequence[Sequence[int]], form: AnswerForm = BARE_ANSWERS
) -> list[str]:
    """Return answers as stripped text, without special tokens.

    The end of the turn, and what a chat template writes before an answer, are removed too.
    """
    written = [takewhile(lambda token: token not in form.ends, answer) for answer in answers]
    decode = slots.base.tokenizer.batch_decode
    texts = decode([[*tokens] for tokens in written], skip_special_tokens=True)
    return [_without_lead(text.strip(), form.leads) for text in texts]


def end_tokens(slots: AdapterSlots, form: AnswerForm = BARE_ANSWERS) -> set[int]:
    """Return the tokens that end an answer: of training, of the tokenizer and of the model."""
    ends = getattr(slots.model.generation_config, "eos_token_id", None)
    ends = {*ends} if isinstance(ends, list) else {ends}
    ends |= {slots.base.tokenizer.eos_token_id, *form.ends}
    return {end for end in ends if end is not None}


def _without_lead(text: str, leads: Sequence[str]) -> str:
    lead = max(filter(text.startswith, leads), key=len, default="")
    return text.removeprefix(lead).strip()


@contextmanager
def _without_model_config(model: Any) -> Iterator[None]:
    """Hide the model's generation configuration, from which `generate` takes all missing values."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _by_length(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    order = [place for place, prompt in enumerate(prompts) if prompt]
    order.sort(key=lambda place: len(prompts[place]))
    return (order[start : start + size] for start in range(0, len(order), size))


def _padded(prompts: Sequence[Sequence[int]], slots: AdapterSlots) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    gaps = [width - len(prompt) for prompt in prompts]
    tokens = [[slots.pad_token] * gap + [*p] for gap, p in zip(gaps, prompts, strict=True)]
    mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
    return {
        "input_ids": torch.tensor(tokens, device=slots.device),
        "attention_mask": torch.tensor(mask, device=slots.device),
    }


def _config(slots: AdapterSlots, section: EvaluationSection, form: AnswerForm) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=section.max_new_tokens,
        eos_token_id=sorted(end_tokens(slots, form)) or None,
        pad_token_id=slots.pad_token,
    )
