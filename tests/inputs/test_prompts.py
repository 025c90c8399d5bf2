"""Prompts and answers are what the tokenizer's own template renders, whatever it writes."""

from typing import Any

import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from fedllm.data.cache import TokenizedClients
from fedllm.data.tokenize import EncodedRow, RowEncoder
from fedllm.data.turns import TextRow, Turn
from fedllm.data.writer import write_clients
from fedllm.errors import DataError

MESSAGE = "{% for m in messages %}"
END = "{% endfor %}"
ASKS = "{% if add_generation_prompt %}"
# per kind of template: its text, the end of a turn, what it writes before an answer
TEMPLATES = {
    "chatml": (
        MESSAGE + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n" + END + ASKS
        + "<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
        "",
    ),
    "trims": (
        "<s>" + MESSAGE + "<h>{{ m.role }}</h>\n\n{{ m.content | trim }}<eot>" + END + ASKS
        + "<h>assistant</h>\n\n{% endif %}",
        "<eot>",
        "",
    ),
    "inst": (
        MESSAGE + "{% if m.role == 'user' %}<s>[INST] {{ m.content.strip() }} [/INST]"
        "{% else %} {{ m.content.strip() }}</s>{% endif %}" + END,
        "</s>",
        "",
    ),
    "replaces": (
        MESSAGE + "<h>{{ m.role }}</h>{{ m.content | replace('a', 'o') }}<eot>" + END + ASKS
        + "<h>assistant</h>{% endif %}",
        "<eot>",
        "",
    ),
    "thinks": (
        MESSAGE + "<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>"
        "\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n" + END + ASKS
        + "<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
        "<think>\n\n</think>",
    ),
    "never opens an answer": (
        MESSAGE + "<h>{{ m.role }}</h>{{ m.content }}<eot>" + END,
        "<eot>",
        "assistant",
    ),
    "an end within the text": (
        MESSAGE + "<h>{{ m.role }}</h>\n{{ m.content }}\n<eot></s>\n" + END + ASKS
        + "<h>assistant</h>\n{% endif %}",
        "<eot>",
        "",
    ),
}  # fmt: skip
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<eot>", "<h>", "</h>", "[gMASK]", "<sop>"]
MERGES = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("a", "n"), ("t", "w"), ("Ċ", "n"), (":", "Ġ"), ("e", "s")]


def make_tokenizer(chat: str = "", *, beginning: str = "", **options: Any) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL, *alphabet, *("".join(pair) for pair in MERGES)]
    inner = Tokenizer(
        models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=MERGES, **options)
    )
    # without a regular expression: merges reach over lines and words
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    if beginning:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{beginning} $A </s>",
            special_tokens=[(word, words.index(word)) for word in [*beginning.split(), "</s>"]],
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>")
    if chat:
        tokenizer.chat_template = chat
    return tokenizer


def encoded(
    tokenizer: Any, *rows: TextRow, template: str = "chat", cutoff: int = 600
) -> list[EncodedRow]:
    return RowEncoder(tokenizer, template=template, cutoff_tokens=cutoff).encode(rows)


def row(instruction: str, text: str, answer: str) -> TextRow:
    return TextRow(instruction=instruction, input=text, references=[answer])


def talk(*turns: tuple[str, str]) -> TextRow:
    said = tuple(Turn(role=role, content=text) for role, text in turns)  # type: ignore[arg-type]
    return TextRow(instruction="", input="", references=[said[-1].content], turns=said)


