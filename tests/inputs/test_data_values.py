"""Values as people's files have them: what is missing stays missing, and a client is one client."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedllm.config.models import ColumnsSection, DataSection
from fedllm.data.readers import Tables, open_source
from fedllm.errors import DataError
from fedllm.storage.paths import CachePaths

COLUMNS = ColumnsSection(category=None, instruction=None)


def read(path: Path, **section: Any) -> Tables:
    given = {"columns": COLUMNS, "test_fraction": 0.0, **section}
    return open_source(
        DataSection(path=str(path), **given), CachePaths(root=path.parent / "cache"), split_seed=0
    ).read()


def told(path: Path, **section: Any) -> str:
    with pytest.raises(DataError) as raised:
        read(path, **section)
    message = str(raised.value)
    assert "\n" not in message
    return message


def row(client: Any, answer: Any = "yes", text: Any = "?") -> dict[str, Any]:
    return {"client_id": client, "input": text, "output": answer}


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as the file's name says; CSV without quotes but where pandas writes them."""
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, each.values())) for each in rows)]
        file.write_text("\n".join(lines) + "\n")
    else:
        file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return file


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_client_that_became_a_float_is_the_same_client(tmp_path: Path, kind: str) -> None:
    write(tmp_path / f"train.{kind}", [row(3), row(3), row(12)])
    write(tmp_path / f"test.{kind}", [row(3.0), row(12.0)])
    found = read(tmp_path)
    assert found["train"]["client"].to_pylist() == ["3", "3", "12"]
    assert found["test"]["client"].to_pylist() == ["3", "12"]


