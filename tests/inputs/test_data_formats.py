"""Formats of rows: conversations become turns, prompts instructions; two formats are refused."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedllm.config.models import ColumnsSection
from fedllm.data.conversations import ROLES
from fedllm.data.files.splits import SPLIT_NAMES
from fedllm.data.readers import FILE_KINDS
from fedllm.data.turns import TURNS
from tests.inputs.test_data_files import source
from tests.inputs.test_data_values import read, row, told, write

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def talk(*messages: Any, client: Any = 1) -> dict[str, Any]:
    return {"client_id": client, "messages": list(messages)}


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_messages_become_turns_up_to_the_last_answer(tmp_path: Path, kind: str) -> None:
    system = {"role": "system", "content": "be kind"}
    rows = [
        talk(USER, ANSWER),
        talk(system, USER, ANSWER, USER, {"role": "assistant", "content": "bye"}, USER),
        talk(USER),
        talk(USER, {"role": "assistant", "content": ""}),
        {"client_id": 2, "messages": None},
    ]
    train = read(write(tmp_path / f"rows.{kind}", rows))["train"]
    assert train[TURNS].to_pylist() == [
        turns(("user", "hi"), ("assistant", "hello")),
        turns(
            ("system", "be kind"),
            ("user", "hi"),
            ("assistant", "hello"),
            ("user", "hi"),
            ("assistant", "bye"),
        ),
        None,
        None,
        None,
    ]
    assert train["references"].to_pylist() == [["hello"], ["bye"], [], [], []]
    assert train["instruction"].to_pylist() == train["input"].to_pylist() == [""] * 5
    assert train["client"].to_pylist() == ["1", "1", "1", "1", "2"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_sharegpt_has_its_own_words(tmp_path: Path, kind: str) -> None:
    names = ["system", "human", "gpt", "user", "chatgpt", "tool", "bing", "function", "assistant"]
    said = [{"from": name, "value": str(place)} for place, name in enumerate(names)]
    train = read(write(tmp_path / f"rows.{kind}", [{"client_id": 1, "conversations": said}]))
    assert [turn["role"] for turn in train["train"][TURNS].to_pylist()[0]] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    assert train["train"]["references"].to_pylist() == [["8"]]
    assert "format sharegpt" in source(tmp_path / f"rows.{kind}").notes[0]


def test_content_in_parts_is_their_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    rows = [talk({"role": "user", "content": parts}, ANSWER)]
    train = read(write(tmp_path / "rows.jsonl", rows))["train"]
    assert train[TURNS].to_pylist()[0][0] == {"role": "user", "content": "one two"}


def test_a_system_prompt_in_a_column_comes_first(tmp_path: Path) -> None:
    rows = [{**talk(USER, ANSWER), "system": "be kind"}, {**talk(USER, ANSWER), "system": ""}]
    train = read(write(tmp_path / "rows.jsonl", rows))["train"]
    first, second = train[TURNS].to_pylist()
    assert first == turns(("system", "be kind"), ("user", "hi"), ("assistant", "hello"))
    assert second == turns(("user", "hi"), ("assistant", "hello"))
    twice = [{**talk({"role": "system", "content": "be rude"}, USER, ANSWER), "system": "be kind"}]
    assert "line 1 has two system prompts" in told(write(tmp_path / "rows.jsonl", twice))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "critic", "content": "x"}, "role 'critic'"),
        ({"role": None, "content": "x"}, "role None"),
        ({"role": "user", "content": None}, "whose content is not text"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, "calls a tool"),
        ({"role": "function_call", "content": "x"}, "calls a tool"),
        ({"role": "assistant", "content": "x", "weight": 0}, "weight 0"),
    ],
)
def test_a_message_that_cannot_be_trained_is_refused_with_its_place(
    tmp_path: Path, kind: str, message: dict[str, Any], words: str
) -> None:
    rows = [talk(USER, ANSWER), talk(USER, message, ANSWER)]
    line = told(write(tmp_path / f"rows.{kind}", rows))
    assert words in line
    assert f"rows.{kind} {'line' if kind == 'jsonl' else 'row'} 2" in line


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hi", "need a list of messages"),
        (["hi"], "need {role, content}"),
        ([{"role": "user", "content": [{"type": "image_url", "url": "x"}]}], "is not text"),
        ([{"role": "user", "content": 5}], "is not text"),
        ([{"role": "assistant", "content": "cut \ud83d"}], "holds \\ud83d"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_line(
    tmp_path: Path, messages: Any, words: str
) -> None:
    file = write(tmp_path / "rows.jsonl", [{"client_id": 1, "messages": messages}])
    line = told(file, format="messages")
    assert words in line
    assert "line 1" in line


def test_a_saved_data_set_may_hold_its_messages_as_lists_of_fields(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"client_id": 1, "messages": [USER, ANSWER]}])
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved")["train"]["references"].to_pylist() == [["hello"]]
    fields = {"role": ["user", "assistant"], "content": ["hi", "hello"]}
    pq.write_table(
        pa.Table.from_pylist([{"client_id": 1, "messages": fields}]), tmp_path / "rows.parquet"
    )
    found = read(tmp_path / "rows.parquet")["train"][TURNS].to_pylist()
    assert found == [[USER, ANSWER]]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_prompt_and_completion_are_instruction_and_answer(tmp_path: Path, kind: str) -> None:
    rows = [{"client_id": 1, "prompt": "2 + 2 =", "completion": 4}]
    train = read(write(tmp_path / f"rows.{kind}", rows))["train"]
    assert train["instruction"].to_pylist() == ["2 + 2 ="]
    assert train["input"].to_pylist() == [""]
    assert train["references"].to_pylist() == [["4"]]
    assert TURNS not in train.column_names


def test_columns_that_the_configuration_names_are_of_alpaca(tmp_path: Path) -> None:
    rows = [{"client_id": 1, "prompt": "a", "completion": "b", "messages": 3}]
    columns = ColumnsSection(category=None, instruction="prompt", input=None, output="completion")
    file = write(tmp_path / "rows.jsonl", rows)
    assert read(file, columns=columns)["train"]["references"].to_pylist() == [["b"]]
    assert "format alpaca" in source(file, columns=columns).notes[0]


@pytest.mark.parametrize(
    ("more", "formats"),
    [
        ({"output": "x", "input": ""}, "messages and alpaca"),
        ({"conversations": [USER, ANSWER]}, "messages and sharegpt"),
        ({"prompt": "x", "completion": "y"}, "messages and completion"),
    ],
)
def test_rows_of_two_formats_are_refused_until_the_key_says_which(
    tmp_path: Path, more: dict[str, Any], formats: str
) -> None:
    file = write(tmp_path / "rows.jsonl", [{**talk(USER, ANSWER), **more}])
    message = told(file)
    assert message.startswith("data.format: ")
    assert formats in message
    assert read(file, format="messages")["train"]["references"].to_pylist() == [["hello"]]
    # a prompt beside the messages is no second format
    file = write(tmp_path / "rows.jsonl", [{**talk(USER, ANSWER), "prompt": "hi"}])
    assert read(file)["train"]["references"].to_pylist() == [["hello"]]


def test_a_row_of_another_format_is_refused_with_its_line(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [row(1)] * 200 + [talk(USER, ANSWER)])
    assert "line 201 is a row of messages, not of alpaca" in told(file)


def test_files_of_two_formats_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [row(1)])
    write(tmp_path / "test.jsonl", [talk(USER, ANSWER)])
    message = told(tmp_path)
    assert "train.jsonl holds rows of alpaca, test.jsonl of messages" in message


def test_a_format_without_its_column_names_key_and_column(tmp_path: Path) -> None:
    message = told(write(tmp_path / "rows.jsonl", [row(1)]), format="sharegpt")
    assert "line 1 is a row of alpaca, not of sharegpt" in message
    message = told(
        write(tmp_path / "rows.jsonl", [{"client_id": 1, "text": ""}]), format="sharegpt"
    )
    assert "data.format: sharegpt needs a column `conversations`" in message


def test_the_format_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({**talk(USER, ANSWER), "conversations": [USER, ANSWER]}))
    one, two = source(file, format="messages"), source(file, format="sharegpt")
    assert one.fingerprint != two.fingerprint
    only = write(tmp_path / "only.jsonl", [talk(USER, ANSWER)])
    assert source(only).fingerprint == source(only, format="messages").fingerprint


PAGE = (Path(__file__).resolve().parents[2] / "docs/data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["alpaca", "messages", "sharegpt", "completion"])
def test_the_examples_of_the_page_are_read(tmp_path: Path, name: str) -> None:
    found = re.search(rf"^`{name}`:\n\n```jsonl\n(.*?)^```", PAGE, re.M | re.S)
    assert found is not None
    file = tmp_path / "rows.jsonl"
    file.write_text(found[1], encoding="utf-8")
    columns = ColumnsSection(category=None)
    train = read(file, columns=columns)["train"]
    assert f"format {name};" in source(file, columns=columns).notes[0]
    assert train["client"].to_pylist() == ["ana", "ben"]
    assert all(train["references"].to_pylist())


def test_the_page_has_every_name_of_a_split_role_and_kind_of_file() -> None:
    for name in (*SPLIT_NAMES, *ROLES, *FILE_KINDS):
        assert f"`{name}`" in PAGE, name


def test_turns_are_made_of_every_type_that_text_has(tmp_path: Path) -> None:
    message = pa.struct({"role": pa.large_string(), "content": pa.large_string()})
    said = [("human", "hi"), ("gpt", "A"), ("human", "thanks")]
    values = [[{"role": role, "content": text} for role, text in said]]
    table = pa.table({"client_id": [1], "messages": pa.array(values, pa.list_(message))})
    pq.write_table(table, tmp_path / "rows.parquet")
    train = read(tmp_path / "rows.parquet")["train"]
    assert train[TURNS].to_pylist() == [turns(("user", "hi"), ("assistant", "A"))]
    assert train["references"].to_pylist() == [["A"]]


@pytest.mark.parametrize(
    ("asked", "rows", "missing"),
    [
        ("auto", [row("a"), {"client_id": "a", "input": "x", "response": "lost"}], "output"),
        ("messages", [talk(USER, ANSWER), {"client_id": 1, "chat": [USER, ANSWER]}], "messages"),
    ],
)
def test_a_file_of_a_split_without_the_answers_column_is_refused(
    tmp_path: Path, asked: str, rows: list[dict[str, Any]], missing: str
) -> None:
    for index, each in enumerate(rows):
        (tmp_path / f"train-{index}.jsonl").write_text(json.dumps(each) + "\n")
    message = told(tmp_path, format=asked)
    assert "train-1.jsonl" in message
    assert f"no column `{missing}`" in message
    assert "train-0.jsonl" not in message


@pytest.mark.parametrize("more", [{"conversations": [USER]}, {"prompt": "p", "completion": "c"}])
def test_the_format_whose_columns_are_all_there_is_offered_first(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    file = write(tmp_path / "rows.jsonl", [{**row("a"), **more}])
    assert "for example data.format=alpaca" in told(file)
    assert read(file, format="alpaca")["train"]["references"].to_pylist() == [["yes"]]
    file = write(tmp_path / "rows.jsonl", [{"client_id": "a", "output": "x", **more}])
    assert "for example data.format=alpaca" not in told(file)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_message_that_is_not_to_be_trained_is_refused(tmp_path: Path, kind: str) -> None:
    rows = [talk(USER, {**ANSWER, "train": trained}) for trained in (True, False)]
    assert read(write(tmp_path / f"right.{kind}", rows[:1]))["train"].num_rows == 1
    message = told(write(tmp_path / f"rows.{kind}", rows))
    assert "message of train false" in message
    assert re.search("line 2|row 2", message)