ROWS = [
    row("Say a banana.", "hello", "an answer"),
    row("Add one. ", "7\n", "two\n\nlines "),
    row("", "\n\n  seven", "  eight"),
    row("Nothing else", "", "\nnine"),
    row("Long. " * 120, "ends here", "es"),
]
CONVERSATION = [
    ("user", "What now?"),
    ("assistant", "an apple"),
    ("user", "And then? an"),
    ("assistant", "two of them"),
]


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("given", ROWS, ids=range(len(ROWS)))
def test_a_row_is_the_conversation_that_the_template_renders(kind: str, given: TextRow) -> None:
    chat, end, _ = TEMPLATES[kind]
    tokenizer = make_tokenizer(chat)
    (found,) = encoded(tokenizer, given, cutoff=2000)
    between = "\n\n" if given.instruction and given.input else ""
    said = f"{given.instruction}{between}{given.input}"
    turns = [{"role": "user", "content": said}, {"role": "assistant", "content": given.answer}]
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert found.prompt_ids == tokenizer(asked, add_special_tokens=False)["input_ids"]
    trained = tokenizer.decode(found.prompt_ids + found.answer_ids)
    assert trained == whole[: len(trained)]
    assert trained.endswith(end)
    assert whole[len(trained) :] in ("", "\n", "</s>\n")
    as_one = tokenizer(trained, add_special_tokens=False)["input_ids"]
    if as_one[: len(found.prompt_ids)] == found.prompt_ids:
        assert found.prompt_ids + found.answer_ids == as_one


def test_what_merges_over_the_border_is_tokenised_as_a_server_sends_it() -> None:
    tokenizer = make_tokenizer(TEMPLATES["chatml"][0])
    (found,) = encoded(tokenizer, row("Say.", "x", "\nnine"))
    asked = "<|im_start|>user\nSay.\n\nx<|im_end|>\n<|im_start|>assistant\n"
    assert found.prompt_ids == tokenizer(asked, add_special_tokens=False)["input_ids"]
    answer = tokenizer("\nnine<|im_end|>", add_special_tokens=False)["input_ids"]
    assert found.answer_ids == answer


@pytest.mark.parametrize("template", ["alpaca", "plain", "chat"])
def test_tokens_of_a_row_depend_on_the_row_alone(template: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES["chatml"][0], dropout=0.5)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.backend_tokenizer.enable_truncation(16)
    together = encoded(tokenizer, *ROWS, template=template, cutoff=200)
    for given, found in zip(ROWS, together, strict=True):
        assert encoded(tokenizer, given, template=template, cutoff=200) == [found]


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_all_that_a_tokenizer_begins_with_begins_a_row(template: str) -> None:
    tokenizer = make_tokenizer(beginning="[gMASK] <sop>")
    (found,) = encoded(tokenizer, row("Say.", "x", "five"), template=template)
    whole = RowEncoder(tokenizer, template=template, cutoff_tokens=600).prompt(
        row("Say.", "x", "five")
    )
    assert found.prompt_ids + found.answer_ids == tokenizer(whole + "five")["input_ids"]
    assert tokenizer.decode(found.prompt_ids[:2]) == "[gMASK]<sop>"


def test_plain_is_the_text_of_the_row() -> None:
    tokenizer = make_tokenizer()
    found = encoded(
        tokenizer, row("Q: two", "", " four"), row("Q", "x", "y"), row("", "", "z"),
        template="plain",
    )  # fmt: skip
    texts = [(tokenizer.decode(f.prompt_ids), tokenizer.decode(f.answer_ids)) for f in found]
    assert texts == [("Q: two", " four</s>"), ("Q\n\nx", "y</s>"), ("", "z</s>")]


def test_a_template_that_writes_the_date_writes_one_day() -> None:
    chat = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %} "
    tokenizer = make_tokenizer(chat + TEMPLATES["chatml"][0])
    (found,) = encoded(tokenizer, ROWS[0])
    assert tokenizer.decode(found.prompt_ids).startswith("26 Jul 2024 <|im_start|>user")


