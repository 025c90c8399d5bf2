"""Tokens of a row: its prompt, its answer, and what is cut if the row is too long."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedllm.data.tokenize import RowEncoder
from fedllm.data.turns import TextRow
from fedllm.errors import DataError, ModelError

MARKER = "\n\n### Response:\n"
CHAT = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: n for n, letter in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


BYTES = byte_tokenizer(eos_token="</s>", bos_token="<s>")


def encoder(
    cutoff_tokens: int = 400, template: str = "alpaca", tokenizer: Any = BYTES
) -> RowEncoder:
    return RowEncoder(tokenizer, template=template, cutoff_tokens=cutoff_tokens)


def row(instruction: str = "Say it.", text: str = "hello", *answers: str) -> TextRow:
    return TextRow(instruction=instruction, input=text, references=answers or ("world",))


def test_a_prompt_is_the_template_and_the_answer_ends_with_the_end_of_sequence() -> None:
    found = encoder().encode([row()])[0]
    assert BYTES.decode(found.prompt_ids) == encoder().prompt(row())
    assert BYTES.decode(found.prompt_ids).endswith(f"Say it.\n\n### Input:\nhello{MARKER}")
    assert BYTES.decode(found.answer_ids) == "world</s>"
    assert not found.prompt_cut
    assert not found.answer_cut


def test_without_input_the_template_has_no_place_for_one() -> None:
    prompt = encoder().prompt(row(text=""))
    assert "### Input" not in prompt
    assert prompt.endswith(f"Say it.{MARKER}")


def test_without_instruction_the_input_takes_its_place() -> None:
    prompt = encoder().prompt(row(instruction=""))
    assert prompt.endswith(f"### Instruction:\nhello{MARKER}")


def test_the_first_of_several_references_is_trained() -> None:
    found = encoder().encode([row("Say it.", "hello", "one", "two")])[0]
    assert BYTES.decode(found.answer_ids) == "one</s>"


@pytest.mark.parametrize("references", [(), ("",)])
def test_a_row_without_an_answer_has_no_answer_tokens(references: tuple[str, ...]) -> None:
    empty = TextRow(instruction="Say it.", input="hello", references=references)
    assert encoder().encode([empty])[0].answer_ids == []


@given(
    instruction=st.text("ab\n", max_size=150),
    text=st.text("cd\n", max_size=400),
    answer=st.text("ef\n", min_size=1, max_size=400),
    cutoff=st.integers(30, 500),
)
def test_long_rows_are_cut_in_order(instruction: str, text: str, answer: str, cutoff: int) -> None:
    given = TextRow(instruction=instruction, input=text, references=(answer,))
    found = encoder(cutoff).encode([given])[0]
    prompt, trained = BYTES.decode(found.prompt_ids), BYTES.decode(found.answer_ids)
    whole = encoder(10_000).prompt(given)
    assert len(found.prompt_ids) + len(found.answer_ids) <= cutoff
    assert prompt.endswith(MARKER)
    assert whole.startswith(prompt.removesuffix(MARKER))
    assert found.answer_cut == (len(answer) + 1 > cutoff - len(MARKER))
    assert found.prompt_cut == (prompt != whole)
    if not found.answer_cut:
        assert trained == f"{answer}</s>"
    else:
        assert prompt == MARKER
        assert answer.startswith(trained)


def test_very_long_inputs_are_read_only_as_far_as_they_could_fit() -> None:
    found = encoder(200).encode([row(text="x" * 1_000_000)])[0]
    assert len(found.prompt_ids) + len(found.answer_ids) == 200
    assert found.prompt_cut


def test_a_cutoff_that_is_too_small_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.cutoff_tokens: got 12"):
        encoder(12)


def test_a_tokenizer_without_end_of_sequence_is_refused() -> None:
    with pytest.raises(ModelError, match="end-of-sequence"):
        encoder(tokenizer=byte_tokenizer())


def test_a_chat_template_writes_the_whole_prompt() -> None:
    tokenizer = byte_tokenizer(eos_token="</s>", bos_token="<s>")
    tokenizer.chat_template = CHAT
    found = encoder(template="chat", tokenizer=tokenizer).encode([row()])[0]
    assert tokenizer.decode(found.prompt_ids) == "<s><|user|>Say it.\n\nhello\n<|assistant|>"
    assert found.prompt_ids.count(tokenizer.bos_token_id) == 1


def test_a_tokenizer_without_chat_template_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.template.*alpaca"):
        encoder(template="chat")


def test_a_chat_template_that_hides_the_text_is_refused() -> None:
    tokenizer = byte_tokenizer(eos_token="</s>")
    tokenizer.chat_template = "nothing to see"
    with pytest.raises(DataError, match=r"data\.template"):
        encoder(template="chat", tokenizer=tokenizer)


def test_pieces_are_tokenised_as_inside_a_text_where_beginnings_are_marked() -> None:
    """SentencePiece puts a space before every text, so also before every single piece."""
    letters = ["▁", "\n", *"abcdefghijklmnopqrstuvwxyzBIRSW#:,."]
    vocabulary = {letter: n for n, letter in enumerate(["<s>", "</s>", "<unk>", *letters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    found = encoder(tokenizer=tokenizer).encode([row("Say.", "hello", "world")])[0]
    whole = encoder(tokenizer=tokenizer).prompt(row("Say.", "hello")) + "world"
    assert found.prompt_ids + found.answer_ids[:-1] == tokenizer(whole)["input_ids"]


def test_a_beginning_of_sequence_that_the_tokenizer_adds_comes_once(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "nano-base")
    found = encoder(tokenizer=tokenizer).encode([row()])[0]
    whole = encoder(tokenizer=tokenizer).prompt(row())
    assert found.prompt_ids == tokenizer(whole)["input_ids"]
    assert found.answer_ids == [*tokenizer("world")["input_ids"], tokenizer.eos_token_id]


def test_a_huge_answer_is_cut_to_the_tokens_that_it_has_when_it_is_whole() -> None:
    encoder = RowEncoder(BYTES, template="alpaca", cutoff_tokens=300)
    fits, huge = 300 * 16, 300 * 16 + 1
    rows = [
        TextRow(instruction="Say it.", input="x", references=["ab" * size]) for size in (fits, huge)
    ]
    short, long = encoder.encode(rows)
    assert short.answer_cut and long.answer_cut
    assert short == long