def test_whole_floats_beside_text_and_missing_decimals_are_whole_numbers(tmp_path: Path) -> None:
    rows = [row(3.0), row("ana"), row(-0.0), row(4)]
    found = read(write(tmp_path / "rows.jsonl", rows))
    assert found["train"]["client"].to_pylist() == ["3", "ana", "0", "4"]
    decimals = pa.array([1, 2]).cast(pa.decimal128(25, 2))
    table = pa.table({"client_id": decimals, "input": ["a", "b"], "output": ["c", "d"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet")["train"]["client"].to_pylist() == ["1", "2"]


@pytest.mark.parametrize(
    ("kind", "place", "client"),
    [
        ("jsonl", "line 2", 2.5),
        ("csv", "row 3", 2.5),
        ("parquet", "row 2", 2.5),
        ("jsonl", "line 2", 2.0**60),
        ("parquet", "row 2", 2.0**60),
    ],
)
def test_a_number_that_is_no_client_is_refused_with_its_place(
    tmp_path: Path, kind: str, place: str, client: float
) -> None:
    message = told(write(tmp_path / f"rows.{kind}", [row(1.0), row(client)]))
    assert "data.columns.client" in message
    assert place in message
    assert "whole number" in message


def test_infinity_is_no_client(tmp_path: Path) -> None:
    message = told(write(tmp_path / "rows.parquet", [row(1.0), row(math.inf)]))
    assert "row 2: inf is not a whole number" in message


@pytest.mark.parametrize("missing", [math.nan, None])
@pytest.mark.parametrize(
    ("kind", "place"), [("jsonl", "line 2"), ("csv", "row 3"), ("parquet", "row 2")]
)
def test_a_missing_client_is_refused_with_its_place(
    tmp_path: Path, kind: str, place: str, missing: float | None
) -> None:
    written = "" if kind == "csv" and missing is None else missing
    message = told(write(tmp_path / f"rows.{kind}", [row(1.0), row(written), row(2.0)]))
    assert message.startswith("data.columns.client: ")
    assert "has no `client_id`" in message
    assert place in message


@pytest.mark.parametrize("word", [math.nan, math.inf, -math.inf])
def test_the_bare_words_of_pythons_json_are_missing_values(tmp_path: Path, word: float) -> None:
    rows = [row("a", word, "x"), row("a", "NaN", word), row("a", [word, "y"])]
    train = read(write(tmp_path / "rows.jsonl", rows))["train"]
    assert train["references"].to_pylist() == [[], ["NaN"], ["y"]]
    assert train["input"].to_pylist() == ["x", "", "?"]


def test_a_bare_nan_in_csv_is_missing_and_one_in_quotes_is_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('client_id,input,output\na,NaN,"NaN"\na,x,NaN\na,,"two\nlines, ""quoted"""\n')
    train = read(file)["train"]
    assert train["input"].to_pylist() == ["", "x", ""]
    assert train["references"].to_pylist() == [["NaN"], [], ['two\nlines, "quoted"']]


def test_nan_in_a_column_of_numbers_is_missing(tmp_path: Path) -> None:
    train = read(
        write(tmp_path / "rows.parquet", [row("a", 1.5, 2.0), row("a", math.nan, math.nan)])
    )
    assert train["train"]["references"].to_pylist() == [["1.5"], []]
    assert train["train"]["input"].to_pylist() == ["2", ""]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_null_and_empty_references_are_left_out(tmp_path: Path, kind: str) -> None:
    answers = [[None, "x"], ["x", None], [None], [], None, ["", "y", "z"]]
    train = read(write(tmp_path / f"rows.{kind}", [row("a", answer) for answer in answers]))[
        "train"
    ]
    assert train["references"].to_pylist() == [["x"], ["x"], [], [], [], ["y", "z"]]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_truth_values_are_spelled_as_in_json(tmp_path: Path, kind: str) -> None:
    train = read(write(tmp_path / f"rows.{kind}", [row("a", True), row("a", False)]))["train"]
    assert train["references"].to_pylist() == [["true"], ["false"]]


def test_one_number_in_two_spellings_of_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [row("3")])
    write(tmp_path / "test.jsonl", [row("3.0")])
    assert "has the clients 3 and 3.0 (as text)" in told(tmp_path)


def test_parts_whose_columns_differ_in_type_are_one_split(tmp_path: Path) -> None:
    text = pa.array(["yes"]).dictionary_encode()
    for number, (client, answer) in enumerate(
        [
            (pa.array([7]), pa.array(["yes"])),
            (pa.array(["7"], pa.large_string()), pa.array([["yes", None]])),
            (pa.array([7.0]), text),
            (pa.array([7]).dictionary_encode(), pa.nulls(1)),
            (pa.array([2**63 + 1], pa.uint64()), pa.array([5], pa.uint8())),
        ]
    ):
        table = pa.table({"client_id": client, "input": text, "output": answer})
        # nobody asks for it, and no signed integer holds it
        table = table.append_column("hash", pa.array([2**64 - 1], pa.uint64()))
        pq.write_table(table, tmp_path / f"train-{number}.parquet")
    train = read(tmp_path)["train"]
    assert train["client"].to_pylist() == ["7", "7", "7", "7", "9223372036854775809"]
    assert train["references"].to_pylist() == [["yes"], ["yes"], ["yes"], [], ["5"]]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_half_a_character_is_refused_with_line_and_escape(tmp_path: Path, kind: str) -> None:
    rows = [row("a"), row("a", "fine"), row("a", ["x", "cut \ud83d"])]
    message = told(write(tmp_path / f"rows.{kind}", rows))
    assert "line 3: `output` holds \\ud83d" in message
    whole = read(write(tmp_path / f"whole.{kind}", [row("a", "\U0001f98a")]))
    assert whole["train"]["references"].to_pylist() == [["\U0001f98a"]]


def test_text_of_a_parquet_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    offsets = pa.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0]))
    broken = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"a\xff")])
    pq.write_table(
        pa.table({"client_id": ["a"], "input": broken, "output": ["x"]}), tmp_path / "rows.parquet"
    )
    assert "data.columns.input" in told(tmp_path / "rows.parquet")


def test_integers_of_csv_can_choose_held_out_clients(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("client_id,input,output,task,note\nana,?,x,7,7\nben,?,y,8,seven\n")
    train = read(file)["train"]
    assert train["integer.task"].to_pylist() == [7, 8]
    assert "integer.note" not in train.column_names