BROKEN = {
    "roles": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "tools": ("{% for t in tools %}{% endfor %}", "iterable"),
    "syntax": ("{% for m in messages %}", "endfor"),
    "endless": (
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "does not end",
    ),
    "writes too much": (MESSAGE + "{{ m.content * 9000000 }}" + END, "writes [0-9,]* characters"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "hides the user": (MESSAGE + "<h>{{ m.role }}</h>" + END, "does not show"),
    "hides the answer": ("{{ messages[0].content }}", "does not show"),
    "opens otherwise": (
        MESSAGE + "<h>{{ m.role }}</h>{{ m.content }}" + END + ASKS + "<think>{% endif %}",
        "<think>",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_template_that_cannot_serve_is_told_in_one_line(kind: str) -> None:
    chat, says = BROKEN[kind]
    tokenizer = make_tokenizer(chat)
    tokenizer.name_or_path = "/bases/mine"
    with pytest.raises(DataError, match=rf"^data\.template: .*/bases/mine .*{says}") as told:
        encoded(tokenizer, ROWS[0])
    assert "\n" not in str(told.value)
    assert "data.template=alpaca" in str(told.value)


def test_a_template_that_wants_a_system_turn_serves_rows_that_have_one() -> None:
    chat = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    tokenizer = make_tokenizer(chat + TEMPLATES["chatml"][0])
    (found,) = encoded(tokenizer, talk(("system", "Be."), *CONVERSATION[:2]))
    assert tokenizer.decode(found.prompt_ids).startswith("<|im_start|>system\nBe.<|im_end|>")
    with pytest.raises(DataError, match=r"turns of user, assistant|turns of user .*system first"):
        encoded(tokenizer, ROWS[0])


@pytest.mark.parametrize("kind", ["chatml", "trims", "inst", "thinks"])
def test_every_assistant_turn_of_a_conversation_carries_loss(kind: str) -> None:
    chat, end, lead = TEMPLATES[kind]
    tokenizer = make_tokenizer(chat)
    (found,) = encoded(tokenizer, talk(*CONVERSATION))
    earlier = tokenizer.decode([found.prompt_ids[n] for n in found.prompt_targets])
    assert earlier.strip() == f"an apple{end}"
    last = tokenizer.decode(found.answer_ids)
    assert last.removeprefix(lead).strip() == f"two of them{end}"


def test_an_answer_that_nobody_asked_for_trains_its_own_text_alone() -> None:
    default = "<|im_start|>system\nYou are kind.<|im_end|>\n"
    tokenizer = make_tokenizer(default + TEMPLATES["chatml"][0])
    encoder = RowEncoder(tokenizer, template="chat", cutoff_tokens=600)
    (found,) = encoder.encode([talk(("assistant", "Hello!"))])
    assert tokenizer.decode(found.answer_ids) == "Hello!<|im_end|>"
    assert tokenizer.decode(found.prompt_ids) == default + "<|im_start|>assistant\n"
    assert not encoder.answer_form.leads


def test_a_conversation_that_is_too_long_loses_its_oldest_turns_first() -> None:
    tokenizer = make_tokenizer(TEMPLATES["chatml"][0])
    turns = [("system", "Be."), *[(role, f"{text} {n}") for n in range(9) for role, text in
             CONVERSATION[:2]], ("user", "last question"), ("assistant", "last")]  # fmt: skip
    (found,) = encoded(tokenizer, talk(*turns), cutoff=260)
    text = tokenizer.decode(found.prompt_ids)
    assert found.prompt_cut
    assert len(found.prompt_ids) + len(found.answer_ids) <= 260
    assert text.startswith("<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nWhat now?")
    assert text.endswith("last question<|im_end|>\n<|im_start|>assistant\n")
    assert "an apple 8" in text
    assert "an apple 0" not in text


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_only_one_question_with_its_answer_is_an_ordinary_row(template: str) -> None:
    tokenizer = make_tokenizer()
    one = encoded(tokenizer, talk(*CONVERSATION[:2]), template=template)
    assert one == encoded(tokenizer, row("What now?", "", "an apple"), template=template)
    with pytest.raises(DataError, match=r"data\.template: got .*data\.template=chat"):
        encoded(tokenizer, talk(*CONVERSATION), template=template)


def test_the_cache_keeps_what_carries_loss_and_how_answers_end(tmp_path: Any) -> None:
    tokenizer = make_tokenizer(TEMPLATES["thinks"][0])
    columns = {"client": ["a"], "category": [""], "instruction": [""], "input": [""]}
    turns = [[{"role": role, "content": text} for role, text in CONVERSATION]]
    table = pa.table({**columns, "references": [["two of them"]], "turns": turns})
    encoder = RowEncoder(tokenizer, template="chat", cutoff_tokens=600)
    write_clients(tmp_path / "key", {"train": table}, encoder)
    data = TokenizedClients.open(tmp_path / "key")
    (found,) = data.rows("a", "train")
    (expected,) = encoded(tokenizer, talk(*CONVERSATION))
    assert (found.prompt_ids, found.answer_ids) == (expected.prompt_ids, expected.answer_ids)
    assert found.prompt_targets == expected.prompt_targets
    assert data.answer_form.ends == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert data.answer_form.leads == ("<think>\n\n</think>",)


@pytest.mark.parametrize("cutoff", [40, 60, 90, 120, 200])
def test_what_is_cut_of_a_question_is_its_end(cutoff: int) -> None:
    tokenizer = make_tokenizer(TEMPLATES["chatml"][0])
    given = row("Count to ten.", "x" * 100, "eight " * 5)
    (found,) = encoded(tokenizer, given, cutoff=cutoff)
    prompt = tokenizer.decode(found.prompt_ids)
    marker = "<|im_end|>\n<|im_start|>assistant\n"
    whole = tokenizer.decode(encoded(tokenizer, given, cutoff=999)[0].prompt_ids)
    assert len(found.prompt_ids) + len(found.answer_ids) <= cutoff
    assert prompt.endswith(marker)
    assert whole.startswith(prompt.removesuffix(marker))
    assert found.prompt_cut == (prompt != whole)
    assert found.answer_cut == (tokenizer.decode(found.answer_ids) != "eight " * 5 + "<|im_end|>")
    assert found.answer_cut == (cutoff < 45)


def test_of_several_templates_the_default_is_the_one() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATES["chatml"][0], "tool_use": "{{ no }}"}
    alone = make_tokenizer(TEMPLATES["chatml"][0])
    assert encoded(tokenizer, *ROWS) == encoded(alone, *ROWS)
    tokenizer.chat_template = {"rag": TEMPLATES["chatml"][0], "tool_use": "{{ no }}"}
    with pytest.raises(DataError, match=r"^data\.template: .*data\.template=alpaca"):
        encoded(tokenizer, ROWS[0])


def test_a_tokenizer_of_python_has_the_same_laws() -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = MESSAGE + "{{ m.role }}: {{ m.content }}</s>" + END
    (found,) = encoded(tokenizer, talk(*CONVERSATION), cutoff=200)
    earlier = tokenizer.decode([found.prompt_ids[n] for n in found.prompt_targets])
    assert earlier == "assistant: an apple</s>"
    assert tokenizer.decode(found.answer_ids) == "assistant: two of them</s>"
    (cut,) = encoded(tokenizer, row("", "x" * 300, "nine"), template="alpaca", cutoff=200)
    assert len(cut.prompt_ids) + len(cut.answer_ids) == 200


def test_a_shared_instruction_is_read_once_and_changes_no_token() -> None:
    tokenizer = make_tokenizer(TEMPLATES["chatml"][0])
    asked = "Say an apple, two bananas; then count the lines.\n\n" * 30
    for text in ("an", "\nnine", "  two", "", "x" * 50):
        given = row(asked, text, "nine")
        (found,) = encoded(tokenizer, given, cutoff=4000)
        whole = RowEncoder(tokenizer, template="chat", cutoff_tokens=4000).prompt(given)
        assert found.prompt_ids == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_an_answer_that_stands_before_another_is_not_cut() -> None:
    tokenizer = make_tokenizer(TEMPLATES["chatml"][0])
    turns = (("user", "an apple"), ("assistant", "two of them " * 40), ("assistant", "an apple"))
    (whole,) = encoded(tokenizer, talk(*turns))
    (found,) = encoded(
        tokenizer, talk(*turns), cutoff=len(whole.prompt_ids) + len(whole.answer_ids) - 20
    )
    earlier = tokenizer.decode([found.prompt_ids[n] for n in found.prompt_targets])
    assert earlier in {"", tokenizer.decode([whole.prompt_ids[n] for n in whole.prompt_targets])}
